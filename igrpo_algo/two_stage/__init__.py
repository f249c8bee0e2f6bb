"""Two stages over any sampler and any reward: `rollout` has the functions, the rest is inside.

`choosing` turns scored drafts into the next prompt, `courses` takes one prompt through its stages,
`drivers` moves all of them, `scheduling` lets drafts go first, `journal` keeps what has finished.
"""

from .choosing import Fallback
from .courses import StageFinished, StageStarted
from .journal import load_journal
from .rollout import stream_two_stage_rollout, two_stage_rollout

__all__ = [
    "Fallback",
    "StageFinished",
    "StageStarted",
    "load_journal",
    "stream_two_stage_rollout",
    "two_stage_rollout",
]
