"""Which draft the refinements of a prompt see: one frozen value for every trainer and command.

d* = select(R(d_1), ..., R(d_N)),  q' = splice(q, d*)   (iGRPO, arXiv:2602.09000, equations 2 and 3)

`DraftRules.choose` makes the choice from rewards [P, N] alone; `DraftRules.condition` makes the
prompt. What the paper leaves open (ties, failures, drafts without a score) is a field.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_count,
    check_floating,
    check_integral,
    check_list,
    check_number,
    check_rank,
    check_shape,
    check_tensor,
)

from ..fields import check_fields
from ..prompts import Prompt
from .select import SelectedDrafts, random_ties, select_best_draft, shortest_first
from .splice import DEFAULT_SPLICE, Draft, Splice, Spliced


class Select(Protocol):
    """A choice of one draft for each prompt: `select_best_draft`, a control, or your own."""

    def __call__(self, rewards: Tensor, *, tie_scores: Tensor | None = None) -> SelectedDrafts:
        """Choose by rewards [P, N], where NaN is never chosen, and by tie scores [P, N]."""
        ...


class Ties(Enum):
    """Which of several drafts of equal reward is chosen.

    Examples:
        >>> for rule in Ties:
        ...     print(f"{rule.name}: {rule.value}")
        FIRST: the one of lowest index
        SHORTEST: the one with the fewest tokens
        RANDOM: any of them
    """

    FIRST = "the one of lowest index"
    SHORTEST = "the one with the fewest tokens"
    RANDOM = "any of them"


class Fallback(Enum):
    """What a prompt's Stage 2 sees where no draft is good enough.

    Examples:
        >>> for rule in Fallback:
        ...     print(f"{rule.name}: {rule.value}")
        CHOSEN_DRAFT: the chosen draft all the same
        PLAIN_PROMPT: the plain prompt
        SKIP: nothing: the prompt is left out of Stage 2
    """

    CHOSEN_DRAFT = "the chosen draft all the same"
    PLAIN_PROMPT = "the plain prompt"
    SKIP = "nothing: the prompt is left out of Stage 2"


class DraftChoices(NamedTuple):
    """What Stage 2 does for each prompt.

    Attributes:
        index: The chosen draft among its prompt's N; -1 where none was scored, or `select` wants
            none. Shape [P], int64.
        reward: Its training reward; NaN where there is none. Shape [P].
        failed: Whether no draft of the prompt reached `failed_below`. Shape [P], bool.
        dropped: Whether draft dropout took the draft away. Shape [P], bool.
        skipped: Whether the prompt is left out of Stage 2. Shape [P], bool.
        plain: Whether Stage 2 does not see the draft: it was dropped, the prompt is skipped, or a
            fallback says so. Shape [P], bool.
    """

    index: Tensor  # type: ignore[assignment]  # the field takes the place of tuple.index
    reward: Tensor
    failed: Tensor
    dropped: Tensor
    skipped: Tensor
    plain: Tensor


@dataclass(frozen=True)
class DraftChoice:
    """Which draft a prompt's refinements were given, and why: the record of one choice.

    Attributes:
        index: The chosen completion among all so far: the N drafts, then the refinements of
            earlier rounds; -1 where none was scored.
        reward: Its reward; NaN where none was scored.
        draft: Its text as it stands in the prompt; empty where the round saw the plain prompt.
        tokens_cut: Tokens of it that were cut off for length.
        failed: No completion so far reached `failed_below`.
        dropped: Draft dropout took the draft away.
        skipped: The prompt was skipped, and the round's completions have no tokens.

    Examples:
        >>> DraftChoice(index=2, reward=1.0, draft="It is 5.").dropped
        False
    """

    index: int
    reward: float
    draft: str = ""
    tokens_cut: int = 0
    failed: bool = False
    dropped: bool = False
    skipped: bool = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_count("index", self.index, at_least=-1)
        check_count("tokens_cut", self.tokens_cut, at_least=0)


@dataclass(frozen=True)
class DraftRules:
    """How a draft is chosen for Stage 2, and how it gets into the prompt.

    The defaults are the paper's: the draft of highest reward, whatever that reward is.

    Attributes:
        select: Chooses by score: `select_best_draft`, or as controls `select_worst_draft`,
            `select_best_wrong_draft` and `select_random_draft` (which needs `ties=Ties.RANDOM`).
        selection_score: A reward function that ranks the drafts in place of the training
            reward; None ranks by the training reward. A draft without a training reward is never
            chosen.
        ties: Which of several drafts of equal score is chosen.
        failed_below: The drafts of a prompt have all failed if none has a training reward of at
            least this, and have solved it if all that were scored do. None: neither is checked.
        when_failed: What Stage 2 sees if all drafts failed. `Fallback.CHOSEN_DRAFT` takes the
            paper literally.
        when_solved: The same if the drafts have solved the prompt.
        when_unscored: The same if no draft could be scored, or `select` wants none and the two
            fields above say nothing else: the plain prompt, or nothing.
        dropout: Probability that Stage 2 sees the plain prompt although there is a draft.
        splice: Puts the draft into the prompt: `TextSplice` (template, thinking stripped or kept,
            token budget), `TokenSplice` for token ids, or a function of prompt and draft.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A number is out of range, or two fields contradict each other.

    Examples:
        >>> rules = DraftRules(failed_below=1.0, when_failed=Fallback.PLAIN_PROMPT)
        >>> choices = rules.choose(torch.tensor([[0.0, 1.0], [0.2, 0.1]]), seeds=[0, 1])
        >>> choices.index, choices.failed, choices.plain
        (tensor([1, 0]), tensor([False,  True]), tensor([False,  True]))
    """

    select: Select = select_best_draft
    selection_score: Callable[..., Any] | None = None
    ties: Ties = Ties.FIRST
    failed_below: float | None = None
    when_failed: Fallback = Fallback.CHOSEN_DRAFT
    when_solved: Fallback = Fallback.CHOSEN_DRAFT
    when_unscored: Fallback = Fallback.PLAIN_PROMPT
    dropout: float = 0.0
    splice: Splice = DEFAULT_SPLICE

    def __post_init__(self) -> None:
        check_fields(self)
        if self.failed_below is not None:
            check_number("failed_below", self.failed_below)
        else:
            for name in ("when_failed", "when_solved"):
                if (rule := getattr(self, name)) is not Fallback.CHOSEN_DRAFT:
                    raise ValueError(f"{name} = {rule} has no effect without failed_below")
        if self.when_unscored is Fallback.CHOSEN_DRAFT:
            raise ValueError("when_unscored must be PLAIN_PROMPT or SKIP: no draft is chosen then")
        check_number("dropout", self.dropout, at_least=0, at_most=1)
        # A selection that cannot work is refused here, not after a stage has been drawn.
        self._select(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2))

    def choose(
        self,
        rewards: Tensor,
        *,
        seeds: Sequence[int],
        scores: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> DraftChoices:
        """Choose a draft for every prompt.

        The same tensors and seeds give the same choices on every rank and device, and a prompt's
        choice does not depend on its neighbors. "Failed" looks at training rewards; `scores` only
        rank.

        Args:
            rewards: Training reward of each draft, NaN where it could not be scored. Floating
                point, shape [P, N].
            seeds: P seeds: the source of random ties, of a random draft and of dropout.
            scores: What `selection_score` gave, NaN where it could not score. Shape [P, N].
            lengths: Tokens of each draft, for `Ties.SHORTEST`. Integers, shape [P, N].

        Returns:
            The choices, on the device of `rewards`.

        Raises:
            TypeError: A tensor has the wrong dtype, or `seeds` is not a list of ints.
            ValueError: Shapes differ, N is 0, a seed is not in [0, 2^63), `scores` or `lengths` are
                missing where the rules need them, or `select` gave an index outside the drafts.
        """
        check_rank("rewards", check_floating("rewards", rewards), 2, "[P, N]")
        rewards = ranks = rewards.detach()
        if scores is not None:
            check_shape("scores", check_floating("scores", scores), rewards.shape, "[P, N]")
            ranks = scores.masked_fill(rewards.isnan(), torch.nan)
        elif self.selection_score is not None:
            raise ValueError("scores must be given: selection_score ranks the drafts")
        if lengths is not None:
            check_shape("lengths", check_integral("lengths", lengths), rewards.shape, "[P, N]")
        if len(check_list("seeds", seeds)) != len(rewards):
            raise ValueError(f"seeds must hold P = {len(rewards)} seeds, got {len(seeds)}")
        draws = random_ties(1 + rewards.shape[1], seeds=seeds).to(rewards.device)
        index = self._select(ranks, lengths, draws[:, 1:])
        found = index >= 0
        reward = rewards.gather(-1, index.clamp(min=0)[:, None])[:, 0].where(found, torch.nan)
        failed = solved = torch.zeros_like(found)
        if self.failed_below is not None:
            failed = ~(rewards >= self.failed_below).any(-1)
            solved = ~failed & ~(rewards < self.failed_below).any(-1)

        all_failed = failed & ~rewards.isnan().all(-1)

        def falls_back_to(rule: Fallback) -> Tensor:
            return all_failed & (self.when_failed is rule) | solved & (self.when_solved is rule)

        skipped, plain = falls_back_to(Fallback.SKIP), falls_back_to(Fallback.PLAIN_PROMPT)
        if self.when_unscored is Fallback.SKIP:
            skipped = skipped | ~(found | plain)
        plain = plain | skipped | ~found
        dropped = ~plain & (draws[:, 0] < self.dropout)
        return DraftChoices(index, reward, failed, dropped, skipped, plain | dropped)

    def condition(self, prompt: Prompt, draft: Draft) -> Spliced:
        """Splice the chosen draft into its prompt; without any draft text left it stays plain.

        Args:
            prompt: The original prompt.
            draft: The chosen draft: its `text` and `token_ids`.

        Returns:
            The Stage-2 prompt, the draft as it reads there (empty where the prompt is plain), and
            the number of its tokens that were cut off.
        """
        spliced = self.splice(prompt, draft)
        return spliced if spliced.draft.strip() else spliced._replace(prompt=prompt, draft="")

    def _select(self, ranks: Tensor, lengths: Tensor | None, draws: Tensor) -> Tensor:
        """Return the index of the chosen draft. Shape [P]."""
        ties = None
        if self.ties is Ties.RANDOM:
            ties = draws
        elif self.ties is Ties.SHORTEST:
            if lengths is None:
                raise ValueError("lengths must be given: Ties.SHORTEST compares them")
            ties = shortest_first(lengths)
        selected = self.select(ranks, tie_scores=ties)
        index = check_tensor("the index that select returns", getattr(selected, "index", None))
        wrong = (index < -1) | (index >= ranks.shape[1])
        if index.shape != ranks.shape[:1] or wrong.any():
            raise ValueError(
                f"select must return one index for each prompt, below N = {ranks.shape[1]} or -1 "
                f"for none, got {index.tolist()}"
            )
        return index
