"""The last linear layer over chunks of rows: its products, and the gradients they leave behind.

Products of bf16 inputs accumulate and stay in fp32; nothing of shape [rows, V] outlives its chunk.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .row_selection import Rows, compose, take, working_dtype
from .row_softmax import LogitTransform, ProductGradient, TargetColumns
from .vocabulary_shard import VocabularyShard

# Rows of a half-precision weight that a CPU casts at a time: few enough to multiply from cache.
# At H = 768, 2048 rows by 32768 columns took 567 ms so, 758 ms by 5461 and 654 ms by all at once.
CAST_ROWS = 512


@dataclass(frozen=True)
class LinearHead:
    """logits = cap(logit_scale * (x @ W.T + b)) / temperature.

    Attributes:
        weight: Shape [V, H], here and below of the slice's V where there is a shard.
        bias: Shape [V], or None.
        transform: Scale, cap and temperature of every row.
        shard: Which slice of the vocabulary this is; None: all of it.
        chunk_bytes: Bytes of logits, or of their exponentials, held at a time; None: the default.
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    shard: VocabularyShard | None = None
    chunk_bytes: int | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of logits of a row."""
        return self.weight.shape[0]

    @property
    def widest(self) -> int:
        """The most logits of a row that any rank has: what chunks are cut by."""
        return self.vocabulary if self.shard is None else self.shard.widest

    @property
    def whole_vocabulary(self) -> int:
        """V of all slices together."""
        return self.vocabulary if self.shard is None else self.shard.vocabulary

    def columns(self, targets: Tensor) -> TargetColumns:
        """Where targets stand among this weight's rows."""
        if self.shard is None:
            return TargetColumns(targets)
        return TargetColumns(targets - self.shard.start, is_slice=True)

    def products_(self, memory: Tensor, hidden: Tensor) -> Tensor:
        """Write x @ W.T + b of a chunk of rows to memory. Shape [N, V], in fp32 or fp64."""
        products = take(memory, range(hidden.shape[0]))
        if hidden.dtype == products.dtype:
            torch.mm(hidden, self.weight.t(), out=products)
        elif hidden.is_cuda:
            torch.mm(hidden, self.weight.t(), out_dtype=products.dtype, out=products)
        else:
            hidden = hidden.to(products.dtype)
            for start in range(0, self.vocabulary, CAST_ROWS):
                columns = slice(start, start + CAST_ROWS)
                weight = self.weight[columns].to(products.dtype)
                torch.mm(hidden, weight.t(), out=products[:, columns])
        return products if self.bias is None else products.add_(self.bias)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The inputs' dtype, but fp32 for fp16: no loss scale has lifted the gradients to its range."""
    return torch.float32 if dtype == torch.float16 else dtype


class HeadGradients:
    """Gradients of hidden states, weight and bias, summed over chunks of rows.

    The weight's and the bias's are summed in fp32 (fp64 for fp64), and rounded once at the end.
    Rows that no chunk holds get zero. One that is not needed is None and costs nothing.
    """

    def __init__(
        self, head: LinearHead, hidden: Tensor, needed: list[bool], *, one_chunk: bool
    ) -> None:
        """Prepare for one chunk or several; `needed` says of hidden, weight and bias."""
        self.head = head
        self.like = hidden
        self.needs_hidden, self.needs_weight, needs_bias = needed
        self.needs_bias = needs_bias and head.bias is not None
        self.one_chunk = one_chunk
        self.hidden: Tensor | None = None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def matrix_dtype(self) -> torch.dtype:
        """The dtype in which `add` wants the matrix of a gradient of the products.

        The inputs' dtype where a product can sum in a wider one. On a CPU none can, so there a
        weight's gradient over several chunks takes a matrix in fp32.
        """
        dtype = self.head.weight.dtype
        summed_on_cpu = self.needs_weight and not self.one_chunk and not self.head.weight.is_cuda
        return working_dtype(dtype) if summed_on_cpu else gradient_dtype(dtype)

    def add(self, rows: Rows, hidden: Tensor, gradient: ProductGradient) -> None:
        """Add the share of a chunk.

        Args:
            rows: Where the rows stand in the batch.
            hidden: Their hidden states. Shape [N, H].
            gradient: The gradient of their products.
        """
        if gradient.rows is not None:
            rows, hidden = compose(rows, gradient.rows), hidden[gradient.rows]
        if self.needs_hidden:
            self._put_hidden(rows, *self._hidden_product(gradient))
        if self.needs_weight:
            self.weight = self._weight_plus(hidden, gradient)
        if self.needs_bias:
            share = _bias_share(gradient)
            self.bias = share if self.bias is None else self.bias.add_(share)

    def _put_hidden(self, rows: Rows, product: Tensor, factors: Tensor | None) -> None:
        dtype = gradient_dtype(self.like.dtype)
        every = len(rows) == self.like.shape[0]
        if every and (factors is None or not product.is_cuda):
            self.hidden = scale_rows(product, factors, dtype)
            return
        if self.hidden is None:
            new = torch.empty_like if every else torch.zeros_like
            self.hidden = new(self.like, dtype=dtype)
        if factors is not None and product.is_cuda:
            from ._triton.head_rows import put_scaled_rows_

            put_scaled_rows_(self.hidden, rows, product, factors)
            return
        at = slice(rows.start, rows.stop) if isinstance(rows, range) else rows
        self.hidden[at] = scale_rows(product, factors, dtype)

    def _hidden_product(self, gradient: ProductGradient) -> tuple[Tensor, Tensor | None]:
        """Return the gradient of a chunk's hidden states, and the factors that it still lacks.

        Of half-precision operands a GPU's leaves in fp32: cuBLAS may split the sum over V, and adds
        up parts in the dtype in which the product leaves.
        """
        matrix, weight, shard = gradient.matrix, self.head.weight, self.head.shard
        wide = working_dtype(weight.dtype)
        if matrix.is_cuda and matrix.dtype == weight.dtype != wide:
            product = torch.mm(matrix, weight, out_dtype=wide)
        elif shard is not None:  # a slice's share is not rounded before all are summed
            product = torch.mm(matrix.to(wide), weight.to(wide))
        elif matrix.dtype == gradient_dtype(weight.dtype):
            product = torch.mm(matrix, weight.to(matrix.dtype))
        else:
            return torch.mm(gradient.multiplied(weight.dtype), weight), None
        if shard is not None:
            return shard.sum_(scale_rows(product, gradient.factors, product.dtype)), None
        return product, gradient.factors

    def _weight_plus(self, hidden: Tensor, gradient: ProductGradient) -> Tensor:
        """Return the weight's gradient so far plus that of a chunk."""
        matrix = gradient.matrix.t()
        if gradient.scaled_hidden is not None:
            hidden = gradient.scaled_hidden
        else:
            hidden = scale_rows(hidden, gradient.factors, matrix.dtype)
        if self.one_chunk:  # its product is the sum, and rounded once
            return torch.mm(matrix, hidden)
        total, dtype = self.weight, working_dtype(matrix.dtype)
        if matrix.dtype == dtype:
            product = torch.mm if total is None else total.addmm_
            return product(matrix, hidden)
        if total is None:
            return torch.mm(matrix, hidden, out_dtype=dtype)
        return torch.addmm(total, matrix, hidden, out_dtype=dtype, out=total)

    def finish(self) -> list[Tensor]:
        """Return those that were needed, in `gradient_dtype`; contiguous, also where W is not."""
        dtype = gradient_dtype(self.head.weight.dtype)
        gradients = []
        for needed, total, like in (
            (self.needs_hidden, self.hidden, self.like),
            (self.needs_weight, self.weight, self.head.weight),
            (self.needs_bias, self.bias, self.head.bias),
        ):
            if needed and like is not None:
                gradients.append(like.new_zeros(like.shape) if total is None else total)
        return [gradient.to(dtype) for gradient in gradients]


def scale_rows(values: Tensor, factors: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Multiply each row by its factor (None: 1), in fp32 or fp64, and round once. Shape [N, H]."""
    return (values if factors is None else values * factors[:, None]).to(dtype)


def _bias_share(gradient: ProductGradient) -> Tensor:
    """Sum the gradient of a chunk's products over its rows. Shape [V]."""
    matrix, factors = gradient.matrix, gradient.factors
    dtype = working_dtype(matrix.dtype)
    if factors is None:
        return matrix.sum(0, dtype=dtype)
    if matrix.dtype == dtype:
        return torch.mv(matrix.t(), factors)
    return torch.mm(factors[None].to(matrix.dtype), matrix, out_dtype=dtype)[0]
