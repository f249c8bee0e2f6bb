"""Stage 1 of a TRL batch, as values: where drafts are drawn, which is chosen, how it is spliced."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from igrpo_kernels.checks import check_count

from ...drafts.select import (
    SelectedDrafts,
    random_ties,
    select_best_draft,
    select_random_draft,
    select_worst_draft,
    shortest_first,
)
from ...drafts.splice import TextSplice
from ...drafts.text import splice_prompt
from ...rollouts.completions import Completion
from .config import IGRPOConfig


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


class DraftChoice(NamedTuple):
    """What Stage 2 does for each prompt; the same on all ranks.

    Attributes:
        draft: The chosen draft among its prompt's N; -1 where none could be scored. Shape [P].
        best: Score of the best draft, chosen or not; NaN where none could be scored. Shape [P].
        right: Whether the best draft counts as right. Shape [P].
        plain: Whether the prompt stays as it is. Shape [P].
        skipped: Whether the prompt's refinements get no advantage. Shape [P].
    """

    draft: Tensor
    best: Tensor
    right: Tensor
    plain: Tensor
    skipped: Tensor


def choose_drafts(
    scores: Tensor, lengths: Tensor, args: IGRPOConfig, generator: torch.Generator, *, drop: bool
) -> DraftChoice:
    """Choose a draft for every prompt by the rules of the configuration.

    Args:
        scores: Selection score of each draft; NaN could not be scored. Shape [P, N].
        lengths: Tokens of each draft. Shape [P, N].
        args: `draft_choice`, `draft_ties`, `all_drafts_failed`, `success_reward`, `draft_dropout`.
        generator: In the same state on all ranks.
        drop: Whether `draft_dropout` applies.

    Returns:
        The choice, [P] each, on the device of `scores`.
    """
    ties = None
    if args.draft_ties == "shortest":
        ties = shortest_first(lengths)
    elif args.draft_ties == "random":
        ties = _random_ties(scores, generator)
    best = select_best_draft(scores, tie_scores=ties)
    right = best.reward >= args.success_reward
    plain = ~best.found | (args.draft_choice == "none")
    skipped = torch.zeros_like(right)
    if args.all_drafts_failed != "condition":
        plain = plain | ~right
    if args.all_drafts_failed == "skip":
        skipped = ~right
    if drop and args.draft_dropout > 0:
        draws = torch.rand(len(scores), generator=generator)
        plain = plain | (draws < args.draft_dropout).to(scores.device)
    chosen = _chosen(best, scores, ties, args.draft_choice, generator)
    return DraftChoice(chosen.index, best.reward, right, plain, skipped)


def _chosen(
    best: SelectedDrafts,
    scores: Tensor,
    ties: Tensor | None,
    choice: str,
    generator: torch.Generator,
) -> SelectedDrafts:
    if choice == "worst":
        return select_worst_draft(scores, tie_scores=ties)
    if choice == "random":
        return select_random_draft(scores, tie_scores=_random_ties(scores, generator))
    return best


def _random_ties(scores: Tensor, generator: torch.Generator) -> Tensor:
    seeds = torch.randint(2**62, (len(scores),), generator=generator).tolist()
    return random_ties(scores.shape[1], seeds=seeds).to(scores.device)


class Refined(NamedTuple):
    """The Stage-2 prompt of one row.

    Attributes:
        prompt: The prompt, of the type of the original one.
        draft: The draft as it stands in it; None where the prompt stayed plain.
        draft_ids: The whole draft as it was sampled; None likewise.
        length: Tokens of the draft as it stands in the prompt.
        cut: Tokens that were cut off the draft for length.
    """

    prompt: Any
    draft: str | None = None
    draft_ids: list[int] | None = None
    length: int = 0
    cut: int = 0


def splice_or_leave(
    prompt: Any, draft_ids: list[int], splice: TextSplice, tokenizer: Any
) -> Refined:
    """Splice a draft into a prompt; leave the prompt plain where nothing of the draft would stand.

    Nothing stands where stripping the thinking leaves nothing, and where the question fills
    `max_prompt_tokens` by itself: the question is never cut, and no error ends a run for it.

    Args:
        prompt: A string or chat messages.
        draft_ids: The draft's token ids as sampled.
        splice: Template, thinking, special tokens and budget.
        tokenizer: What turns the draft into text.

    Returns:
        The prompt of Stage 2.
    """
    text = tokenizer.decode(draft_ids, skip_special_tokens=True)
    budget = splice.budget
    if budget is not None and budget.max_prompt_tokens is not None:
        bare = splice_prompt(prompt, "", template=splice.template)
        if len(budget.encode_prompt(bare)) >= budget.max_prompt_tokens:
            return Refined(prompt, cut=len(draft_ids))
    spliced = splice(prompt, Completion(draft_ids, text))
    if not spliced.draft.strip():
        return Refined(prompt, cut=spliced.tokens_cut)
    length = len(tokenizer(spliced.draft, add_special_tokens=False)["input_ids"])
    return Refined(spliced.prompt, spliced.draft, draft_ids, length, spliced.tokens_cut)
