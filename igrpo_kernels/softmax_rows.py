"""One row of logits to its log-prob, its entropy and its gradient, over a buffer that is reused.

The one home of the softmax arithmetic: every log-prob and every fused loss calls `softmax_rows_`
on a chunk of rows in fp32 (or fp64), then `SoftmaxRows.gradient_` on the same buffer.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .row_chunks import row_slices, take
from .softmax_statistics import (
    LOGIT_FLOOR,
    RowStatistics,
    SoftmaxStatistics,
    add_at_targets_,
    row_maximum,
    target_logits,
)
from .vocabulary_shard import VocabularyShard


@dataclass(frozen=True)
class LogitTransform:
    """From the products x @ W.T + b to the logits that enter the softmax.

    logits = cap(logit_scale * products) / temperature,   cap(y) = softcap * tanh(y / softcap)

    Attributes:
        temperature: One number for all rows, shape [1], or one per row, shape [N].
        softcap: Bound on the logits' size (Gemma 2); None leaves them unbounded.
        logit_scale: Factor before the cap (Cohere, Granite).
    """

    temperature: Tensor
    softcap: float | None = None
    logit_scale: float = 1.0

    def take(self, rows: Tensor | slice) -> "LogitTransform":
        """Keep the temperatures of `rows`."""
        if self.temperature.numel() == 1:
            return self
        return LogitTransform(self.temperature[rows], self.softcap, self.logit_scale)

    def apply_(self, products: Tensor, slope: Tensor | None) -> None:
        """Overwrite the products by the logits; write the cap's slope where there is a cap."""
        temperature = self.temperature.to(products.dtype)[:, None]
        if self.softcap is None:
            scale = self.logit_scale / temperature
            if (scale != 1).any():
                products.mul_(scale)
            return
        products.mul_(self.logit_scale / self.softcap).tanh_()
        torch.square(products, out=slope).neg_().add_(1)
        products.mul_(self.softcap / temperature)


class RowSoftmax(Protocol):
    """A chunk of rows after the softmax, whoever computed it."""

    @property
    def statistics(self) -> RowStatistics:
        """Log-prob, entropy, maximum and normalizer of each row."""
        ...

    def keep_(self, rows: Tensor) -> "RowSoftmax":
        """Keep some rows, in ascending order; drop the others."""
        ...

    def gradient_(
        self,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Overwrite the buffer by the gradient of the products; to be called once."""
        ...


@dataclass(frozen=True)
class SoftmaxRows:
    """A chunk of rows after the softmax: what leaves it, and what its gradient needs.

    Attributes:
        statistics: Log-prob, entropy, maximum and normalizer of each row, over all slices.
        targets: Index of a column; outside of them for a target of another slice. Shape [N].
        transform: Scale, cap and temperature of these rows.
        exponentials: exp(logits - max), in the caller's buffer. Shape [N, V].
        shifted: logits - max, bounded below, where the entropy was asked for. Shape [N, V].
        slope: d cap / d input, where there is a cap. Shape [N, V].
    """

    statistics: RowStatistics
    targets: Tensor
    transform: LogitTransform
    exponentials: Tensor
    shifted: Tensor | None
    slope: Tensor | None

    def keep_(self, rows: Tensor) -> "SoftmaxRows":
        """Move some rows, in ascending order, to the front of the buffers; drop the others."""
        return SoftmaxRows(
            self.statistics.take(rows),
            self.targets[rows],
            self.transform.take(rows),
            _move_to_front(self.exponentials, rows),
            None if self.shifted is None else _move_to_front(self.shifted, rows),
            None if self.slope is None else _move_to_front(self.slope, rows),
        )

    def gradient_(
        self,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Overwrite the buffer by the gradient of the products; to be called once.

        d logprob / d z_j = 1[j = target] - p_j,   d entropy / d z_j = -p_j (log p_j + entropy)

        Args:
            grad_logprobs: Upstream gradient of the log-probs; None is zero. Shape [N].
            grad_entropy: Upstream gradient of the entropy; None is zero. Shape [N].
            dtype: What to round the gradient to; None: that of the buffer.

        Returns:
            The gradient, in the memory of the buffer. Shape [N, V].
        """
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(self.statistics.logprobs)
        grad = self.exponentials
        narrow = None if dtype in (None, grad.dtype) else _front(grad, dtype)
        for some in row_slices(grad):
            piece = self._gradient_piece_(some, grad_logprobs[some], take(grad_entropy, some))
            if narrow is not None:
                narrow[some] = piece.to(narrow.dtype)
        return grad if narrow is None else narrow

    def _gradient_piece_(
        self, some: slice, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> Tensor:
        grad, statistics = self.exponentials[some], self.statistics.take(some)
        transform = self.transform.take(some)
        scale = transform.logit_scale / transform.temperature.to(grad.dtype)
        if grad_entropy is None:
            grad.mul_((-scale * grad_logprobs / statistics.normalizer)[:, None])
        else:
            assert self.shifted is not None
            assert statistics.entropy is not None
            # grad_entropy (log p + entropy) + grad_logprobs, with log p = shifted - log normalizer
            above = statistics.entropy - statistics.normalizer.log()
            factor = self.shifted[some].add_(above[:, None])
            factor.mul_(grad_entropy[:, None]).add_(grad_logprobs[:, None])
            grad.mul_(factor).mul_((-scale / statistics.normalizer)[:, None])
        add_at_targets_(grad, self.targets[some], scale * grad_logprobs)
        return grad if self.slope is None else grad.mul_(self.slope[some])


def softmax_rows_(
    products: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    *,
    entropy: bool = False,
    shard: VocabularyShard | None = None,
    known: RowStatistics | None = None,
) -> "RowSoftmax":
    """Take log-probs (and entropy) of a chunk of rows, overwriting the chunk.

    log p[n] = z[n, target] - max z[n] - log sum_j exp(z[n, j] - max z[n])

    Args:
        products: x @ W.T + b in fp32 or fp64; overwritten. Shape [N, V].
        targets: Index of a column; outside of them for a target of another slice. Shape [N].
        transform: Scale, cap and temperature, already taken for these rows.
        entropy: Also take the entropy, at the price of one more [N, V] buffer.
        shard: Where the columns are a slice of the vocabulary: max and sum go over all slices.
        known: What an earlier call on the same rows has left, over all slices: nothing is then
            reduced, nor sent.
    """
    if products.is_cuda:
        from ._triton import softmax_rows as kernels

        return kernels.softmax_rows_(
            products, targets, transform, entropy=entropy, shard=shard, known=known
        )
    shifted = torch.empty_like(products) if entropy else None
    slope = None if transform.softcap is None else torch.empty_like(products)
    parts = []
    for some in row_slices(products):
        logits, own = products[some], take(shifted, some)
        transform.take(some).apply_(logits, take(slope, some))
        if known is None:
            parts.append(_reduce_(logits, targets[some], own).stack())
        else:
            _exponentiate_(logits, known.maximum[some], own)
    if known is None:
        found = SoftmaxStatistics.unstack(torch.cat(parts, dim=-1))
        known = found.rows if shard is None else shard.merge(found).rows
        if shard is not None:
            moved = (found.maximum - known.maximum)[:, None]
            products.mul_(moved.exp())
            shifted = None if shifted is None else shifted.add_(moved).clamp_(min=LOGIT_FLOOR)
    return SoftmaxRows(known, targets, transform, products, shifted, slope)


def _reduce_(logits: Tensor, targets: Tensor, shifted: Tensor | None) -> SoftmaxStatistics:
    """Overwrite logits by exp(logits - max); return what merges with other slices."""
    target = target_logits(logits, targets)
    maximum = row_maximum(logits)
    _exponentiate_(logits, maximum, shifted)
    moment = None if shifted is None else torch.linalg.vecdot(logits, shifted)
    return SoftmaxStatistics(maximum, logits.sum(-1), target, moment)


def _exponentiate_(logits: Tensor, maximum: Tensor, shifted: Tensor | None) -> None:
    """Overwrite logits by exp(logits - max), and write the bounded exponents beside them."""
    logits.sub_(maximum[:, None])
    if shifted is not None:
        torch.clamp(logits, min=LOGIT_FLOOR, out=shifted)
    logits.exp_()


def _front(values: Tensor, dtype: torch.dtype) -> Tensor:
    """View the front of contiguous memory as the same rows in a narrower dtype."""
    return values.view(dtype).view(-1)[: values.numel()].view(values.shape)


def _move_to_front(values: Tensor, rows: Tensor, block: int = 64) -> Tensor:
    """Compact rows in place: none moves down, so no block overwrites the source of a later one."""
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        values[start : start + len(some)] = values[some]
    return values[: len(rows)]
