"""What goes into the softmax of a chunk of rows, and what comes out, on CPU and GPU alike."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .row_selection import Rows, take, working_dtype
from .row_statistics import RowStatistics


class LogitTransform(NamedTuple):
    """From the products x @ W.T + b to the logits that enter the softmax.

    logits = cap(logit_scale * products) / temperature,   cap(y) = softcap * tanh(y / softcap)

    Attributes:
        temperature: One number for all rows, or a tensor of one, [1], or of one per row, [N].
        softcap: Bound on the logits' size (Gemma 2); None leaves them unbounded.
        logit_scale: Factor before the cap (Cohere, Granite).
    """

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def take(self, rows: Rows) -> "LogitTransform":
        """Keep the temperatures of `rows`."""
        if not isinstance(self.temperature, Tensor) or self.temperature.numel() == 1:
            return self
        return LogitTransform(take(self.temperature, rows), self.softcap, self.logit_scale)

    @property
    def scale(self) -> float | Tensor:
        """The logits over the products where there is no cap. A number, or shape [1] or [N]."""
        return self.logit_scale / self.temperature

    def temperature_tensor(self, like: Tensor) -> Tensor:
        """The temperature as a tensor, for kernels that read it. Shape [1] or [N]."""
        if isinstance(self.temperature, Tensor):
            return self.temperature
        return like.new_full((1,), self.temperature, dtype=working_dtype(like.dtype))

    def apply(self, products: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the logits, in `out` if that is given; products as they are, if nothing changes.

        Shape [N, V].
        """
        if self.softcap is not None:
            logits = torch.mul(products, self.logit_scale / self.softcap, out=out).tanh_()
            return logits.mul_(_per_row(self.softcap / self.temperature))
        if isinstance(self.temperature, Tensor) or self.scale != 1:
            return torch.mul(products, _per_row(self.scale), out=out)
        return products

    def slope(self, logits: Tensor) -> Tensor:
        """The cap's slope: 1 - (logits * temperature / softcap)^2. Shape [N, V]."""
        assert self.softcap is not None
        return 1 - (logits * _per_row(self.temperature / self.softcap)).square()


def _per_row(values: float | Tensor) -> float | Tensor:
    return values[:, None] if isinstance(values, Tensor) else values


class TargetColumns(NamedTuple):
    """Where each row's target stands among the columns of a slice of the vocabulary.

    Attributes:
        columns: Index of a column; outside of them for a target of another slice. Shape [N].
        is_slice: Whether there may be targets of other slices.
    """

    columns: Tensor
    is_slice: bool = False

    def take(self, rows: Rows) -> "TargetColumns":
        """Keep the targets of `rows`."""
        return TargetColumns(take(self.columns, rows), self.is_slice)

    def read(self, values: Tensor) -> Tensor:
        """Return each row's value at its target, 0 where that is in another slice. Shape [N, 1]."""
        if not self.is_slice:
            return values.gather(1, self.columns[:, None])
        rows = self._own(values)
        read = values.new_zeros(len(values), 1)
        read[rows, 0] = values[rows, self.columns[rows]]
        return read

    def write_(self, values: Tensor, written: float | Tensor) -> None:
        """Overwrite each row's value at its target; leave out targets of other slices."""
        if self.is_slice:
            rows = self._own(values)
            values[rows, self.columns[rows]] = (
                written[rows] if isinstance(written, Tensor) else written
            )
        elif isinstance(written, Tensor):
            values.scatter_(1, self.columns[:, None], written[:, None])
        else:
            values.scatter_(1, self.columns[:, None], written)

    def _own(self, values: Tensor) -> Tensor:
        inside = (self.columns >= 0) & (self.columns < values.shape[1])
        return inside.nonzero().squeeze(1)


class ProductGradient(NamedTuple):
    """The gradient of a chunk's products: factors[:, None] * matrix.

    Attributes:
        matrix: Shape [K, V].
        factors: Shape [K], in fp32 or fp64; None: all are 1.
        rows: Which rows of the chunk these are; the others have no gradient. None: all. Shape
            [K].
        scaled_hidden: The rows' hidden states times the factors, in the dtype of the matrix, where
            they were taken along. Shape [K, H].
    """

    matrix: Tensor
    factors: Tensor | None = None
    rows: Tensor | None = None
    scaled_hidden: Tensor | None = None

    def multiplied(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Return the gradient as one matrix, in `out` if that is given. Shape [K, V]."""
        if out is None:
            out = self.matrix.new_empty(self.matrix.shape, dtype=dtype)
        if self.factors is None:
            return out.copy_(self.matrix)
        return torch.mul(self.matrix, self.factors[:, None], out=out)


class RowSoftmax(Protocol):
    """A chunk of rows after the softmax."""

    @property
    def statistics(self) -> RowStatistics:
        """Log-prob, entropy, reference and total of each row, over all slices."""
        ...

    def gradient_(
        self,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None = None,
        *,
        dtype: torch.dtype,
        scales_hidden: bool = False,
    ) -> ProductGradient:
        """Return the gradient of the products, in the memory of the chunk; to be called once.

        d logprob / d z_j = 1[j = t] - p_j,   d entropy / d z_j = -p_j (log p_j + entropy)

        Args:
            by_logprob: Upstream gradient of the log-probs; None is zero. Shape [N].
            by_entropy: Upstream gradient of the entropy; None is zero. Shape [N].
            dtype: What the matrix is best in; it may be wider than what was stored.
            scales_hidden: Whether the hidden states times the factors will be wanted.
        """
        ...
