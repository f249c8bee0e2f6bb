"""The record of a two-stage rollout: a `Rollout` for each prompt, `Rollouts` for many.

The `Rollout` of a prompt holds plain values; `Rollouts` gives P of them as tensors [P, N] and
[P, G], prompt-major.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import overload

import torch
from torch import Tensor

from ..drafts.rules import DraftChoice
from ..fields import check_fields
from ..prompts import Prompt, check_entries
from .completions import Completion
from .sampling import Samples


@dataclass(frozen=True)
class Stage:
    """Completions drawn from one prompt, and their scores.

    Attributes:
        prompt: What they were drawn from: q, or q' with a draft in it.
        completions: N drafts or G refinements; those of a skipped prompt have no tokens and the
            finish reason "skipped", so that rows stay aligned.
        rewards: One per completion; NaN where it could not be scored, was cancelled or skipped.
        prompt_ids: The prompt as the sampler's `encode` rendered it, and as it was sampled from;
            None where the sampler has no `encode`.
        started: When sampling began, in seconds since the rollout did; not compared.
        ended: When sampling ended; not compared.

    Raises:
        ValueError: There is not one reward per completion.

    Examples:
        >>> from igrpo_algo import Completion
        >>> Stage("1 + 1?", [Completion([7, 1], "2"), Completion([8], "3")], [1.0, 0.0]).lengths
        [2, 1]
    """

    prompt: Prompt
    completions: list[Completion]
    rewards: list[float]
    prompt_ids: list[int] | None = None
    started: float = field(default=0.0, compare=False)
    ended: float = field(default=0.0, compare=False)

    def __post_init__(self) -> None:
        check_fields(self)
        check_entries("completions", self.completions, (Completion,), "a Completion")
        check_entries("rewards", self.rewards, (int, float), "a number")
        if len(self.rewards) != len(self.completions):
            raise ValueError(
                f"rewards must hold one number per completion: {len(self.rewards)} rewards for "
                f"{len(self.completions)} completions"
            )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each completion."""
        return [len(completion.token_ids) for completion in self.completions]


@dataclass(frozen=True)
class Rollout:
    """The record of one prompt.

    Attributes:
        index: Position of the prompt among those of the rollouts.
        drafts: Stage 1.
        choices: The draft of each refinement round.
        refinements: Stage 2, one per round.

    Raises:
        ValueError: There is not one choice per round.

    Examples:
        >>> from igrpo_algo import Completion
        >>> drafts = Stage("1 + 1?", [Completion([7], "2")], [1.0])
        >>> refinements = Stage("1 + 1? 2", [Completion([7], "2")], [1.0])
        >>> len(Rollout(0, drafts, [DraftChoice(0, 1.0, "2")], [refinements]).stages)
        2
    """

    index: int
    drafts: Stage
    choices: list[DraftChoice]
    refinements: list[Stage]

    def __post_init__(self) -> None:
        check_fields(self)
        check_entries("choices", self.choices, (DraftChoice,), "a DraftChoice")
        check_entries("refinements", self.refinements, (Stage,), "a Stage")
        if len(self.choices) != len(self.refinements):
            raise ValueError(
                f"choices must hold one per round of refinement: {len(self.choices)} choices for "
                f"{len(self.refinements)} rounds"
            )

    @property
    def stages(self) -> list[Stage]:
        """Both stages, in order: the drafts, then each round of refinement."""
        return [self.drafts, *self.refinements]


@dataclass(frozen=True)
class Rollouts:
    """The records of P prompts, prompt-major.

    Tensors are made at each access, on the CPU; keep those that you use in a loop. Refinements
    are those of the last round; `until_round` shows an earlier one.

    Row p * G + g of `refinements.padded()` is element [p, g] of every [P, G] tensor. A skipped
    prompt keeps its G rows: rewards of NaN, and no tokens. `training_batch` makes a batch of them.

    Attributes:
        rollouts: One per prompt, each with the same numbers of drafts and rounds.

    Raises:
        ValueError: They differ in the number of drafts, of rounds or of refinements.

    Examples:
        >>> from igrpo_algo import Completion, two_stage_rollout
        >>> def sampler(prompts, n, seed):
        ...     return [[Completion([i], str(i)) for i in range(n)] for _ in prompts]
        >>> def reward(prompts, completions):
        ...     return [float(c) for c in completions]
        >>> rollouts = two_stage_rollout(["q"], sampler, reward, num_drafts=3, num_refinements=2)
        >>> rollouts.draft_rewards, rollouts.refinement_rewards
        (tensor([[0., 1., 2.]]), tensor([[0., 1.]]))
    """

    rollouts: list[Rollout]

    def __post_init__(self) -> None:
        check_entries("rollouts", self.rollouts, (Rollout,), "a Rollout")
        for what, sizes in {
            "drafts": {len(rollout.drafts.completions) for rollout in self.rollouts},
            "rounds": {len(rollout.refinements) for rollout in self.rollouts},
            "refinements": {
                len(stage.completions) for rollout in self.rollouts for stage in rollout.refinements
            },
        }.items():
            if len(sizes) > 1:
                raise ValueError(f"rollouts must have equally many {what}, got {sorted(sizes)}")

    @classmethod
    def of(cls, rollouts: Iterable[Rollout]) -> "Rollouts":
        """Collect rollouts in whatever order a stream gave them, and sort them by prompt."""
        return cls(sorted(rollouts, key=lambda rollout: rollout.index))

    @classmethod
    def concat(cls, parts: Iterable["Rollouts"]) -> "Rollouts":
        """Join rollouts in the order given; each prompt keeps its `index`."""
        return cls([rollout for part in parts for rollout in part])

    def __len__(self) -> int:
        return len(self.rollouts)

    def __iter__(self) -> Iterator[Rollout]:
        return iter(self.rollouts)

    @overload
    def __getitem__(self, which: int) -> Rollout: ...

    @overload
    def __getitem__(self, which: slice) -> "Rollouts": ...

    def __getitem__(self, which: int | slice) -> "Rollout | Rollouts":
        return Rollouts(self.rollouts[which]) if isinstance(which, slice) else self.rollouts[which]

    def until_round(self, number: int) -> "Rollouts":
        """Show the rollouts as they stood after refinement round `number`, counted from 1.

        Raises:
            ValueError: There is no such round.
        """
        rounds = len(self.rollouts[0].refinements) if self.rollouts else number
        if not 1 <= number <= rounds:
            raise ValueError(f"number must be a round from 1 to {rounds}, got {number}")
        return Rollouts(
            [
                replace(g, choices=g.choices[:number], refinements=g.refinements[:number])
                for g in self.rollouts
            ]
        )

    @property
    def prompts(self) -> list[Prompt]:
        """The P original prompts."""
        return [rollout.drafts.prompt for rollout in self.rollouts]

    @property
    def drafts(self) -> Samples:
        """Stage 1: prompts, completions, and their padded and packed tensors."""
        return _samples([rollout.drafts for rollout in self.rollouts])

    @property
    def refinements(self) -> Samples:
        """Stage 2: spliced prompts, completions, and their tensors; no tokens where skipped."""
        return _samples([rollout.refinements[-1] for rollout in self.rollouts])

    @property
    def draft_rewards(self) -> Tensor:
        """Reward of each draft, NaN where unscored. Shape [P, N], float32."""
        return _table([rollout.drafts.rewards for rollout in self.rollouts], torch.float32)

    @property
    def refinement_rewards(self) -> Tensor:
        """Reward of each refinement, NaN where unscored or skipped. Shape [P, G], float32."""
        rows = [rollout.refinements[-1].rewards for rollout in self.rollouts]
        return _table(rows, torch.float32)

    @property
    def draft_lengths(self) -> Tensor:
        """Tokens of each draft. Shape [P, N], int64."""
        return _table([rollout.drafts.lengths for rollout in self.rollouts], torch.int64)

    @property
    def refinement_lengths(self) -> Tensor:
        """Tokens of each refinement, 0 where skipped. Shape [P, G], int64."""
        rows = [rollout.refinements[-1].lengths for rollout in self.rollouts]
        return _table(rows, torch.int64)

    @property
    def chosen(self) -> Tensor:
        """Index of each prompt's draft; -1 where none was scored. Shape [P], int64."""
        return torch.tensor([choice.index for choice in self._choices], dtype=torch.int64)

    @property
    def found(self) -> Tensor:
        """Whether any draft of the prompt was scored. Shape [P], bool."""
        return self.chosen >= 0

    @property
    def failed(self) -> Tensor:
        """Whether no draft reached `failed_below`. Shape [P], bool."""
        return torch.tensor([choice.failed for choice in self._choices], dtype=torch.bool)

    @property
    def dropped(self) -> Tensor:
        """Whether draft dropout took the draft away. Shape [P], bool."""
        return torch.tensor([choice.dropped for choice in self._choices], dtype=torch.bool)

    @property
    def skipped(self) -> Tensor:
        """Whether the prompt was skipped: no refinement has tokens. Shape [P], bool."""
        return torch.tensor([choice.skipped for choice in self._choices], dtype=torch.bool)

    @property
    def conditioned(self) -> Tensor:
        """Whether the refinements saw a draft. Shape [P], bool."""
        return torch.tensor([choice.draft != "" for choice in self._choices], dtype=torch.bool)

    @property
    def tokens_cut(self) -> Tensor:
        """Draft tokens cut off for length. Shape [P], int64."""
        return torch.tensor([choice.tokens_cut for choice in self._choices], dtype=torch.int64)

    @property
    def cancelled(self) -> Tensor:
        """Drafts that early selection cancelled. Shape [P], int64."""
        counts = [
            sum(draft.finish_reason == "cancelled" for draft in rollout.drafts.completions)
            for rollout in self.rollouts
        ]
        return torch.tensor(counts, dtype=torch.int64)

    @property
    def times(self) -> Tensor:
        """Start and end of each stage in seconds. Shape [P, 1 + rounds, 2], float64."""
        rows = [
            [(stage.started, stage.ended) for stage in rollout.stages] for rollout in self.rollouts
        ]
        return torch.tensor(rows, dtype=torch.float64) if rows else torch.zeros(0, 0, 2).double()

    @property
    def _choices(self) -> list[DraftChoice]:
        return [rollout.choices[-1] for rollout in self.rollouts]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file. See `save_rollouts`."""
        from .rollouts_file import save_rollouts  # which needs the classes of this file

        save_rollouts(self.rollouts, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Rollouts":
        """Read what `save` wrote; a ValueError names what is wrong. See `load_rollouts`."""
        from .rollouts_file import load_rollouts

        return load_rollouts(path)


def _samples(stages: list[Stage]) -> Samples:
    return Samples(
        [stage.prompt for stage in stages],
        [stage.completions for stage in stages],
        [stage.prompt_ids for stage in stages],
    )


def _table(rows: list[list[float]] | list[list[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), len(rows[0]) if rows else 0)
