"""What the softmax leaves of each row: the one home of log-prob and entropy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .row_selection import Rows, spread, take

# Far above this exp is zero already, in fp64 too; a logit of -inf would make p log p = 0 * -inf
LOG_FLOOR = -1e4

# Exponentials relative to the target's logit may add up to this: its probability is then 1e-18.
# Beyond, they or the factors that undo them could leave fp32's range.
LARGEST = 2.0**60


@dataclass(frozen=True)
class RowStatistics:
    """What the softmax of each row leaves: with it the gradient takes one pass. Shape [N].

    Attributes:
        logprobs: log softmax(z)[target].
        entropy: -sum p log p, where it was asked for.
        reference: The logit r that exponentials are taken relative to.
        total: sum_j exp(z_j - r), the target's included.
    """

    logprobs: Tensor
    entropy: Tensor | None
    reference: Tensor
    total: Tensor

    @classmethod
    def of_sums(
        cls, reference: Tensor, others: Tensor, moment: Tensor | None, gap: Tensor | None = None
    ) -> "RowStatistics":
        """Finish what sums over the columns have found.

        total = e^gap + others,  logprob = gap - log(total),  entropy = log(total) - moment / total

        The target is left out of the sum and enters by log1p, so that a confident token keeps its
        digits: its log-prob is -log1p(others).

        Args:
            reference: r, the target's logit or the row's maximum. Shape [N].
            others: sum_{j != target} exp(z_j - r). Shape [N].
            moment: sum_{j != target} exp(z_j - r) (z_j - r), where the entropy is wanted.
            gap: z_target - r, at most 0; None where r is the target's logit. Shape [N].
        """
        if gap is None:
            log_total = others.log1p()
            logprobs = log_total.neg()
        else:
            others = others + gap.expm1()
            log_total = others.log1p()
            logprobs = gap - log_total
            moment = None if moment is None else moment + gap.exp() * gap.clamp(min=LOG_FLOOR)
        total = others + 1
        entropy = None if moment is None else log_total - moment / total
        return cls(logprobs, entropy, reference, total)

    @property
    def others(self) -> Tensor:
        """sum_{j != target} exp(z_j - r), to the last digits: total (1 - p), not total - e^gap."""
        return -self.total * self.logprobs.expm1()

    def take(self, rows: Rows) -> "RowStatistics":
        """Select rows."""
        return RowStatistics(
            take(self.logprobs, rows),
            take(self.entropy, rows),
            take(self.reference, rows),
            take(self.total, rows),
        )

    def spread(self, rows: Rows, count: int) -> "RowStatistics":
        """Undo `take`, with zeros in the other rows."""
        if isinstance(rows, range) and len(rows) == count:
            return self
        entropy = None if self.entropy is None else spread(self.entropy, rows, count)
        values = (self.logprobs, self.reference, self.total)
        logprobs, reference, total = (spread(value, rows, count) for value in values)
        return RowStatistics(logprobs, entropy, reference, total)

    def put_(self, rows: Tensor, some: "RowStatistics") -> None:
        """Overwrite rows."""
        for mine, theirs in zip(self.tensors, some.tensors, strict=True):
            if theirs.numel():
                mine[rows] = theirs

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """List the four, for ops that know tensors alone: no entropy is an empty one."""
        entropy = self.logprobs.new_empty(0) if self.entropy is None else self.entropy
        return self.logprobs, entropy, self.reference, self.total

    @classmethod
    def of_tensors(cls, tensors: "list[Tensor]") -> "RowStatistics":
        """Undo `tensors`."""
        logprobs, entropy, reference, total = tensors
        return cls(logprobs, entropy if entropy.numel() else None, reference, total)

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, *, entropy: bool) -> "RowStatistics":
        """Start with zeros, of the shape of `like`."""
        logprobs, entropies, reference, total = (
            torch.zeros_like(like, dtype=dtype) for _ in range(4)
        )
        return cls(logprobs, entropies if entropy else None, reference, total)

    @classmethod
    def join(cls, parts: "list[RowStatistics]") -> "RowStatistics":
        """Put those of chunks behind one another; at least one."""
        if len(parts) == 1:
            return parts[0]
        joined = [torch.cat(column) for column in zip(*(p.tensors for p in parts), strict=True)]
        return cls.of_tensors(joined)


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
        moved = (self.maximum - maximum).clamp(min=LOG_FLOOR)
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
