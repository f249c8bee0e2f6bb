"""Checks of public arguments: an error names the argument, what was wanted and what came.

Public functions call these once on entry; helpers that receive checked values do not check again.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_FLOAT32 = torch.finfo(torch.float32).max


def describe(value: object) -> str:
    """Name a value in a few words: a tensor by dtype and shape, anything else by its type."""
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, int) and value.bit_length() > 256:  # Python may refuse to print it
        return f"an int of {value.bit_length()} bits"
    kind = type if isinstance(value, type) else type(value)
    try:
        shown = repr(value)
    except Exception:  # an object's own, or nested too deeply
        return f"{kind.__name__} that cannot be shown"
    return f"{kind.__name__} {shown if len(shown) <= 80 else shown[:77] + '...'}"


def check_tensor(name: str, value: object) -> Tensor:
    """Return `value` if it is a tensor that holds values; raise TypeError otherwise."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.is_meta:
        raise TypeError(f"{name} must hold values, got {describe(value)} on the meta device")
    if value.layout not in (torch.strided, torch.jagged):
        raise TypeError(f"{name} must be dense, got {describe(value)} that is {value.layout}")
    if value.is_floating_point() and value.element_size() == 1:
        raise TypeError(f"{name} must have at least 16 bits, got {describe(value)}")
    return value


def check_floating(name: str, value: object) -> Tensor:
    """Return `value` if it is a floating-point tensor; raise TypeError otherwise."""
    tensor = check_tensor(name, value)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}")
    return tensor


def check_integral(name: str, value: object) -> Tensor:
    """Return `value` if it is an integer tensor (not a boolean one); raise TypeError otherwise."""
    tensor = check_tensor(name, value)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {describe(tensor)}")
    return tensor


def check_device(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Return `tensor` if it lies on the device of `like`: a kernel would read another's memory."""
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device}, got {describe(tensor)} on {tensor.device}"
        )
    return tensor


def check_mask(value: object, shape: Sequence[int], legend: str) -> Tensor:
    """Return a mask of booleans, or of ones and zeros in any dtype, as booleans.

    An additive mask (0 and -inf) means the opposite and weights are not a mask: both are refused,
    on a GPU by a device assertion, which needs no sync. Compiled code does not look.
    """
    mask = check_shape("mask", check_tensor("mask", value), shape, legend)
    if mask.dtype == torch.bool:
        return mask
    counts = mask != 0
    if not torch.compiler.is_compiling():
        require(counts == mask, "mask must hold booleans, or ones and zeros")
    return counts


def require(holds: Tensor, message: str) -> None:
    """Raise ValueError unless all of `holds`; on a GPU a device assertion, which needs no sync."""
    if holds.is_cuda:
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)


def require_within(values: Tensor, bounds: tuple[float, float], message: str) -> None:
    """Raise ValueError unless all values lie in [low, high); see `require` for a GPU."""
    if not values.numel():
        return
    (lowest, highest), (low, high) = values.aminmax(), bounds
    if values.is_cuda:
        torch._assert_async((lowest >= low) & (highest < high), message)
    elif not (low <= lowest.item() and highest.item() < high):
        raise ValueError(message)


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], legend: str) -> Tensor:
    """Return `tensor` if it has `shape`, which `legend` spells in axis letters ("[P, N]")."""
    if list(tensor.shape) != list(shape):
        raise ValueError(
            f"{name} must have shape {legend} = {list(shape)}, got {list(tensor.shape)}"
        )
    return tensor


def check_rank(name: str, tensor: Tensor, ranks: int | tuple[int, ...], legend: str) -> Tensor:
    """Return `tensor` if its number of axes is one of `ranks`."""
    wanted = (ranks,) if isinstance(ranks, int) else ranks
    if tensor.dim() not in wanted:
        raise ValueError(f"{name} must have shape {legend}, got {list(tensor.shape)}")
    return tensor


def check_number(
    name: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
) -> float:
    """Return `value` as a float if it is a number within the bounds that float32 can hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {describe(value)}")
    bounds = [
        (">=", at_least, at_least is None or value >= at_least),
        (">", above, above is None or value > above),
        ("<=", at_most, at_most is None or value <= at_most),
    ]
    broken = [f"{sign} {bound}" for sign, bound, holds in bounds if not holds]
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ValueError(f"{name} must fit 64 bits, or be a float, got {describe(value)}")
    if (
        not broken and not abs(value) < math.inf
    ):  # a compiler traces it, where it breaks at isfinite
        broken = ["finite"]
    elif not broken and abs(value) > LARGEST_FLOAT32:
        broken = ["in the range of float32"]
    if broken:
        raise ValueError(f"{name} must be {' and '.join(broken)}, got {value!r}")
    return float(value)


def check_flag(name: str, value: object) -> bool:
    """Return `value` if it is True or False; raise TypeError otherwise."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def check_callable(name: str, value: Any) -> Any:
    """Return `value` if it can be called; raise TypeError otherwise."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {describe(value)}")
    return value


def check_list(name: str, value: Any) -> Any:
    """Return `value` if it is a sequence, and not text; raise TypeError otherwise."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, got {describe(value)}")
    return value


def check_count(name: str, value: object, *, at_least: int = 1) -> int:
    """Return `value` if it is an int, and not a bool, of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {describe(value)}")
    if value >= 2**63:
        raise ValueError(f"{name} must fit 64 bits, got {describe(value)}")
    if value < at_least:
        raise ValueError(f"{name} must be >= {at_least}, got {value}")
    return value
