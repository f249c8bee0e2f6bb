"""The stages of a batch as values: what TRL is to draw, and what it drew."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...drafts.rules import DraftChoices
from ...prompts import Prompt
from ...rollouts.completions import Completion


class Refined(NamedTuple):
    """The Stage-2 prompt of one row.

    Attributes:
        prompt: The prompt, of the type of the original one.
        draft: The draft as it stands in it; empty where the prompt stayed plain.
        length: Tokens of the draft as it stands in the prompt.
        cut: Tokens that were cut off the draft for length.
    """

    prompt: Prompt
    draft: str = ""
    length: int = 0
    cut: int = 0


class Sampled(NamedTuple):
    """What a sampler drew for the rows of this rank, and how it was scored.

    Attributes:
        prompt_ids: What it was drawn from.
        completions: One per row.
        rewards_per_func: Reward of each by each reward function. Shape [rows, K].
        extra: What reward functions logged with `log_extra`, one value per row.
    """

    prompt_ids: list[list[int]]
    completions: list[Completion]
    rewards_per_func: Tensor
    extra: dict[str, list[Any]]


@dataclass
class Stage:
    """One call of TRL's generation and scoring: what it is given, and what came of it.

    Attributes:
        group: Completions of each prompt.
        prompts: What this rank's rows are drawn from, in place of the data set's prompts; None:
            from those.
        drafts: The draft in each row's prompt, for the table of completions; None: no column.
        sampled: What a sampler has drawn and scored already; None: TRL draws and scores.
        completions: What was drawn, as rewards see it.
        completion_ids: What was drawn, as tokens.
        rewards_per_func: Of all ranks, NaN where a reward function had none. Shape [rows, K].
    """

    group: int
    prompts: list[Prompt] | None = None
    drafts: list[str | None] | None = None
    sampled: "Sampled | None" = None
    completions: list[Any] = field(default_factory=list)
    completion_ids: list[list[int]] = field(default_factory=list)
    rewards_per_func: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    @classmethod
    def of_refined(
        cls, group: int, rows: Sequence[Refined], sampled: "Sampled | None" = None
    ) -> "Stage":
        """Make Stage 2 of the prompts of its rows."""
        return cls(
            group, [row.prompt for row in rows], [row.draft or None for row in rows], sampled
        )


class Drafts(NamedTuple):
    """What Stage 1 drew.

    Attributes:
        rewards: The training reward of each draft, NaN where it has none. Shape [P, N].
        batch: TRL's rows for the loss, where drafts are trained too.
    """

    rewards: Tensor
    batch: dict[str, Any] | None


class Round(NamedTuple):
    """One round of Stage 2, not yet run by TRL.

    Attributes:
        drafts: What Stage 1 drew; the same in each round.
        choices: The chosen completions: drafts, and refinements of the rounds before.
        refined: The Stage-2 prompt of each row on this rank.
        stage: What TRL is to run.
    """

    drafts: Drafts
    choices: DraftChoices
    refined: list[Refined]
    stage: Stage
