"""From scored drafts to the prompt of a refinement round: a pure function of values.

select, then the rules for what the paper leaves open (all drafts failed, none scored, draft
dropout), then the splice. Both forms of the rollout call it, so they choose alike.
"""

import inspect
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from igrpo_kernels.checks import check_number, describe

from ..rollouts.completions import Completion
from ..rollouts.records import Choice
from ..rollouts.sampling import Prompt, derive_seed
from .select import BestDraft
from .splice import Splice

_DROPOUT, _SELECT = range(2)

Select = Callable[..., BestDraft]
TieScores = Callable[[Sequence[Completion]], Sequence[float]]


class Fallback(Enum):
    """What a prompt's Stage 2 sees where no draft is good enough.

    Examples:
        >>> [rule.name for rule in Fallback]
        ['BEST_FAILURE', 'PLAIN_PROMPT', 'SKIP']
    """

    BEST_FAILURE = "the chosen draft all the same"
    PLAIN_PROMPT = "the plain prompt"
    SKIP = "nothing: the prompt is skipped"


@dataclass(frozen=True)
class Choosing:
    """The rules by which a round gets its draft; `two_stage_rollout` says what each means."""

    select: Select
    tie_scores: TieScores | None
    failed_below: float | None
    when_failed: Fallback
    when_unscored: Fallback
    splice: Splice
    draft_dropout: float
    seed: int

    def __post_init__(self) -> None:
        if not callable(self.select):
            raise TypeError(f"select must be callable, got {describe(self.select)}")
        if not callable(self.splice):
            raise TypeError(f"splice must be callable, got {describe(self.splice)}")
        for name in ("when_failed", "when_unscored"):
            if not isinstance(getattr(self, name), Fallback):
                raise TypeError(f"{name} must be a Fallback, got {describe(getattr(self, name))}")
        if self.failed_below is not None:
            check_number("failed_below", self.failed_below)
        elif self.when_failed is not Fallback.BEST_FAILURE:
            raise ValueError(f"when_failed = {self.when_failed} has no effect without failed_below")
        if self.when_unscored is Fallback.BEST_FAILURE:
            raise ValueError("when_unscored must be PLAIN_PROMPT or SKIP: there is no best failure")
        check_number("draft_dropout", self.draft_dropout, at_least=0, at_most=1)
        if self.tie_scores is not None and "tie_scores" not in _open_arguments(self.select):
            raise ValueError(f"tie_scores has no effect: select = {self.select!r} takes none")

    def __call__(
        self,
        index: int,
        prompt: Prompt,
        pool: Sequence[Completion],
        rewards: Sequence[float],
        scores: Sequence[float],
    ) -> tuple[Choice, Prompt]:
        """Choose among a prompt's completions so far; give the choice and the next prompt."""
        if not pool:
            return Choice(-1, math.nan), prompt
        chosen = self._chosen(index, pool, scores)
        reward = rewards[chosen] if chosen >= 0 else math.nan
        failed = self.failed_below is not None and not any(r >= self.failed_below for r in rewards)
        rule = self.when_failed if failed else Fallback.BEST_FAILURE
        if chosen < 0:
            rule = self.when_unscored
        if rule is Fallback.SKIP:
            return Choice(chosen, reward, failed=failed, skipped=True), prompt
        if rule is Fallback.PLAIN_PROMPT:
            return Choice(chosen, reward, failed=failed), prompt
        if random.Random(self._seed(index, pool, _DROPOUT)).random() < self.draft_dropout:
            return Choice(chosen, reward, failed=failed, dropped=True), prompt
        spliced = self.splice(prompt, pool[chosen])
        choice = Choice(chosen, reward, spliced.draft, spliced.tokens_cut, failed=failed)
        return choice, spliced.prompt if spliced.draft else prompt

    def _chosen(self, index: int, pool: Sequence[Completion], scores: Sequence[float]) -> int:
        options: dict[str, Any] = {}
        if self.tie_scores is not None:
            ties = list(self.tie_scores(pool))
            if len(ties) != len(pool):
                raise ValueError(
                    f"tie_scores must return one number per draft: {len(ties)} for {len(pool)}"
                )
            options["tie_scores"] = torch.tensor([ties], dtype=torch.float64)
        if "generator" in _open_arguments(self.select):
            seed = self._seed(index, pool, _SELECT)
            options["generator"] = torch.Generator().manual_seed(seed)
        best = self.select(torch.tensor([scores], dtype=torch.float64), **options)
        chosen = int(best.index)
        if not -1 <= chosen < len(pool):
            raise ValueError(
                f"select must return an index below {len(pool)}, or -1 for none, got {chosen}"
            )
        return chosen

    def _seed(self, index: int, pool: Sequence[Completion], purpose: int) -> int:
        # The pool grows by each round, so its size tells the rounds of a prompt apart.
        return derive_seed(self.seed, index, len(pool), purpose)


def _open_arguments(function: Callable[..., Any]) -> set[str]:
    """Name the arguments of a function that a `functools.partial` has not already filled."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.default is None or p.default is p.empty}
