"""Stage 1 for trainers that ask for one sample at a time: once per group, when the first one asks.

verl, OpenRLHF and slime call a hook once per sample, and a sample does not know its siblings. Here
the first sample of a group draws the drafts, has them scored, chooses one and splices it; its
siblings wait for the same Stage-2 prompt.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from igrpo_kernels.checks import check_count, describe

from ..drafts.markers import marker_tokens
from ..drafts.rules import DraftRules, Fallback
from ..drafts.splice import TextSplice, TokenBudget
from ..fields import check_fields
from ..prompts import Prompt
from ..seeds import derive_seed
from .completions import Completion
from .scoring import Scorer
from .single_flight import SingleFlight

Draw = Callable[[int], Awaitable[Completion]]
Score = Callable[[Sequence[Any]], Awaitable[list[float]]]


@dataclass(frozen=True)
class HostDraft(Completion):
    """A draft, and what the trainer drew it as, which its own rewards are given.

    Attributes:
        host: The trainer's value.
    """

    host: Any = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class StageTwoPrompt:
    """What the refinements of a group are drawn from.

    Attributes:
        prompt: The original prompt with the draft in it; the original where it stays plain.
        draft: The draft as it stands there; empty where the prompt is plain.
        draft_rewards: The training reward of each draft, NaN where unscored.
    """

    prompt: Prompt
    draft: str
    draft_rewards: tuple[float, ...]

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def mean_draft_reward(self) -> float:
        """Mean reward of the drafts that have one; 0 where none has."""
        known = [reward for reward in self.draft_rewards if not math.isnan(reward)]
        return sum(known) / max(len(known), 1)

    @property
    def is_conditioned(self) -> bool:
        """Whether a draft stands in the prompt."""
        return self.draft != ""

    def logs(self, prefix: str = "igrpo_") -> dict[str, float]:
        """What every adapter logs of Stage 1, under the names that its trainer likes."""
        return {
            f"{prefix}draft_reward": self.mean_draft_reward,
            f"{prefix}conditioned": float(self.is_conditioned),
        }


class OncePerGroup:
    """Runs Stage 1 once for each group of samples.

    A group is known by its key while its drafts are being drawn; a later call with the key starts
    anew, so that a prompt of the next epoch does not get the draft of an old policy. All
    samples of a group must therefore ask before its first draft is done: in one event loop, and
    started together, as trainers start them. Where they may come later, and a key never comes
    again for another group, `keep` the Stage-2 prompts of finished groups.

    Args:
        rules: How a draft is chosen and spliced.
        num_drafts: N.
        seed: For random ties, random drafts and dropout.
        keep: How many finished groups to keep: the last ones.

    Raises:
        TypeError: `rules` is not `DraftRules`, or a count is not an int.
        ValueError: `num_drafts` is below 1, or the rules leave prompts out of Stage 2, which a
            trainer that asks for one sample at a time can't do.

    Examples:
        >>> stage_one = OncePerGroup()
        >>> async def draw(number):
        ...     return Completion([number], str(number))
        >>> async def score(drafts):
        ...     return [float(draft.text) for draft in drafts]
        >>> async def group():
        ...     samples = (stage_one.prompt("q", "2 + 2?", draw, score) for _ in range(3))
        ...     return await asyncio.gather(*samples)
        >>> {sample.draft for sample in asyncio.run(group())}
        {'3'}
    """

    def __init__(
        self,
        *,
        rules: DraftRules = DraftRules(),  # frozen
        num_drafts: int = 4,
        seed: int = 0,
        keep: int = 0,
    ) -> None:
        self.rules = check_rules(rules)
        self.num_drafts = check_count("num_drafts", num_drafts)
        self.seed = check_count("seed", seed, at_least=0)
        self.keep = check_count("keep", keep, at_least=0)
        self._flights: SingleFlight[StageTwoPrompt] = SingleFlight(keep=max(keep, 1))

    async def prompt(
        self,
        key: Hashable,
        prompt: Prompt,
        draw: Draw,
        score: Score,
        *,
        columns: Mapping[str, Any] | None = None,
        rules: DraftRules | None = None,
    ) -> StageTwoPrompt:
        """Return the Stage-2 prompt of a sample.

        Args:
            key: What the samples of a group have in common, and no other group.
            prompt: The original prompt.
            draw: Draws one draft of the original prompt; it is given the draft's number.
            score: Gives the training reward of each draft, NaN where there is none.
            columns: What `rules.selection_score` is given by name, one value each.
            rules: Replaces the rules given at the start: fitted to a tokenizer, say.

        Returns:
            The same value for every sample of the group.

        Raises:
            RewardError: `rules.selection_score` raised.
        """

        async def first_of_group() -> StageTwoPrompt:
            try:
                return await stage_one(
                    prompt,
                    draw,
                    score,
                    rules=rules or self.rules,
                    num_drafts=self.num_drafts,
                    seed=derive_seed(self.seed, repr(key)),
                    columns=columns,
                )
            finally:
                if not self.keep:
                    self._flights.forget(key)

        return await self._flights.do(key, first_of_group)


async def stage_one(
    prompt: Prompt,
    draw: Draw,
    score: Score,
    *,
    rules: DraftRules,
    num_drafts: int,
    seed: int,
    columns: Mapping[str, Any] | None = None,
) -> StageTwoPrompt:
    """Run Stage 1 for one prompt: draw N drafts, have them scored, choose one, splice it.

    For trainers that hand out a whole group; `OncePerGroup` is for those that ask for one sample.

    Args:
        prompt: The original prompt.
        draw: Draws one draft of the original prompt; it is given the draft's number.
        score: Gives the training reward of each draft, NaN where there is none.
        rules: How a draft is chosen and spliced.
        num_drafts: N.
        seed: For random ties, random drafts and dropout.
        columns: What `rules.selection_score` is given by name, one value each.

    Returns:
        What the refinements are drawn from.

    Raises:
        RewardError: `rules.selection_score` raised.
        TypeError: `score` returned something other than numbers.
        ValueError: `score` gave another number of rewards than there are drafts.
    """
    drafts = await asyncio.gather(*map(draw, range(num_drafts)))
    rewards = _numbers(await score(drafts), num_drafts)
    scores = None
    if rules.selection_score is not None:
        by_name = {name: [value] for name, value in (columns or {}).items()}
        ranking = Scorer(rules.selection_score, [prompt], by_name, "selection_score")
        scores = torch.tensor([await ranking(0, drafts)], dtype=torch.float64)
    choices = rules.choose(
        torch.tensor([rewards], dtype=torch.float64),
        scores=scores,
        lengths=torch.tensor([[len(draft.token_ids) for draft in drafts]]),
        seeds=[seed],
    )
    if choices.plain:
        return StageTwoPrompt(prompt, "", tuple(rewards))
    spliced = rules.condition(prompt, drafts[int(choices.index)])
    return StageTwoPrompt(spliced.prompt, spliced.draft, tuple(rewards))


def _numbers(rewards: Any, count: int) -> list[float]:
    try:
        numbers = [float(reward) for reward in rewards]
    except (TypeError, ValueError):
        raise TypeError(f"score must give a list of numbers, got {describe(rewards)}") from None
    if len(numbers) != count:
        raise ValueError(f"score must give one reward per draft = {count}, got {len(numbers)}")
    return numbers


def check_rules(rules: DraftRules, *, by_reward_alone: bool = False) -> DraftRules:
    """Refuse rules that leave prompts out of Stage 2, and anything that is not `DraftRules`.

    Args:
        rules: How a draft is chosen and spliced.
        by_reward_alone: Refuse a `selection_score` too, where the trainer has no place for it.

    Raises:
        TypeError: `rules` is not `DraftRules`.
        ValueError: A fallback is `Fallback.SKIP`, or the trainer can't rank drafts as they ask.
    """
    if not isinstance(rules, DraftRules):
        raise TypeError(f"rules must be DraftRules, got {describe(rules)}")
    for name in ("when_failed", "when_solved", "when_unscored"):
        if getattr(rules, name) is Fallback.SKIP:
            raise ValueError(
                f"{name} must not be Fallback.SKIP: this trainer can't leave a prompt out of "
                "Stage 2; take Fallback.PLAIN_PROMPT"
            )
    if by_reward_alone and rules.selection_score is not None:
        raise ValueError(
            "selection_score must be None: this trainer ranks drafts by their training reward"
        )
    return rules


def fit_to_tokenizer(
    rules: DraftRules,
    tokenizer: Any,
    max_prompt_tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> DraftRules:
    """Give a text splice the tokenizer's control tokens and the trainer's limit on prompts.

    A `TextSplice` that has a budget keeps it; any other splice is left as it is.

    Args:
        rules: The rules.
        tokenizer: The model's tokenizer.
        max_prompt_tokens: Maximum tokens of a spliced prompt; the trainer would cut the question of
            a longer one. None sets no limit.
        chat_template_kwargs: Passed to the chat template when tokens are counted.

    Returns:
        The rules with that splice.
    """
    splice = rules.splice
    if not isinstance(splice, TextSplice):
        return rules
    budget = splice.budget
    if budget is None and max_prompt_tokens is not None:
        budget = TokenBudget(
            tokenizer,
            max_prompt_tokens=max_prompt_tokens,
            chat_template_kwargs=dict(chat_template_kwargs or {}),
        )
    tokens = {*splice.special_tokens, *marker_tokens(tokenizer)}
    return replace(rules, splice=replace(splice, special_tokens=tokens, budget=budget))
