"""The arguments of a two-stage rollout, checked before anything is drawn."""

import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from igrpo_kernels.checks import check_callable, check_count, describe

from ..drafts.rules import DraftRules
from ..drafts.splice import TextSplice
from ..prompts import Prompt, check_prompts
from ..seeds import derive_seed
from .completions import Completion
from .journal import Header
from .progress import StageFinished, StageStarted
from .sampling import AnySampler, check_sampler
from .scoring import Reward, Scorer

OnProgress = Callable[[StageStarted | StageFinished], None]


@dataclass(eq=False)
class Setup:
    """What a rollout is asked to do; `two_stage_rollout` says what each field means."""

    prompts: Sequence[Prompt]
    sampler: AnySampler
    reward: Reward
    num_drafts: int
    num_refinements: int
    rounds: int
    columns: Mapping[str, Sequence[Any]] | None
    rules: DraftRules
    seed: int | None
    on_progress: OnProgress | None

    def __post_init__(self) -> None:
        check_sampler(self.sampler)
        if not isinstance(self.rules, DraftRules):
            raise TypeError(f"rules must be DraftRules, got {describe(self.rules)}")
        if self.on_progress is not None:
            check_callable("on_progress", self.on_progress)
        if self.seed is not None:
            check_count("seed", self.seed, at_least=0)
        self.prompts = check_prompts(self.prompts)
        check_count("num_drafts", self.num_drafts, at_least=0)
        check_count("num_refinements", self.num_refinements)
        check_count("rounds", self.rounds)
        self.rules = _clean_control_tokens(self.rules, self.sampler)
        if self.num_drafts or self.rounds > 1:
            for index, prompt in enumerate(self.prompts):
                with located(f"prompts[{index}], before sampling"):
                    self.rules.splice(prompt, Completion([], ""))
        if not isinstance(self.columns, Mapping | None):
            raise TypeError(f"columns must be a dict of lists, got {describe(self.columns)}")
        columns, ranking = self.columns or {}, self.rules.selection_score
        self._reward = Scorer(self.reward, self.prompts, columns)
        self._ranking = ranking and Scorer(ranking, self.prompts, columns, "selection_score")
        self._rules_seed = secrets.randbits(63) if self.seed is None else self.seed
        self._began = time.monotonic()

    @property
    def header(self) -> Header:
        """Say which rollout this is, for its journal."""
        sizes = self.num_drafts, self.num_refinements, self.rounds
        return Header.of(self.prompts, *sizes, self.seed)

    def size(self, number: int) -> int:
        """Count the completions of a stage."""
        return self.num_refinements if number else self.num_drafts

    def sampling_seed(self, index: int, number: int) -> int | None:
        """Return the seed by which a prompt's stage is sampled."""
        return None if self.seed is None else derive_seed(self.seed, index, number)

    def rules_seed(self, index: int, number: int) -> int:
        """Return the seed by which a prompt's draft is chosen for a stage."""
        return derive_seed(self._rules_seed, index, number, 0)

    async def score(
        self, drawn: Mapping[int, Sequence[Completion]]
    ) -> dict[int, tuple[list[float], list[float]]]:
        """Score each prompt's completions: their rewards, and what ranks them as drafts."""
        rewards = await self._reward.score(drawn)
        ranks = rewards if self._ranking is None else await self._ranking.score(drawn)
        return {index: (rewards[index], ranks[index]) for index in drawn}

    def clock(self) -> float:
        """Count the seconds since the rollout began."""
        return time.monotonic() - self._began

    def report_start(self, index: int, number: int) -> float:
        """Report that sampling begins, and say when that is."""
        now = self.clock()
        if self.on_progress is not None:
            self.on_progress(StageStarted(index, number, now))
        return now


@contextmanager
def located(where: str) -> Iterator[None]:
    """Add to an error where it happened."""
    try:
        yield
    except Exception as error:
        error.add_note(f"at {where}")
        raise


def _clean_control_tokens(rules: DraftRules, sampler: AnySampler) -> DraftRules:
    """Remove from spliced drafts what would end a turn in this sampler's prompts."""
    tokens: frozenset[str] = getattr(sampler, "control_tokens", frozenset())
    if not tokens or not isinstance(rules.splice, TextSplice):
        return rules
    splice = replace(rules.splice, special_tokens={*rules.splice.special_tokens, *tokens})
    return replace(rules, splice=splice)
