"""What the softmax leaves of each row: the one home of log-prob and entropy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .row_selection import Rows, holds_all, spread, take

# Far above this exp is zero already, in fp64 too; a logit of -inf would make p log p = 0 * -inf
LOG_FLOOR = -1e4

# Exponentials relative to the target's logit may add up to this: its probability is then 1e-18.
# Beyond, they or the factors that undo them could leave fp32's range.
LARGEST = 2.0**60


class RowStatistics(NamedTuple):
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
        if holds_all(rows, self.logprobs.shape[0]):
            return self
        return RowStatistics(
            take(self.logprobs, rows),
            take(self.entropy, rows),
            take(self.reference, rows),
            take(self.total, rows),
        )

    def spread(self, rows: Rows, count: int) -> "RowStatistics":
        """Undo `take`, with zeros in the other rows."""
        if holds_all(rows, count):
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
    def of_tensors(cls, tensors: Sequence[Any]) -> "RowStatistics":
        """Undo `tensors`; no entropy may be None too, as autograd saves it."""
        logprobs, entropy, reference, total = tensors
        given = entropy is not None and entropy.numel() > 0
        return cls(logprobs, entropy if given else None, reference, total)

    @classmethod
    def zeros(cls, like: Tensor, dtype: torch.dtype, *, entropy: bool) -> "RowStatistics":
        """Start with zeros, of the shape of `like`."""
        logprobs, entropies, reference, total = (
            torch.zeros_like(like, dtype=dtype) for _ in range(4)
        )
        return cls(logprobs, entropies if entropy else None, reference, total)

    @classmethod
    def join(cls, parts: "list[RowStatistics]") -> "RowStatistics":
        """Concatenate those of chunks; at least one."""
        if len(parts) == 1:
            return parts[0]
        joined = [torch.cat(column) for column in zip(*(p.tensors for p in parts), strict=True)]
        return cls.of_tensors(joined)
