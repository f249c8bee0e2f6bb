"""One prompt on its way through the stages: what to draw next, and the results so far.

Nothing here samples, scores or waits: `in_step` and `streamed` do, which ask for the next prompt
and hand back its completions.
"""

import math

import torch

from ..prompts import Prompt, copy_prompt
from .completions import Completion
from .progress import StageFinished
from .records import DraftChoice, Rollout, Stage
from .sampling import encode
from .setup import Setup

SKIPPED = Completion([], "", [], "skipped")


class OnePrompt:
    """The stages of one prompt, as far as they have come."""

    def __init__(self, setup: Setup, index: int) -> None:
        self.setup = setup
        self.index = index
        self.prompt = setup.prompts[index]
        self.prompt_ids = encode(setup.sampler, self.prompt)
        self.stages: list[Stage] = []
        self.choices: list[DraftChoice] = []
        self._ranks: list[float] = []

    @property
    def number(self) -> int:
        """Number of the stage that comes next: 0 for drafts."""
        return len(self.stages)

    @property
    def rollout(self) -> Rollout:
        """All that happened to the prompt."""
        drafts, *refinements = self.stages
        return Rollout(self.index, drafts, self.choices, refinements)

    def next_prompt(self) -> Prompt | None:
        """Return what the next stage is drawn from; None passes over a stage that draws nothing."""
        self._drawn_from = self.prompt, self.prompt_ids
        n = self.setup.size(self.number)
        if self.number:
            self.choices.append(self._choose())
        if n and not (self.choices and self.choices[-1].skipped):
            prompt, ids = self._drawn_from
            return copy_prompt(prompt if ids is None else ids)
        now = self.setup.clock()
        self.finish_stage([SKIPPED] * n, [math.nan] * n, [math.nan] * n, now, now)
        return None

    def finish_stage(
        self,
        completions: list[Completion],
        rewards: list[float],
        ranks: list[float],
        started: float,
        ended: float,
    ) -> None:
        """Take the completions of the stage, with their rewards and what ranks them."""
        prompt, ids = self._drawn_from
        stage = Stage(prompt, completions, rewards, ids, started, ended)
        number = self.number
        self.stages.append(stage)
        self._ranks += ranks
        if self.setup.on_progress is not None:
            last = number == self.setup.rounds
            self.setup.on_progress(StageFinished(self.index, number, stage, last))

    def _choose(self) -> DraftChoice:
        """Choose among the completions so far, and splice the choice into the prompt."""
        pool = [completion for stage in self.stages for completion in stage.completions]
        if not pool:
            return DraftChoice(-1, math.nan)
        rules = self.setup.rules
        rewards = [reward for stage in self.stages for reward in stage.rewards]
        choices = rules.choose(
            torch.tensor([rewards], dtype=torch.float64),
            scores=torch.tensor([self._ranks], dtype=torch.float64),
            lengths=torch.tensor([[length for stage in self.stages for length in stage.lengths]]),
            seeds=[self.setup.rules_seed(self.index, self.number)],
        )
        index, _, failed, dropped, skipped, plain = (field.tolist()[0] for field in choices)
        reward = rewards[index] if index >= 0 else math.nan
        if plain:
            return DraftChoice(index, reward, "", 0, failed, dropped, skipped)
        prompt, draft, cut = rules.condition(self.prompt, pool[index])
        if draft:
            self._drawn_from = prompt, encode(self.setup.sampler, prompt)
        return DraftChoice(index, reward, draft, cut, failed)
