"""Where drafts are drawn when a group's rows straddle ranks."""

from dataclasses import dataclass

from igrpo_kernels.checks import check_count

from ..drafts.rules import DraftChoices


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
        return [row // self.num_refinements for row in self.refinements]

    @property
    def drafts(self) -> range:
        """Drafts on this rank, by index among those of all ranks."""
        count = self.rows * self.num_drafts // self.num_refinements
        return range(self.rank * count, (self.rank + 1) * count)

    @property
    def refinements(self) -> range:
        """Refinements on this rank, by index among those of all ranks."""
        return range(self.rank * self.rows, (self.rank + 1) * self.rows)

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
