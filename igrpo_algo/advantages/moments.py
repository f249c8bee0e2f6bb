"""Which reward belongs to which group, in both layouts: rows [P, G], and flat [B] with ids.

Advantages and metrics are written once, against `GroupedRewards`, which sums and compares within
each group. NaN marks a reward that could not be scored: sums, maxima and means skip it, arithmetic
carries it along, and `restore` turns it into 0 at the end. Nothing here asks the device how many
groups there are, so nothing waits for it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_count,
    check_integral,
    check_rank,
    check_shape,
    check_tensor,
    describe,
)


def to_scores(name: str, values: object) -> Tensor:
    """Detach `values` and bring them to float32 at least; float64 stays, integers convert."""
    tensor = check_tensor(name, values).detach()
    if tensor.is_complex():
        raise TypeError(f"{name} must hold real numbers, got {describe(tensor)}")
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _number_ids(ids: Tensor) -> Tensor:
    """Number equal ids alike, counting from 0. Any integers, in any order. Shape [B]."""
    ordered, order = ids.sort()
    numbers = (ordered.diff(prepend=ordered[:1]) != 0).cumsum(0)
    return torch.empty_like(order).scatter_(0, order, numbers)


@dataclass(frozen=True)
class GroupedRewards:
    """Rewards with the group that each belongs to.

    Attributes:
        rewards: The rewards, NaN where unscored. Shape [P, G], or [B] where `owner` is given.
        scored: False where the reward is NaN. Shape of `rewards`.
        shape: Shape in which the rewards came, and in which results go back.
        owner: Number of the group that each reward belongs to, or None for rows. Shape [B].
        count: Scored rewards in each reward's group. Shape [P, 1] or [B].
    """

    rewards: Tensor
    scored: Tensor
    shape: torch.Size
    owner: Tensor | None = None
    count: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "count", self.sum(self.scored.to(self.rewards.dtype)))

    @classmethod
    def of(cls, rewards: Tensor, groups: int | Tensor | None = None) -> "GroupedRewards":
        """Read the groups off rewards in any of the three layouts.

        Args:
            rewards: Real numbers, NaN where unscored. Shape [P, G], or [B] with `groups`.
            groups: Flat rewards only: G, for consecutive blocks of G, or one integer id per reward,
                shape [B]; ids need be neither sorted nor contiguous, groups may differ in size.

        Raises:
            TypeError: `rewards` is not a tensor of real numbers, or `groups` neither an int nor an
                integer tensor.
            ValueError: `groups` is missing for [B], given for [P, G], or does not fit.
        """
        scores = to_scores("rewards", rewards)
        check_rank("rewards", scores, (1, 2), "[P, G], or [B] with groups")
        rows, owner = scores, None
        if scores.dim() == 2:
            if groups is not None:
                raise ValueError(
                    "groups must be None where rewards are [P, G]: the rows are groups"
                )
            if scores.shape[1] == 0:
                raise ValueError(f"rewards must hold G >= 1 per group, got {describe(scores)}")
        elif isinstance(groups, Tensor):
            check_shape("groups", check_integral("groups", groups), scores.shape, "[B]")
            owner = _number_ids(groups.to(scores.device))
        elif groups is None:
            raise ValueError("groups must be G or ids of shape [B] where rewards are [B], got None")
        else:
            size = check_count("groups", groups)
            if scores.numel() % size:
                raise ValueError(f"groups = {size} must divide B = {scores.numel()}")
            rows = scores.reshape(-1, size)
        return cls(rows, ~rows.isnan(), scores.shape, owner)

    def sum(self, values: Tensor) -> Tensor:
        """Sum each group's values, NaN left out, for each member. Shape [P, 1] or [B]."""
        if self.owner is None:
            return values.nansum(-1, keepdim=True)
        values = values.nan_to_num(0.0, torch.inf, -torch.inf)
        return torch.zeros_like(values).index_add(0, self.owner, values)[self.owner]

    def max(self, values: Tensor) -> Tensor:
        """Find each group's largest value, NaN left out; -inf if none. Shape [P, 1] or [B]."""
        values = values.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        if self.owner is None:
            return values.max(-1, keepdim=True).values
        lowest = torch.full_like(values, -torch.inf)
        return lowest.scatter_reduce(0, self.owner, values, "amax")[self.owner]

    def mean(self, values: Tensor) -> Tensor:
        """Average each group's values over its scored members. Shape [P, 1] or [B]."""
        return self.sum(values) / self.count.clamp(min=1)

    def centered(self) -> Tensor:
        """Subtract each group's mean from its rewards.

        The gap to the group's largest reward comes first: equal rewards then center to exactly 0,
        where the rounding of their mean would leave noise for a small deviation to blow up. That
        reward is taken as finite, so that an infinite one does not vanish in inf - inf.
        """
        gap = self.rewards - self.max(self.rewards).nan_to_num()
        return gap - self.mean(gap)

    def std(self, centered: Tensor, ddof: int) -> Tensor:
        """Compute each group's deviation; exactly 0 for equal rewards and where n <= ddof."""
        return (self.sum(centered.square()) / (self.count - ddof).clamp(min=1)).sqrt()

    def restore(self, values: Tensor) -> Tensor:
        """Bring one value per reward, or per group, to the rewards' own shape; 0 where unscored."""
        return torch.where(self.scored, values, 0.0).reshape(self.shape)


def weighted_moments(values: Tensor, weights: Tensor | None, ddof: int) -> tuple[Tensor, Tensor]:
    """Center values over the whole batch, and give their variance.

    centered = v - sum(w v) / sum(w),    variance = sum(w centered^2) / (sum(w) - ddof)

    Values that are NaN, or whose weight is not above 0, are left out and come back as 0. The
    variance is 0 where all values are equal, and where sum(w) <= ddof.

    Args:
        values: Scores, in any shape.
        weights: How often each value counts; None counts each once. Shape of `values`.
        ddof: 1 for the sample variance, 0 for the population's.

    Returns:
        Centered values, shape of `values`, and their variance, a scalar.
    """
    counted = ~values.isnan()
    if weights is not None:
        counted = counted & (weights > 0)
    if values.numel() == 0:
        return values, values.sum()
    weight = counted.to(values.dtype) if weights is None else weights.where(counted, 0)
    total = weight.sum()
    gap = torch.where(counted, values - values.where(counted, -torch.inf).amax(), 0.0)
    mean = torch.where(total > 0, (weight * gap).sum() / total, 0.0)
    centered = torch.where(counted, gap - mean, 0.0)
    spread, freedom = (weight * centered.square()).sum(), total - ddof
    return centered, torch.where(freedom > 0, spread / freedom, 0.0)


def check_ddof(ddof: object) -> int:
    """Return `ddof` if it is 0 (population) or 1 (sample)."""
    if isinstance(ddof, bool) or not isinstance(ddof, int) or ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {describe(ddof)}")
    return ddof


def divide(values: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Divide by `scale + eps`, by 1 where `scale` is 0: values that are 0 there stay 0."""
    return values / torch.where(scale == 0, 1.0, scale + eps)
