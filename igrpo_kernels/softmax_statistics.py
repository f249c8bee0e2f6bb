"""What a softmax over the columns of a row leaves, and how slices of the columns merge."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .row_chunks import take

# Far above this exp is zero already, in fp64 too; a logit of -inf would make p log p = 0 * -inf
LOGIT_FLOOR = -1e4


@dataclass(frozen=True)
class RowStatistics:
    """What the softmax of each row leaves: with them its gradient takes one pass. Shape [N].

    Attributes:
        logprobs: log softmax(z)[target].
        entropy: -sum p log p, where it was asked for.
        maximum: max_j z_j.
        normalizer: sum_j exp(z_j - maximum).
    """

    logprobs: Tensor
    entropy: Tensor | None
    maximum: Tensor
    normalizer: Tensor

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, *, entropy: bool) -> "RowStatistics":
        """Start with zeros, of the shape of `like`."""
        logprobs, entropies, maximum, normalizer = (
            torch.zeros_like(like, dtype=dtype) for _ in range(4)
        )
        return cls(logprobs, entropies if entropy else None, maximum, normalizer)

    @classmethod
    def of_tensors(cls, tensors: Sequence[Tensor]) -> "RowStatistics":
        """Undo `tensors`."""
        logprobs, entropy, maximum, normalizer = tensors
        return cls(logprobs, entropy if entropy.numel() else None, maximum, normalizer)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """List the four, for ops that know tensors alone: no entropy is an empty one."""
        entropy = self.logprobs.new_empty(0) if self.entropy is None else self.entropy
        return self.logprobs, entropy, self.maximum, self.normalizer

    def take(self, rows: Tensor | slice) -> "RowStatistics":
        """Select rows."""
        entropy = take(self.entropy, rows)
        return RowStatistics(
            self.logprobs[rows], entropy, self.maximum[rows], self.normalizer[rows]
        )

    def put_(self, rows: Tensor, some: "RowStatistics") -> None:
        """Overwrite rows."""
        for mine, theirs in zip(self.tensors, some.tensors, strict=True):
            if theirs.numel():
                mine[rows] = theirs


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
    def rows(self) -> RowStatistics:
        """What these columns leave, if they are all.

        log p = z_target - m - log s,   entropy = log s - moment / s
        """
        log_normalizer = self.normalizer.log()
        moment = self.moment
        return RowStatistics(
            (self.target - self.maximum) - log_normalizer,
            None if moment is None else log_normalizer - moment / self.normalizer,
            self.maximum,
            self.normalizer,
        )

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
