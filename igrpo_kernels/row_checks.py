"""Checks of the ops over rows of logits, and the shapes they bring their arguments to."""

import math

import torch
from torch import Tensor

from .checks import (
    check_device,
    check_integral,
    check_mask,
    check_number,
    check_shape,
    check_tensor,
    describe,
    require_within,
)

# The ops of a copy of this folder under another name get their own namespace
NAMESPACE = (__package__ or "igrpo_kernels").replace(".", "_")

# The least normal number of float32: what it divides stays finite
LEAST_TEMPERATURE = 2.0**-126


def check_targets(targets: object, mask: object, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Check that targets and mask fit rows [..., V] or [..., H]; return them as int64 and bool.

    In memory without gaps, as kernels read them.
    """
    shape = rows.shape[:-1]
    targets = check_shape("targets", check_integral("targets", targets), shape, "of the rows")
    targets = check_device("targets", targets, rows).long().contiguous()
    if mask is None:
        return targets, None
    return targets, check_mask(mask, shape, "of targets").to(rows.device).contiguous()


def row_temperature(
    temperature: float | Tensor, targets: Tensor, dtype: torch.dtype
) -> float | Tensor:
    """Bring a temperature to a number, or to shape [1] (one for all) or [N] (one per row).

    A compiler gets a tensor, so that another temperature does not recompile.
    """
    if not isinstance(temperature, Tensor):
        number = check_number("temperature", temperature, above=0)
        if number < LEAST_TEMPERATURE:
            raise ValueError(f"temperature must be >= {LEAST_TEMPERATURE:.3g}, got {number}")
        if torch.compiler.is_compiling():
            return torch.full((1,), number, dtype=dtype, device=targets.device)
        return number
    check_tensor("temperature", temperature)
    if temperature.dtype == torch.bool or temperature.is_complex():
        raise TypeError(f"temperature must hold numbers, got {describe(temperature)}")
    if temperature.numel() != 1:
        check_shape("temperature", temperature, targets.shape, "of targets, or one number,")
    return temperature.detach().reshape(-1).to(targets.device, dtype).contiguous()


def check_rows(
    targets: Tensor, mask: Tensor | None, temperature: float | Tensor, vocabulary: int
) -> None:
    """Check what the rows that count hold."""
    require_within(
        targets if mask is None else targets * mask,
        (0, vocabulary),
        f"targets must lie in [0, V) = [0, {vocabulary}) on rows that count; "
        "leave other rows out with a mask",
    )
    if isinstance(temperature, Tensor):
        if mask is not None and temperature.numel() > 1:
            temperature = torch.where(mask.flatten(), temperature, 1.0)
        require_within(
            temperature,
            (LEAST_TEMPERATURE, math.inf),
            f"temperature must be >= {LEAST_TEMPERATURE:.3g} and finite on rows that count",
        )
