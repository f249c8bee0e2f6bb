"""Which draft goes into the Stage-2 prompt: a function from rewards [P, N] to an index [P].

d* = argmax_i R(d_i)   (iGRPO, Hatamizadeh et al. 2026, arXiv:2602.09000, equation 2)

The paper does not say what happens to ties and to drafts that could not be scored: here each is an
argument or a documented rule. The best draft is the method; the worst, a random one and the
best wrong one are its controls.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

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


class SelectedDrafts(NamedTuple):
    """One draft for each prompt.

    Attributes:
        index: Position of the draft among its prompt's N; -1 where none was scored. Shape [P].
        reward: Its reward; NaN where none was scored. Shape [P].
        found: Whether any draft of the prompt was scored. Shape [P].
    """

    index: Tensor  # type: ignore[assignment]  # the field takes the place of tuple.index
    reward: Tensor
    found: Tensor


def select_best_draft(rewards: Tensor, *, tie_scores: Tensor | None = None) -> SelectedDrafts:
    """Choose each prompt's draft of highest reward.

    index[p] = argmax_n rewards[p, n]

    Order: highest reward, then highest tie score, then lowest index. A reward of NaN means that the
    draft could not be scored, and it is never chosen; +inf and -inf are rewards like any other.
    Nothing is special about drafts that all failed: equal rewards are a tie, whatever their value.
    A tie score of NaN ranks with -inf. iGRPO: arXiv:2602.09000, equation 2; the order of ties is
    ours.

    Args:
        rewards: Reward of each draft; floating point, since the result may hold NaN. Shape [P, N].
        tie_scores: Ranks drafts of equal reward: `shortest_first(lengths)`, `random_ties(...)` or
            any scores of your own, integer or floating point. Shape [P, N].

    Returns:
        `index` [P] int64, `reward` [P] of the dtype of `rewards` and detached, `found` [P] bool. A
        row of NaN gives -1, NaN, False. P = 0 gives empty tensors. Nothing waits for the device.

    Raises:
        TypeError: `rewards` is not floating point, or `tie_scores` is not a tensor of real numbers.
        ValueError: The shapes are not [P, N], or N is 0.

    Examples:
        >>> select_best_draft(torch.tensor([[0.0, 1.0, 1.0], [math.nan, -2.0, -3.0]])).index
        tensor([1, 1])
    """
    rewards = _check_rewards(rewards)
    leads = _highest(rewards, ~rewards.isnan())
    if tie_scores is not None:
        if not check_tensor("tie_scores", tie_scores).is_floating_point():
            check_integral("tie_scores", tie_scores)
        check_shape("tie_scores", tie_scores, rewards.shape, "[P, N]")
        leads = _highest(tie_scores.detach(), leads)
    found = leads.any(dim=-1)
    position = torch.arange(rewards.shape[1], device=rewards.device)
    first = torch.where(leads, position, rewards.shape[1] - 1).amin(dim=-1)
    reward = rewards.gather(-1, first.unsqueeze(-1)).squeeze(-1)
    return SelectedDrafts(
        torch.where(found, first, -1), torch.where(found, reward, math.nan), found
    )


def select_worst_draft(rewards: Tensor, *, tie_scores: Tensor | None = None) -> SelectedDrafts:
    """Choose each prompt's draft of lowest reward: a control for `select_best_draft`.

    index[p] = argmin_n rewards[p, n]

    Ties and NaN are as in `select_best_draft`: of equal rewards, the highest tie score wins here
    too.

    Args:
        rewards: Reward of each draft; NaN could not be scored, never chosen. Shape [P, N].
        tie_scores: Ranks drafts of equal reward. Shape [P, N].

    Returns:
        As `select_best_draft`, with the chosen draft's own reward.

    Raises:
        TypeError: `rewards` is not floating point, or `tie_scores` is not a tensor of real numbers.
        ValueError: The shapes are not [P, N], or N is 0.

    Examples:
        >>> select_worst_draft(torch.tensor([[0.0, 1.0, math.nan]])).index
        tensor([0])
    """
    best = select_best_draft(-_check_rewards(rewards), tie_scores=tie_scores)
    return best._replace(reward=-best.reward)


def select_best_wrong_draft(
    rewards: Tensor, *, tie_scores: Tensor | None = None, success_reward: float = 1.0
) -> SelectedDrafts:
    """Choose each prompt's best wrong draft: a near miss, never the answer.

    index[p] = argmax_n { rewards[p, n] : rewards[p, n] < success_reward }

    A prompt whose scored drafts are all right has none: its index is -1, as if none were scored, so
    that `when_unscored` of `DraftRules` says what Stage 2 sees (by default the plain prompt).

    Args:
        rewards: Reward of each draft; NaN could not be scored, never chosen. Shape [P, N].
        tie_scores: Ranks drafts of equal reward. Shape [P, N].
        success_reward: A draft of at least this reward is right. Elsewhere than at 1, give
            `functools.partial(select_best_wrong_draft, success_reward=...)` to `DraftRules`.

    Returns:
        As `select_best_draft`.

    Raises:
        TypeError: `rewards` is not floating point, `tie_scores` is not a tensor of real numbers, or
            `success_reward` is not a number.
        ValueError: The shapes are not [P, N], or N is 0.

    Examples:
        >>> select_best_wrong_draft(torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]])).index
        tensor([ 2, -1])
    """
    check_number("success_reward", success_reward)
    rewards = _check_rewards(rewards)
    wrong = rewards.masked_fill(rewards >= success_reward, math.nan)
    return select_best_draft(wrong, tie_scores=tie_scores)


def select_random_draft(rewards: Tensor, *, tie_scores: Tensor | None = None) -> SelectedDrafts:
    """Choose one of each prompt's scored drafts at random: a control for `select_best_draft`.

    index[p] ~ uniform over the n whose rewards[p, n] is not NaN

    All scored drafts tie, whatever their reward, and the tie scores decide: with `random_ties`
    that is a uniform choice, the same on every device.

    Args:
        rewards: Reward of each draft; NaN could not be scored, never chosen. Shape [P, N].
        tie_scores: The source of randomness, as `random_ties` makes it; must be given. It is a
            keyword with a default because every `select` of `DraftRules` has this signature. Shape
            [P, N].

    Returns:
        As `select_best_draft`, with the chosen draft's own reward.

    Raises:
        TypeError: `rewards` is not floating point, or `tie_scores` is not a tensor of real numbers.
        ValueError: The shapes are not [P, N], N is 0, or `tie_scores` is None.

    Examples:
        >>> rewards = torch.tensor([[0.0, torch.nan], [torch.nan, 1.0]])
        >>> select_random_draft(rewards, tie_scores=random_ties(2, seeds=[0, 1])).index
        tensor([0, 1])
    """
    rewards = _check_rewards(rewards)
    if tie_scores is None:
        raise ValueError(
            "tie_scores must be given: random_ties(...), or ties=Ties.RANDOM in DraftRules"
        )
    equal = torch.where(rewards.isnan(), rewards, 0.0)
    chosen = select_best_draft(equal, tie_scores=tie_scores)
    reward = rewards.gather(-1, chosen.index.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return chosen._replace(reward=reward)


def shortest_first(lengths: Tensor) -> Tensor:
    """Make tie scores that prefer the shorter draft: -lengths.

    Args:
        lengths: Tokens of each draft, integers. Shape [P, N].

    Returns:
        Tie scores for `select_best_draft` in int64. Shape [P, N].

    Raises:
        TypeError: `lengths` is not an integer tensor.

    Examples:
        >>> lengths = torch.tensor([[30, 20, 20]])
        >>> select_best_draft(torch.ones(1, 3), tie_scores=shortest_first(lengths)).index
        tensor([1])
    """
    return -check_integral("lengths", lengths).to(torch.int64)


def random_ties(num_drafts: int, *, seeds: Sequence[int]) -> Tensor:
    """Make random tie scores: uniform in [0, 1), each prompt's from its own seed.

    Args:
        num_drafts: N.
        seeds: P seeds, one for each prompt, so that its scores do not depend on its neighbors.

    Returns:
        Tie scores for `select_best_draft` in float32, on the CPU. Shape [P, N].

    Raises:
        TypeError: `num_drafts` is not an int, or `seeds` is not a list of ints.
        ValueError: `num_drafts` is below 1, or a seed is not in [0, 2^63).

    Examples:
        >>> random_ties(3, seeds=[7, 8]).shape
        torch.Size([2, 3])
    """
    check_count("num_drafts", num_drafts)
    draws = torch.empty(len(check_list("seeds", seeds)), num_drafts, dtype=torch.float32)
    for row, seed in zip(draws, seeds, strict=True):
        check_count("each of seeds", seed, at_least=0)
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return draws


def _check_rewards(rewards: Tensor) -> Tensor:
    check_rank("rewards", check_floating("rewards", rewards), 2, "[P, N]")
    if rewards.shape[1] == 0:
        raise ValueError(f"rewards must hold at least one draft, got shape {list(rewards.shape)}")
    return rewards.detach()


def _highest(values: Tensor, among: Tensor) -> Tensor:
    """Mark those of the entries `among` whose value is the highest in its row; NaN ranks lowest."""
    lowest = -math.inf if values.is_floating_point() else torch.iinfo(values.dtype).min
    ranked = values.masked_fill(values.isnan() | ~among, lowest)
    return among & (ranked == ranked.amax(dim=-1, keepdim=True))
