"""The last linear layer over chunks of rows: its products, and the gradients they leave behind.

Products of bf16 inputs accumulate and stay in fp32; nothing of shape [rows, V] outlives its chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_floating, check_number, check_rank, check_shape, describe
from .row_chunks import row_chunks, rows_per_chunk, sequence_lengths, working_dtype
from .softmax_rows import LogitTransform
from .vocabulary_shard import VocabularyShard, check_slice

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
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform
    shard: VocabularyShard | None = None

    @property
    def vocabulary(self) -> int:
        """V, the number of logits of a row."""
        return self.weight.shape[0]

    @property
    def widest(self) -> int:
        """The most logits of a row that any rank has: what chunks are cut by."""
        return self.vocabulary if self.shard is None else self.shard.widest

    def chunks(self, rows: Tensor, owner: Tensor | None = None) -> Iterator[Tensor]:
        """Cut an index of rows into chunks, of whole sequences by `owner`; alike on every rank."""
        if self.shard is not None:
            self.shard.check_rows(rows)
        return row_chunks(rows, self.widest, owner)

    def holds_sequences(self, rows: Tensor, owner: Tensor) -> bool:
        """Whether each sequence of some rows fits a chunk."""
        most = rows_per_chunk(self.widest, rows.device)
        return len(rows) <= most or max(sequence_lengths(rows, owner)) <= most

    def columns(self, targets: Tensor) -> Tensor:
        """Where targets stand among this weight's rows; outside of them for another slice's."""
        return targets if self.shard is None else targets - self.shard.start

    def new_buffer(self, rows: int) -> Tensor:
        """Memory for the products of a chunk of a batch of `rows` rows."""
        size = min(rows, rows_per_chunk(self.widest, self.weight.device))
        dtype = working_dtype(self.weight.dtype)
        return self.weight.new_empty((size, self.vocabulary), dtype=dtype)

    def products_(self, buffer: Tensor, hidden: Tensor) -> Tensor:
        """Write x @ W.T + b of a chunk of rows to the buffer. Shape [N, V], in fp32 or fp64."""
        products = buffer[: len(hidden)]
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

    def __init__(self, head: LinearHead, hidden: Tensor, needed: list[bool], rows: int) -> None:
        """Prepare for chunks of `rows` rows in all; `needed` says of hidden, weight and bias."""
        self.head = head
        self.needs_hidden, self.needs_weight, needs_bias = needed
        self.needs_bias = needs_bias and head.bias is not None
        self.one_chunk = rows <= rows_per_chunk(head.widest, hidden.device)
        dtype = gradient_dtype(hidden.dtype)
        self.hidden = torch.zeros_like(hidden, dtype=dtype) if self.needs_hidden else None
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None

    @property
    def operand_dtype(self) -> torch.dtype:
        """The dtype in which `add` wants the gradient of the products.

        That of the inputs where the products with it can leave in another: a CPU's cannot, so there
        a weight's gradient of several chunks is summed from operands in fp32.
        """
        dtype = self.head.weight.dtype
        summed_on_cpu = self.needs_weight and not self.one_chunk and not self.head.weight.is_cuda
        return working_dtype(dtype) if summed_on_cpu else gradient_dtype(dtype)

    def add(self, rows: Tensor, hidden: Tensor, grad: Tensor) -> None:
        """Add the share of a chunk.

        Args:
            rows: Where the rows stand in the batch. Shape [N].
            hidden: Their hidden states. Shape [N, H].
            grad: The gradient of their products, in `operand_dtype`. Shape [N, V].
        """
        if self.hidden is not None:
            self.hidden[rows] = self._hidden_product(grad).to(self.hidden.dtype)
        if self.needs_weight:
            self.weight = self._weight_plus(hidden, grad)
        if self.needs_bias:
            share = grad.sum(0, dtype=working_dtype(grad.dtype))
            self.bias = share if self.bias is None else self.bias.add_(share)

    def _hidden_product(self, grad: Tensor) -> Tensor:
        """Return the gradient of a chunk's hidden states, summed over the slices."""
        weight, shard = self.head.weight, self.head.shard
        if shard is None:
            operand = grad.to(gradient_dtype(weight.dtype))
            return torch.mm(operand, weight.to(operand.dtype))
        wide = working_dtype(weight.dtype)  # a slice's share is not rounded before all are summed
        if grad.is_cuda and grad.dtype != wide:
            return shard.sum_(torch.mm(grad, weight, out_dtype=wide))
        return shard.sum_(torch.mm(grad.to(wide), weight.to(wide)))

    def _weight_plus(self, hidden: Tensor, grad: Tensor) -> Tensor:
        """Return the weight's gradient so far plus that of a chunk."""
        hidden = hidden.to(grad.dtype)
        if self.one_chunk:  # its product is the sum, and rounded once
            return torch.mm(grad.t(), hidden)
        total, dtype = self.weight, working_dtype(grad.dtype)
        if grad.dtype == dtype:
            product = torch.mm if total is None else total.addmm_
            return product(grad.t(), hidden)
        if total is None:
            return torch.mm(grad.t(), hidden, out_dtype=dtype)
        return torch.addmm(total, grad.t(), hidden, out_dtype=dtype, out=total)

    def finish(self) -> list[Tensor]:
        """Return those that were needed, in `gradient_dtype`."""
        dtype = gradient_dtype(self.head.weight.dtype)
        gradients = [] if self.hidden is None else [self.hidden]
        for needed, total, like in (
            (self.needs_weight, self.weight, self.head.weight),
            (self.needs_bias, self.bias, self.head.bias),
        ):
            if needed and like is not None:
                gradients.append(torch.zeros_like(like) if total is None else total)
        return [gradient.to(dtype) for gradient in gradients]


def check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    shard: VocabularyShard | None,
) -> int:
    """Check what the ops over hidden states have in common; return the whole vocabulary's size.

    Raises:
        TypeError: A tensor is not floating point or is sharded, the dtypes differ, or `shard` is no
            shard.
        ValueError: The shapes do not fit, or `softcap` or `logit_scale` is out of range.
    """
    check_floating("hidden", hidden)
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        if hasattr(tensor, "full_tensor"):  # a DTensor, as FSDP2 leaves outside of its forward
            raise TypeError(
                f"{name} must be a plain tensor, got a sharded one: call this inside the wrapped "
                f"forward, pass {name}.full_tensor(), or pass to_local() of a weight cut by "
                "rows with shard=VocabularyShard.of(...)"
            )
    check_rank("weight", check_floating("weight", weight), 2, "[V, H]")
    if shard is not None:
        check_slice(weight, shard)
    elif weight.shape[0] == 0:
        raise ValueError(f"weight must have shape [V, H] with V >= 1, got {list(weight.shape)}")
    if hidden.dim() == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden must have shape [..., H] with H = {weight.shape[1]} as in weight, "
            f"got {list(hidden.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"hidden and weight must have one dtype, got {describe(hidden)} and "
            f"{describe(weight)}; cast one of them, or run under torch.autocast"
        )
    if bias is not None:
        check_shape("bias", check_floating("bias", bias), weight.shape[:1], "[V]")
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias must have weight's dtype, {weight.dtype}, got {describe(bias)}")
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    check_number("logit_scale", logit_scale)
    return weight.shape[0] if shard is None else shard.vocabulary


def cast_for_autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast as a linear layer would under torch.autocast; leave as they are elsewhere."""
    device = next(tensor.device.type for tensor in tensors if tensor is not None)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
