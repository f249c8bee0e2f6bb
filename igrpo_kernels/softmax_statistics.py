"""What a softmax over some columns of a row leaves, and how slices of the columns merge."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Far above this exp is zero already, in fp64 too; a logit of -inf would make p log p = 0 * -inf
LOGIT_FLOOR = -1e4


@dataclass(frozen=True)
class SoftmaxStatistics:
    """Four numbers of each row, over all of its columns or over a slice of them.

    Attributes:
        maximum: m = max_j z_j, or the least finite number where that is -inf or there is no
            column. Shape [N], or [R, N] of R slices.
        normalizer: s = sum_j exp(z_j - m). Same shape.
        target: The target's logit; -inf where it stands in another slice. Same shape.
        moment: sum_j exp(z_j - m) (z_j - m), where the entropy is wanted. Same shape.
    """

    maximum: Tensor
    normalizer: Tensor
    target: Tensor
    moment: Tensor | None

    @property
    def logprobs(self) -> Tensor:
        """Log-prob of the target: z_target - m - log s. Shape [N]."""
        return (self.target - self.maximum) - self.normalizer.log()

    @property
    def entropy(self) -> Tensor | None:
        """-sum p log p = log s - moment / s, where the moment is there. Shape [N]."""
        if self.moment is None:
            return None
        return self.normalizer.log() - self.moment / self.normalizer

    def merge(self) -> "SoftmaxStatistics":
        """Merge the slices, the first axis, in their order: the same slices give the same bits.

        m = max_r m_r,   s = sum_r exp(m_r - m) s_r,
        moment = sum_r exp(m_r - m) (moment_r + s_r (m_r - m))
        """
        maximum = self.maximum.amax(0)
        moved = (self.maximum - maximum).clamp(min=LOGIT_FLOOR)
        rescale = moved.exp()
        moment = None
        if self.moment is not None:
            moment = (rescale * (self.moment + self.normalizer * moved)).sum(0)
        return SoftmaxStatistics(
            maximum, (rescale * self.normalizer).sum(0), self.target.amax(0), moment
        )

    def stack(self) -> Tensor:
        """Put the statistics under one another. Shape [3, N], or [4, N] with the moment."""
        rows = (self.maximum, self.normalizer, self.target, self.moment)
        return torch.stack([row for row in rows if row is not None])

    @classmethod
    def unstack(cls, stacked: Tensor) -> "SoftmaxStatistics":
        """Undo `stack`, of one slice or of several along a first axis."""
        maximum, normalizer, target, *moment = stacked.unbind(-2)
        return cls(maximum, normalizer, target, moment[0] if moment else None)


def row_maximum(logits: Tensor) -> Tensor:
    """Return each row's maximum, and the least finite number where it has none. Shape [N]."""
    least = torch.finfo(logits.dtype).min
    if logits.shape[1] == 0:
        return logits.new_full(logits.shape[:1], least)
    return logits.amax(-1).clamp_(min=least)


def target_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """Return each row's logit at its target; -inf where no column is the target. Shape [N]."""
    rows = _rows_of_own_targets(logits, targets)
    values = logits.new_full(targets.shape, -torch.inf)
    values[rows] = logits[rows, targets[rows]]
    return values


def add_at_targets_(values: Tensor, targets: Tensor, added: Tensor) -> Tensor:
    """Add to each row's value at its target, where a column is the target."""
    rows = _rows_of_own_targets(values, targets)
    values[rows, targets[rows]] += added[rows]
    return values


def _rows_of_own_targets(values: Tensor, targets: Tensor) -> Tensor:
    return ((targets >= 0) & (targets < values.shape[1])).nonzero().squeeze(1)
