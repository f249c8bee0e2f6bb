"""Advantages with other baselines than the group's mean.

Layouts, and the conventions for NaN, lone and equal rewards, are those of `of_groups.py`.
"""

import torch
from torch import Tensor

from igrpo_kernels.checks import check_number, check_shape, require

from .moments import GroupedRewards, check_ddof, divide, to_scores


def rloo(rewards: Tensor, groups: int | Tensor | None = None) -> Tensor:
    """Subtract from each reward the mean of the others in its group.

    A_i = r_i - sum_{j != i} r_j / (n - 1) = n / (n - 1) (r_i - mean(r))

    n counts the group's scored rewards. A group of one gets 0. RLOO: Kool et al. 2019; Ahmadian et
    al. 2024, arXiv:2402.14740.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: As in `center_by_group`.
        ValueError: As in `center_by_group`.

    Examples:
        >>> rloo(torch.tensor([[1.0, 0.0, 0.0, 0.5]]))
        tensor([[ 0.8333, -0.5000, -0.5000,  0.1667]])
    """
    grouped = GroupedRewards.of(rewards, groups)
    return grouped.restore(_leave_one_out(grouped))


def standardize_leave_one_out(
    rewards: Tensor,
    groups: int | Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Tensor:
    """Subtract the mean of the others, and divide by the standard deviation of the others.

    A_i = (r_i - mean_{j != i} r_j) / (std_{j != i} r_j + eps)

    The variance of the n - 1 others divides by n - 1 - ddof. Where it is 0 (the others are equal,
    or too few) the difference is not divided: the only success of a group gets r_i - mean, not
    infinity. NeMo-RL's rule (NVIDIA-NeMo/RL 7ea279a, `GRPOAdvantageEstimator`).
    Computed in float64: with the others close together, little is left of the group's own variance.

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
        >>> standardize_leave_one_out(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[ 1.0000, -0.5773, -0.5773, -0.5773]])
    """
    check_number("eps", eps, at_least=0)
    check_ddof(ddof)
    scores = to_scores("rewards", rewards)
    grouped = GroupedRewards.of(scores.double(), groups)
    squares, others = grouped.centered().square(), grouped.count - 1
    squares = grouped.sum(squares) - squares * (1 + 1 / others.clamp(min=1))
    std = (squares.clamp(min=0) / (others - ddof).clamp(min=1)).sqrt()
    lowest = -_best_of_others(grouped, -grouped.rewards)
    varied = (_best_of_others(grouped, grouped.rewards) > lowest) & (others > ddof)
    difference = _leave_one_out(grouped) / torch.where(varied, std + eps, 1.0)
    return grouped.restore(difference).to(scores.dtype)


def opo(rewards: Tensor, weights: Tensor, groups: int | Tensor | None = None) -> Tensor:
    """Subtract from each reward the weighted mean of its group.

    A_i = r_i - sum_j w_j r_j / sum_j w_j

    With completion lengths as weights this is OPO's baseline, which nearly minimizes the variance
    of the gradient: Hao et al. 2025, arXiv:2505.23585. Weights that sum to 0 in a
    group (no tokens at all) leave the plain mean as the baseline.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        weights: Such as the number of tokens of each sample; not negative. Shape of `rewards`.
        groups: For [B] only: G, or the group id of each reward, shape [B].

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: As in `center_by_group`.
        ValueError: As in `center_by_group`, or `weights` do not have the shape of `rewards`, or are
            negative or NaN where a reward is scored (on a GPU a device assertion).

    Examples:
        >>> opo(torch.tensor([[1.0, 0.0]]), torch.tensor([[30, 10]]))
        tensor([[ 0.2500, -0.7500]])
    """
    grouped = GroupedRewards.of(rewards, groups)
    weights = check_shape("weights", to_scores("weights", weights), grouped.shape, "of rewards")
    weight = weights.reshape(grouped.rewards.shape).where(grouped.scored, torch.nan)
    require(~grouped.scored | (weight >= 0), "weights must not be negative or NaN")
    centered = grouped.centered()
    total = grouped.sum(weight)
    shift = torch.where(total > 0, grouped.sum(weight * centered) / total, 0.0)
    return grouped.restore(centered - shift)


def maxrl(rewards: Tensor, groups: int | Tensor | None = None, *, eps: float = 1e-6) -> Tensor:
    """Subtract from each reward the mean of its group, and divide by that mean.

    A_i = (r_i - mean(r)) / (mean(r) + eps)

    For rewards that are not negative, such as 0 and 1, where mean(r) estimates the success rate:
    its inverse turns the policy gradient into that of the log-likelihood of success. A negative
    mean would turn the sign of every advantage, so negative rewards are refused. Where mean(r) is
    0, A is 0. MaxRL: Tajwar et al. 2026, arXiv:2602.02710.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].
        eps: Added to the mean.

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: As in `center_by_group`, or `eps` is not a number.
        ValueError: As in `center_by_group`, `eps` is negative, or a reward is (on a GPU a device
            assertion).

    Examples:
        >>> maxrl(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), eps=0)
        tensor([[ 3., -1., -1., -1.]])
    """
    check_number("eps", eps, at_least=0)
    grouped = GroupedRewards.of(rewards, groups)
    require(~(grouped.rewards < 0), "rewards must not be negative")
    return grouped.restore(divide(grouped.centered(), grouped.mean(grouped.rewards), eps))


def best_over_runner_up(rewards: Tensor, groups: int | Tensor | None = None) -> Tensor:
    """Give the best of each group its lead over the second best, and all others 0.

    A_i = r_i - max_{j != i} r_j  for the best of a group,  0 for all others

    What sample i adds to the group's maximum, that is, to pass@k with k the size of the group. Two
    that tie for best lead by 0. A group of one gets 0. Tang et al. 2025, arXiv:2503.19595.

    Args:
        rewards: Reward of each sample, NaN where unscored. Shape [P, G], or [B] with `groups`.
        groups: For [B] only: G, or the group id of each reward, shape [B].

    Returns:
        Advantages, shape of `rewards`, float32 or float64, detached.

    Raises:
        TypeError: As in `center_by_group`.
        ValueError: As in `center_by_group`.

    Examples:
        >>> best_over_runner_up(torch.tensor([[0.2, 1.0, 0.5], [1.0, 1.0, 0.0]]))
        tensor([[0.0000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.0000]])
    """
    grouped = GroupedRewards.of(rewards, groups)
    lead = (grouped.rewards - _best_of_others(grouped, grouped.rewards)).clamp(min=0)
    return grouped.restore(torch.where(grouped.count > 1, lead, 0.0))


def _leave_one_out(grouped: GroupedRewards) -> Tensor:
    return grouped.centered() * (grouped.count / (grouped.count - 1).clamp(min=1))


def _best_of_others(grouped: GroupedRewards, values: Tensor) -> Tensor:
    """Find the largest value among the others of the group; -inf where there are none."""
    top = grouped.max(values)
    is_top = values == top
    second = grouped.max(values.where(~is_top, -torch.inf))
    only = grouped.sum(is_top.to(values.dtype)) == 1
    return torch.where(is_top & only, second, top)
