"""Rewards with TRL's signature: reward(prompts=..., completions=..., **columns) -> scores.

`completions` holds strings or lists of messages, `columns` the other columns of the data set, one
entry per completion. A score of None means "could not be scored": such a completion is left out of
means, standard deviations and draft selection. Texts are untrusted: nothing here evaluates them,
and every scan takes time linear in their length.

`matching` compares answers with references (`answers` finds them, `remarks`, `rules` and `units`
read them, `judge` asks math-verify), `formatting` looks at tags, `loading` finds a reward by name.
"""

from .answers import CompletionLike, completion_text
from .formatting import format_reward, opened_format_reward
from .loading import BUILT_IN_REWARDS, load_reward
from .matching import exact_match_reward, math_reward

__all__ = [
    "BUILT_IN_REWARDS",
    "CompletionLike",
    "completion_text",
    "exact_match_reward",
    "format_reward",
    "load_reward",
    "math_reward",
    "opened_format_reward",
]
