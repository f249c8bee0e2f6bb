"""What the ops over hidden states check at their door."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .checks import check_floating, check_number, check_rank, check_shape, describe
from .vocabulary_shard import VocabularyShard, check_slice


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


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Leave torch.autocast: what it would cast has been cast at the door."""
    if not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)
