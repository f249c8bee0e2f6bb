"""From the arguments of the ops over hidden states to a head and the rows of a batch."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import (
    check_count,
    check_device,
    check_floating,
    check_number,
    check_rank,
    check_shape,
    check_tensor,
    describe,
)
from .linear_head import LinearHead
from .row_checks import check_targets, row_temperature
from .row_selection import working_dtype
from .row_softmax import LogitTransform
from .vocabulary_shard import VocabularyShard, check_slice


class HeadBatch(NamedTuple):
    """A head, and the rows that go through it.

    Attributes:
        head: The head, its weight and bias cast as autocast would.
        hidden: Hidden states, contiguous. Shape [N, H].
        targets: Shape [...], of N elements, in int64.
        mask: True where a row counts, or None. Shape of `targets`.
    """

    head: LinearHead
    hidden: Tensor
    targets: Tensor
    mask: Tensor | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic, and of log-probs and losses."""
        return working_dtype(self.head.weight.dtype)

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        mask: Tensor | None,
        temperature: float | Tensor,
        softcap: float | None,
        logit_scale: float,
        shard: VocabularyShard | None,
        chunk_bytes: int | None,
    ) -> "HeadBatch":
        """Check the arguments, and bring them to one shape and dtype, contiguous but the weight."""
        leaves = check_tensor("hidden", hidden), check_tensor("weight", weight), bias
        hidden, weight, bias = _cast_for_autocast(*leaves)
        _check_head(hidden, weight, bias, softcap, logit_scale, shard, chunk_bytes)
        targets, mask = check_targets(targets, mask, hidden)
        per_row = row_temperature(temperature, targets, working_dtype(weight.dtype))
        transform = LogitTransform(per_row, softcap, float(logit_scale))
        bias = None if bias is None else bias.contiguous()
        head = LinearHead(weight, bias, transform, shard, chunk_bytes)
        return cls(head, hidden.reshape(-1, hidden.shape[-1]).contiguous(), targets, mask)


def _check_head(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    shard: VocabularyShard | None,
    chunk_bytes: int | None,
) -> None:
    """Check what the ops over hidden states have in common.

    Raises:
        TypeError: A tensor is not floating point or is sharded, the dtypes differ, or `shard` is
            not a VocabularyShard.
        ValueError: Shapes or devices do not fit, or `softcap` or `logit_scale` is out of range.
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
    check_device("weight", weight, hidden)
    if bias is not None:
        check_shape("bias", check_floating("bias", bias), weight.shape[:1], "[V]")
        check_device("bias", bias, hidden)
        if bias.dtype != weight.dtype:
            raise TypeError(f"bias must have weight's dtype, {weight.dtype}, got {describe(bias)}")
    if softcap is not None:
        check_number("softcap", softcap, above=0)
    check_number("logit_scale", logit_scale)
    if chunk_bytes is not None:
        check_count("chunk_bytes", chunk_bytes)


def _cast_for_autocast(
    hidden: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast as a linear layer would under torch.autocast; leave as they are elsewhere."""
    device = hidden.device.type
    if not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave torch.autocast: what it would cast has been cast already."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
