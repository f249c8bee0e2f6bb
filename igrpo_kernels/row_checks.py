"""What the ops over rows of logits check at their door, and what they bring to one shape."""

import torch
from torch import Tensor

from .checks import check_integral, check_mask, check_number, check_shape, require

# The ops of a copy of this folder under another name get their own namespace
NAMESPACE = (__package__ or "igrpo_kernels").replace(".", "_")


def check_targets(targets: object, mask: object, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Check that targets and mask have the rows' shape; return both flat."""
    targets = check_shape("targets", check_integral("targets", targets), shape, "of the rows")
    if mask is not None:
        mask = check_mask(mask, shape, "of targets").reshape(-1)
    return targets.reshape(-1).long(), mask


def row_temperature(temperature: float | Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    """Bring a temperature to shape [1] (one for all), or [N] (one per row of `targets`)."""
    if not isinstance(temperature, Tensor):
        number = check_number("temperature", temperature, above=0)
        return torch.full((1,), number, dtype=dtype, device=targets.device)
    if temperature.numel() != 1:
        check_shape("temperature", temperature, targets.shape, "of targets, or one number,")
    return temperature.detach().reshape(-1).to(dtype)


def check_rows(targets: Tensor, mask: Tensor | None, temperature: Tensor, vocabulary: int) -> None:
    """Check what the rows that count hold."""
    if mask is None:
        mask = torch.ones_like(targets, dtype=torch.bool)
    require(
        ~mask | ((targets >= 0) & (targets < vocabulary)),
        f"targets must lie in [0, V) = [0, {vocabulary}) on rows that count; "
        "leave other rows out with a mask",
    )
    if mask.numel():
        positive = (temperature > 0) & temperature.isfinite()
        require(~mask | positive, "temperature must be > 0 and finite on rows that count")
