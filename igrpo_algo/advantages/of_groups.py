"""Advantages within a group of samples of one prompt: how much better than its peers each did.

Every function takes rewards in one of two layouts, rows [P, G] or flat [B] with `groups` (G for
consecutive blocks, or one integer id per reward, in any order and of groups of any sizes), and
gives one advantage per reward in the same shape. Conventions that hold for all of them:

- NaN is an unscored reward: left out of its group's statistics, advantage 0.
- A group with one scored reward, or with equal ones, gets 0 throughout, for `eps=0` too.
- Arithmetic and result are in float32, or float64 where rewards are; integers and bools convert.
- No gradient flows. An infinite reward is not caught: its group comes out infinite or NaN. The
  square of a reward beyond 1e19 is infinite in float32: give such rewards in float64.

Each published variant is a function, and they compose. Baselines other than the group's own mean
are in `baselines.py`; `presets.py` has the functions and constants of other trainers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_list,
    check_number,
    check_rank,
    check_shape,
    check_tensor,
    describe,
    require,
)

from .moments import GroupedRewards, check_ddof, divide, to_scores, weighted_moments


def center_by_group(rewards: Tensor, groups: int | Tensor | None = None) -> Tensor:
    """Subtract from each reward the mean of its group.

    A_i = r_i - mean(r)

    The mean is over the group's scored rewards, the reward itself among them. A group of one gets
    0. Dr. GRPO: Liu et al. 2025, arXiv:2503.20783.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: `rewards` is not a tensor of real numbers, or `groups` neither an int nor an
            integer tensor.
        ValueError: `rewards` and `groups` do not fit each other.

    Examples:
        >>> center_by_group(torch.tensor([[1.0, 0.0, 0.0, float("nan"), 1.0]]))
        tensor([[ 0.5000, -0.5000, -0.5000,  0.0000,  0.5000]])
        >>> center_by_group(torch.tensor([1, 5, 0]), groups=torch.tensor([7, 3, 7]))
        tensor([ 0.5000,  0.0000, -0.5000])
    """
    grouped = GroupedRewards.of(rewards, groups)
    return grouped.restore(grouped.centered())


def standardize_by_group(
    rewards: Tensor,
    groups: int | Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Subtract the mean of each group, and divide by its standard deviation.

    A_i = (r_i - mean(r)) / (std(r) + eps),    std^2 = sum_i (r_i - mean)^2 / (n - ddof)

    n counts the group's scored rewards. Where std is 0 (equal rewards, a group of one) A is 0,
    whatever eps. iGRPO: Hatamizadeh et al. 2026, arXiv:2602.09000, equation 4, which leaves ddof
    and eps open; GRPO: Shao et al. 2024, arXiv:2402.03300. The defaults are TRL's.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        eps: Added to the standard deviation.

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: As in `center_by_group`, or `eps` is not a number.
        ValueError: As in `center_by_group`, or `ddof` is not 0 or 1, or `eps` is negative.

    Examples:
        >>> standardize_by_group(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]]), eps=0)
        tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    check_number("eps", eps, at_least=0)
    grouped = GroupedRewards.of(rewards, groups)
    centered = grouped.centered()
    std = grouped.std(centered, check_ddof(ddof))
    return grouped.restore(divide(centered, std, eps))


def std_by_group(rewards: Tensor, groups: int | Tensor | None = None, *, ddof: int = 1) -> Tensor:
    """Give each reward the standard deviation of its group.

    std^2 = sum_i (r_i - mean(r))^2 / (n - ddof)

    n counts the group's scored rewards. Exactly 0 for equal rewards, and where n <= ddof.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].
        ddof: 1 for the sample's standard deviation, 0 for the population's.

    Returns:
        Standard deviations, shape of `rewards` (the same for all of a group), float32 or float64,
        detached.

    Raises:
        TypeError: As in `center_by_group`.
        ValueError: As in `center_by_group`, or `ddof` is not 0 or 1.

    Examples:
        >>> std_by_group(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[0.5000, 0.5000, 0.5000, 0.5000]])
    """
    grouped = GroupedRewards.of(rewards, groups)
    return grouped.restore(grouped.std(grouped.centered(), check_ddof(ddof)))


def center_by_group_scale_by_batch(
    rewards: Tensor,
    groups: int | Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Subtract the mean of each group, and divide by the standard deviation of the whole batch.

    A_i = (r_i - mean_group(r)) / (std_batch(r) + eps)

    The standard deviation is that of all scored rewards around the batch's mean, so groups that
    differ in mean enlarge it. Where it is 0, A is 0. Liu et al. 2025 ("Tricks or Traps"),
    arXiv:2508.08221.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        eps: Added to the standard deviation.

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: As in `standardize_by_group`.
        ValueError: As in `standardize_by_group`.

    Examples:
        >>> center_by_group_scale_by_batch(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), eps=0)
        tensor([[ 0.7071, -0.7071],
                [ 0.0000,  0.0000]])
    """
    check_number("eps", eps, at_least=0)
    grouped = GroupedRewards.of(rewards, groups)
    _, variance = weighted_moments(to_scores("rewards", rewards), None, check_ddof(ddof))
    return grouped.restore(divide(grouped.centered(), variance.sqrt(), eps))


def whiten(
    values: Tensor,
    weights: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-8,
) -> Tensor:
    """Bring a whole batch to mean 0 and standard deviation 1.

    A = (v - mean(v)) / (std(v) + eps),
    mean = sum(w v) / sum(w),    std^2 = sum(w (v - mean)^2) / (sum(w) - ddof)

    Batch level: one value per sequence, no weights. Token level: the same with the number of its
    tokens as each sequence's weight, or one value per token with the mask as weights. Values that
    are NaN, or whose weight is not above 0, are left out and come back as 0. Where std is 0, all
    is 0. The last step of REINFORCE++: Hu 2025, arXiv:2501.03262.

    Args:
        values: Advantages or rewards, of sequences or tokens. Any shape.
        weights: How often each value counts: whole numbers or a mask; None counts each once.
            Shape of `values`.
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        eps: Added to the standard deviation.

    Returns:
        Advantages, shape of `values`, float32 or float64, detached.

    Raises:
        TypeError: `values` or `weights` is not a tensor of real numbers, or `eps` not a number.
        ValueError: Shapes differ, `ddof` is not 0 or 1, or `eps` is negative.

    Examples:
        >>> whiten(torch.tensor([2.0, 0.0]), eps=0)
        tensor([ 1., -1.])
        >>> whiten(torch.tensor([2.0, 0.0]), torch.tensor([1, 4]), eps=0)
        tensor([ 2.0000, -0.5000])
    """
    check_number("eps", eps, at_least=0)
    scores = to_scores("values", values)
    if weights is not None:
        weights = check_shape("weights", to_scores("weights", weights), scores.shape, "of values")
        weights = weights.to(scores.dtype)
    centered, variance = weighted_moments(scores, weights, check_ddof(ddof))
    return divide(centered, variance.sqrt(), eps)


def gdpo(
    rewards: Tensor,
    groups: int | Tensor | None = None,
    *,
    weights: Sequence[float] | Tensor | None = None,
    ddof: int = 1,
    eps: float = 1e-4,
) -> Tensor:
    """Standardize several rewards by group, each on its own, and add them up.

    A_i = sum_k w_k (r_ik - mean(r_k)) / (std(r_k) + eps)

    The scale of one reward does not drown another. A sample that reward k could not score gets
    nothing from k. GDPO: Liu et al. 2026, arXiv:2601.05242; its last step is `whiten` over the
    batch, which is left to the caller.

    Args:
        rewards: K rewards of each sample, NaN where unscored. Shape [P, G, K], or [B, K] with
            `groups`.
        groups: For [B, K] only: G, or the group id of each sample, shape [B].
        weights: Weight of each reward, shape [K]; None: all are 1.
        ddof: 1 for the sample's standard deviation, 0 for the population's.
        eps: Added to the standard deviation.

    Returns:
        Advantages, shape of `rewards` without its last axis, float32 or float64, detached.

    Raises:
        TypeError: As in `standardize_by_group`.
        ValueError: As in `standardize_by_group`, or `weights` are not finite or not [K].

    Examples:
        >>> both = torch.tensor([[[1.0, 30.0], [0.0, 10.0]]])
        >>> gdpo(both, weights=[1.0, 0.5], ddof=0, eps=0)
        tensor([[ 1.5000, -1.5000]])
    """
    scores, weight = check_several(rewards, weights)
    parts = [standardize_by_group(r, groups, ddof=ddof, eps=eps) for r in scores.unbind(-1)]
    return (torch.stack(parts, -1) * weight).sum(-1)


def sum_rewards(rewards: Tensor, weights: Sequence[float] | Tensor | None = None) -> Tensor:
    """Add up several rewards of each sample.

    r_i = sum_k w_k r_ik

    A reward that is NaN adds nothing; the sum is NaN only where all of them are.

    Args:
        rewards: K rewards of each sample, NaN where unscored. Shape [P, G, K] or [B, K].
        weights: Weight of each reward, shape [K]; None: all are 1.

    Returns:
        Rewards, shape of `rewards` without its last axis, float32 or float64, detached.

    Raises:
        TypeError: `rewards` is not a tensor of real numbers.
        ValueError: `rewards` are not [P, G, K] or [B, K], or `weights` are not finite or not [K].

    Examples:
        >>> sum_rewards(torch.tensor([[1.0, 0.5], [1.0, float("nan")]]), weights=[1.0, 2.0])
        tensor([2., 1.])
    """
    scores, weight = check_several(rewards, weights)
    return (scores * weight).nansum(-1).masked_fill(scores.isnan().all(-1), torch.nan)


def check_several(
    rewards: Tensor, weights: Sequence[float] | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return K rewards of each sample, and their weights [K]."""
    scores = to_scores("rewards", rewards)
    check_rank("rewards", scores, (2, 3), "[P, G, K], or [B, K] with groups")
    kinds = scores.shape[-1]
    if kinds == 0:
        raise ValueError(f"rewards must hold K >= 1 per sample, got {describe(scores)}")
    if weights is None:
        return scores, scores.new_ones(kinds)
    if isinstance(weights, Tensor):
        require(check_tensor("weights", weights).isfinite(), "weights must be finite")
    else:
        for index, number in enumerate(check_list("weights", weights)):
            check_number(f"weights[{index}]", number)
    weight = torch.as_tensor(weights, dtype=scores.dtype, device=scores.device).detach()
    return scores, check_shape("weights", weight, [kinds], "[K]")
