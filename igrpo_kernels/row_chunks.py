"""Rows that count, cut into chunks: what the log-prob ops share at and behind their doors."""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check_integral, check_number, check_shape, check_tensor

# The ops of a copy of this folder under another name get their own namespace
NAMESPACE = (__package__ or "igrpo_kernels").replace(".", "_")

# fp32 logits held at a time. Larger chunks spend less on accumulating dW, smaller ones hold less.
CPU_CHUNK_BYTES = 2**28
CUDA_CHUNK_BYTES = 2**32 + 2**30
# What stays in a CPU core's caches from one pass over it to the next
CACHE_BYTES = 2**22


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_per_chunk(vocabulary: int, device: torch.device) -> int:
    """How many rows of fp32 logits fit the budget; at least one."""
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else CUDA_CHUNK_BYTES
    return max(1, budget // (4 * vocabulary))


def row_chunks(rows: Tensor, vocabulary: int, owner: Tensor | None = None) -> Iterator[Tensor]:
    """Cut an index of rows into chunks; none for no rows.

    Args:
        rows: In ascending order. Shape [N].
        vocabulary: V.
        owner: Index of the sequence of every row; then no chunk cuts through one.
    """
    if rows.numel():
        most = rows_per_chunk(vocabulary, rows.device)
        yield from rows.split(
            most if owner is None else _whole(sequence_lengths(rows, owner), most)
        )


def sequence_lengths(rows: Tensor, owner: Tensor) -> list[int]:
    """Count the rows of each sequence that has one."""
    lengths: list[int] = owner[rows].unique_consecutive(return_counts=True)[1].tolist()
    return lengths


def _whole(lengths: list[int], most: int) -> list[int]:
    """Fill chunks of at most `most` rows with one sequence after the other."""
    sizes: list[int] = []
    for length in lengths:
        if sizes and sizes[-1] + length <= most:
            sizes[-1] += length
        else:
            sizes.append(length)
    return sizes


def row_pieces(rows: Tensor, vocabulary: int) -> Iterator[Tensor]:
    """Cut an index of rows into chunks of fp32 that a CPU's caches hold; none for no rows."""
    if rows.numel():
        yield from rows.split(max(1, CACHE_BYTES // (4 * vocabulary)))


def row_slices(values: Tensor) -> Iterator[slice]:
    """Cut the rows of a chunk into slices that a CPU's caches hold; one for no rows."""
    step = max(1, CACHE_BYTES // max(1, values.shape[1] * values.element_size()))
    for start in range(0, max(1, len(values)), step):
        yield slice(start, start + step)


def check_targets(targets: object, mask: object, shape: torch.Size) -> tuple[Tensor, Tensor | None]:
    """Check that targets and mask have the rows' shape; return both flat."""
    targets = check_shape("targets", check_integral("targets", targets), shape, "of the rows")
    if mask is not None:
        mask = check_shape("mask", check_tensor("mask", mask), shape, "of targets").reshape(-1) != 0
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


def counted_rows(targets: Tensor, mask: Tensor | None) -> Tensor:
    """Index the rows that count. Shape [N]."""
    if mask is None:
        return torch.arange(targets.numel(), device=targets.device)
    return mask.nonzero().squeeze(1)


def active_rows(mask: Tensor | None, *gradients: Tensor | None) -> Tensor:
    """Index the rows that count and whose upstream gradient is not exactly zero. Shape [N]."""
    given = [gradient != 0 for gradient in gradients if gradient is not None]
    active = torch.stack(given).any(0)
    return (active if mask is None else active & mask).nonzero().squeeze(1)


def take(values: Tensor | None, rows: Tensor | slice) -> Tensor | None:
    """Select rows of an optional tensor."""
    return None if values is None else values[rows]


def require(holds: Tensor, message: str) -> None:
    """Raise ValueError unless all of `holds`; on a GPU a device assertion, which needs no sync."""
    if holds.is_cuda:
        torch._assert_async(holds.all(), message)
    elif not holds.all():
        raise ValueError(message)
