"""One prompt on its way through the stages: what to draw next, and what came of it.

A `Course` neither samples nor waits for a slot. Whoever drives it (all prompts in step, or each on
its own) asks it for the next prompt and tells it the completions.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..drafts.rules import DraftRules
from .completions import Completion
from .journal import Header
from .records import Choice, Group, Stage
from .sampling import AnySampler, Prompt, derive_seed
from .scoring import Scorer

SKIPPED = Completion([], "", [], "skipped")


@dataclass(frozen=True)
class StageStarted:
    """Sampling of a prompt's stage began.

    Attributes:
        index: Position of the prompt.
        number: 0 for drafts, 1 and up for the rounds of refinement.
        time: Seconds since the rollout began.
    """

    index: int
    number: int
    time: float


@dataclass(frozen=True)
class StageFinished:
    """A prompt's stage was sampled and scored, or passed over (its completions have no tokens).

    Attributes:
        index: Position of the prompt.
        number: 0 for drafts, 1 and up for the rounds of refinement.
        stage: The stage, with completions, rewards and times.
        last: Whether the prompt is done with it.
    """

    index: int
    number: int
    stage: Stage
    last: bool


OnProgress = Callable[[StageStarted | StageFinished], None]


@dataclass(frozen=True)
class Plan:
    """A rollout's arguments, checked; `two_stage_rollout` says what each means."""

    prompts: list[Prompt]
    sampler: AnySampler
    num_drafts: int
    num_refinements: int
    rounds: int
    score: Scorer
    selection_score: Scorer | None
    rules: DraftRules
    seed: int | None
    rules_seed: int
    on_progress: OnProgress | None
    began: float = field(default_factory=time.monotonic)

    @property
    def header(self) -> Header:
        """Say which rollout this is, for its journal."""
        return Header.of(
            self.prompts, self.num_drafts, self.num_refinements, self.rounds, self.seed
        )

    def size(self, number: int) -> int:
        """Count the completions of a stage."""
        return self.num_refinements if number else self.num_drafts

    def seed_of(self, index: int, number: int) -> int | None:
        """Give the seed of a prompt's stage."""
        return None if self.seed is None else derive_seed(self.seed, index, number)

    def clock(self) -> float:
        """Count the seconds since the rollout began."""
        return time.monotonic() - self.began

    def start(self, index: int, number: int) -> float:
        """Report that sampling begins, and say when that is."""
        now = self.clock()
        if self.on_progress is not None:
            self.on_progress(StageStarted(index, number, now))
        return now


class Course:
    """The stages of one prompt, as far as they have come."""

    def __init__(self, plan: Plan, index: int) -> None:
        self.plan = plan
        self.index = index
        self.prompt = plan.prompts[index]
        self.stages: list[Stage] = []
        self.choices: list[Choice] = []
        self._scores: list[float] = []

    @property
    def number(self) -> int:
        """Number of the stage that comes next: 0 for drafts."""
        return len(self.stages)

    def ask(self) -> Prompt | None:
        """Give the prompt to draw the next stage from; None passes over a stage without draws."""
        prompt, n = self.prompt, self.plan.size(self.number)
        draws = n > 0
        if self.number:
            pool = [completion for stage in self.stages for completion in stage.completions]
            rewards = [reward for stage in self.stages for reward in stage.rewards]
            choice, prompt = self._choose(pool, rewards)
            self.choices.append(choice)
            draws = draws and not choice.skipped
        if draws:
            self._asked = prompt
            return prompt
        now = self.plan.clock()
        self._scores += [math.nan] * n
        self._finish(Stage(prompt, [SKIPPED] * n, [math.nan] * n, now, now))
        return None

    def _choose(self, pool: list[Completion], rewards: list[float]) -> tuple[Choice, Prompt]:
        """Choose among the completions so far; give the choice and the next prompt."""
        if not pool:
            return Choice(-1, math.nan), self.prompt
        rules = self.plan.rules
        chosen = rules.choose(
            torch.tensor([rewards], dtype=torch.float64),
            scores=torch.tensor([self._scores], dtype=torch.float64),
            lengths=torch.tensor([[len(completion.token_ids) for completion in pool]]),
            seeds=[derive_seed(self.plan.rules_seed, self.index, self.number)],
        )
        index, reward, failed, dropped, skipped, plain = (field.tolist()[0] for field in chosen)
        if index < 0:
            reward = math.nan  # the one object of it, so that choices compare equal
        if plain:
            return Choice(index, reward, "", 0, failed, dropped, skipped), self.prompt
        prompt, draft, cut = rules.condition(self.prompt, pool[index])
        return Choice(index, reward, draft, cut, failed), prompt

    async def tell(
        self,
        completions: list[Completion],
        started: float,
        ended: float,
        rewards: list[float] | None = None,
    ) -> None:
        """Take the completions of the stage that was asked for, score them unless they are."""
        if rewards is None:
            rewards = await self.plan.score(self.index, completions)
        ranking = self.plan.selection_score
        self._scores += rewards if ranking is None else await ranking(self.index, completions)
        self._finish(Stage(self._asked, completions, rewards, started, ended))

    def _finish(self, stage: Stage) -> None:
        number = self.number
        self.stages.append(stage)
        if self.plan.on_progress is not None:
            event = StageFinished(self.index, number, stage, last=number == self.plan.rounds)
            self.plan.on_progress(event)

    @property
    def group(self) -> Group:
        """All that happened to the prompt."""
        drafts, *refinements = self.stages
        return Group(self.index, drafts, self.choices, refinements)
