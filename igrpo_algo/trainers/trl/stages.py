"""The stages of a batch as values: who draws which draft, what TRL is to draw, what it drew."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.checks import check_count

from ...drafts.rules import DraftChoices
from ...prompts import Prompt
from ...rollouts.completions import Completion


@dataclass(frozen=True)
class DraftLayout:
    """Which rank draws which draft, where the groups of a batch may straddle ranks.

    TRL deals the prompt-major rows of a batch to ranks in equal runs: rank k holds the refinements
    [k * rows, (k + 1) * rows). Drafts are dealt the same way, so rank k draws the drafts
    [k * drafts, (k + 1) * drafts) of P * N, and they belong to the very prompts of its rows:
    nothing but the chosen drafts has to travel.

    Attributes:
        rows: Refinements on this rank.
        rank: Index of this rank.
        num_drafts: N.
        num_refinements: G.

    Raises:
        ValueError: The drafts cannot be dealt in equal runs.

    Examples:
        >>> layout = DraftLayout(rows=2, rank=1, num_drafts=4, num_refinements=4)
        >>> layout.row_prompts, layout.draft_rows, layout.drafts
        ([0, 0], [0, 0], range(2, 4))
    """

    rows: int
    rank: int
    num_drafts: int
    num_refinements: int

    def __post_init__(self) -> None:
        check_count("rows", self.rows)
        if self.rows * self.num_drafts % self.num_refinements:
            raise ValueError(
                "rows * num_drafts / num_refinements must be a whole number of drafts on each "
                f"rank, got {self.rows} * {self.num_drafts} / {self.num_refinements}"
            )

    @property
    def row_prompts(self) -> list[int]:
        """Index of the prompt, among those of all ranks, that each row on this rank belongs to."""
        first = self.rank * self.rows
        return [row // self.num_refinements for row in range(first, first + self.rows)]

    @property
    def drafts(self) -> range:
        """Drafts on this rank, by index among those of all ranks."""
        count = self.rows * self.num_drafts // self.num_refinements
        return range(self.rank * count, (self.rank + 1) * count)

    @property
    def draft_rows(self) -> list[int]:
        """For each draft on this rank, a row on this rank that holds its prompt."""
        first_row = {prompt: row for row, prompt in reversed([*enumerate(self.row_prompts)])}
        return [first_row[draft // self.num_drafts] for draft in self.drafts]

    def chosen_here(self, choices: DraftChoices) -> dict[int, int]:
        """Find the chosen drafts of this rank: from their prompt to their place in `drafts`."""
        places = {}
        for prompt, (index, plain) in enumerate(
            zip(choices.index.tolist(), choices.plain.tolist(), strict=True)
        ):
            draft = prompt * self.num_drafts + index
            if not plain and draft in self.drafts:
                places[prompt] = draft - self.drafts.start
        return places


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
        prompts: What this rank's rows are drawn from, in the place of the data set's prompts; None:
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


class TwoStages(NamedTuple):
    """Both stages of a batch, Stage 2 not yet run by TRL.

    Attributes:
        drafts: What Stage 1 drew.
        choices: The chosen drafts.
        refined: The Stage-2 prompt of each row on this rank.
        stage: Stage 2.
    """

    drafts: "Drafts"
    choices: DraftChoices
    refined: list[Refined]
    stage: Stage


class Drafts(NamedTuple):
    """What Stage 1 drew.

    Attributes:
        completions: The drafts of this rank.
        lengths: Tokens of each draft, those of all ranks. Shape [P, N].
        rewards: The training reward of each, NaN where it has none. Shape [P, N].
        scores: What ranks them in its place, or None. Shape [P, N].
        batch: TRL's rows for the loss, where drafts are trained too.
    """

    completions: Sequence[Completion]
    lengths: Tensor
    rewards: Tensor
    scores: Tensor | None
    batch: dict[str, Any] | None
