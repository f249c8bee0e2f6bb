"""Which rows an op computes, and how many at a time."""

from collections.abc import Iterator
from functools import reduce
from typing import TypeAlias, overload

import torch
from torch import Tensor

Rows: TypeAlias = Tensor | range
"""A selection of rows: a stretch of them, which is a view, or an index in ascending order."""

# What stays in a CPU core's caches from one pass over it to the next
CACHE_BYTES = 2**22


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of all arithmetic: fp64 for fp64, fp32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@overload
def take(values: Tensor, rows: Rows) -> Tensor: ...
@overload
def take(values: None, rows: Rows) -> None: ...
@overload
def take(values: Tensor | None, rows: Rows) -> Tensor | None: ...
def take(values: Tensor | None, rows: Rows) -> Tensor | None:
    """Select rows of an optional tensor."""
    if values is None:
        return None
    if not isinstance(rows, range):
        return values.index_select(0, rows)
    return values if holds_all(rows, values.shape[0]) else values[rows.start : rows.stop]


def holds_all(rows: Rows, count: int) -> bool:
    """Whether a selection is that of all `count` rows, in their order."""
    return isinstance(rows, range) and len(rows) == count


def spread(values: Tensor, rows: Rows, count: int) -> Tensor:
    """Undo `take`: put the values of some rows among `count` rows; the others get 0."""
    if len(rows) == count:
        return values
    every = values.new_zeros((count, *values.shape[1:]))
    every[slice(rows.start, rows.stop) if isinstance(rows, range) else rows] = values
    return every


def compose(rows: Rows, some: Tensor) -> Tensor:
    """Select rows of a selection: take(take(values, rows), some) is take(values, the result)."""
    return rows.start + some if isinstance(rows, range) else rows[some]


def rows_where(count: int, *marks: Tensor | None) -> Rows:
    """Select the rows of `count` that all marks hold; None marks every row.

    Without a mark nothing is read, and a GPU not waited for.
    """
    given = [mark for mark in marks if mark is not None]
    if not given:
        return range(count)
    found = reduce(torch.logical_and, given).flatten().nonzero()
    return range(count) if found.shape[0] == count else found.squeeze(1)


def nonzero(*gradients: Tensor | None) -> Tensor:
    """Mark the rows where some upstream gradient is not exactly zero; at least one is given.

    A gradient that is given alone is its own mark.
    """
    return reduce(torch.logical_or, [part for part in gradients if part is not None])


def row_chunks(rows: Rows, most: int, owner: Tensor | None = None) -> Iterator[Rows]:
    """Cut a selection into chunks of at most `most` rows, of about equal size; none for no rows.

    With `owner`, the sequence of every row of the batch, no chunk cuts through a sequence, and a
    sequence of more rows is a chunk of its own.
    """
    if not len(rows):
        return
    if len(rows) <= most:
        yield rows
        return
    if owner is None:
        chunks = -(-len(rows) // most)
        size = -(-len(rows) // chunks)
        for start in range(0, len(rows), size):
            yield rows[start : start + size]
        return
    start = 0
    for size in _whole(sequence_lengths(rows, owner), most):
        yield rows[start : start + size]
        start += size


def sequence_lengths(rows: Rows, owner: Tensor) -> list[int]:
    """Count the rows of each sequence that has one."""
    counts = take(owner, rows).unique_consecutive(return_counts=True)[1]
    lengths: list[int] = counts.tolist()
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


def row_pieces(rows: Rows, vocabulary: int) -> Iterator[Rows]:
    """Cut a selection into chunks of fp32 logits that a CPU's caches hold; none for no rows."""
    return row_chunks(rows, max(1, CACHE_BYTES // (4 * vocabulary)))


def row_slices(values: Tensor) -> Iterator[range]:
    """Cut the rows of a chunk into slices that a CPU's caches hold; one for no rows."""
    step = max(1, CACHE_BYTES // max(1, values.shape[1] * values.element_size()))
    rows = values.shape[0]
    for start in range(0, max(1, rows), step):
        yield range(start, min(start + step, rows))
