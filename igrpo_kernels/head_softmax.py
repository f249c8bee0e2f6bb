"""From hidden states to softmax rows: the one place where the head's product meets the softmax.

`softmax_chunks` serves all ops over hidden states. What runs a chunk is chosen in `implementation`:
`cpu_head_softmax` or `_triton.head_softmax`, two modules of the same four functions:

    budget(head) -> int
        Bytes of logits or exponentials held at a time: `head.chunk_bytes`, or a default.
    rows_per_chunk(head, count, keeps) -> int
        How many of `count` rows that is, at least 1. Alike on all ranks of a shard: count
        `head.widest` columns.
        A product that only sums (`keeps=False`) holds nothing and may take any number.
    new_memory(head, rows, keeps) -> Tensor
        Memory for a chunk of at most `rows` rows, which the chunks of a pass share.
    softmax_of_rows(head, memory, hidden, targets, transform, *, entropy, keeps, known=None)
        -> RowSoftmax
        Take a chunk through the head.
        hidden: [N, H], contiguous, in the weight's dtype.
        targets: [N], int64, indices of the whole vocabulary; `head.columns(targets)` says where
            they stand in this slice.
        transform: already taken for these rows (`head.transform` is that of the whole batch); its
            temperature is a number, or a tensor of shape [1] or [N].
        entropy: whether `statistics.entropy` is wanted (needs the moment).
        keeps: whether `gradient_` will be called: E must then stay in memory.
        known: what an earlier call on the same rows has left: nothing is then reduced or sent over
            the shard, E is taken relative to `known.reference`, and `statistics` is `known`.

The result's `statistics` (fp32, [N]) cover all slices: the reference is the target's logit (0 on
ranks that do not hold it, added up by `head.shard.add`), the sums go through `head.shard.add` and
then `RowStatistics.of_sums(reference, others, moment)`. Rows whose `others` is not below `LARGEST`
(NaN included) are done again relative to their maximum, on all ranks alike; nothing is synchronized
for it where none has to be. `gradient_` returns a `ProductGradient`: E in whatever dtype it was
stored, with -others at the targets (`statistics.others`), and factors [N] in fp32, so that rows
without an upstream gradient may stay, at a factor of 0, and nothing is compacted.

Three small functions elsewhere run on rows, and have their kernels on CUDA too: `HeadGradients`
(hidden rows times factors, and dX), `FusedLoss` (from log-probs to loss and upstream gradients) and
`times_upstream` (the upstream scalar).
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import cpu_head_softmax
from .linear_head import LinearHead
from .row_selection import Rows, row_chunks, sequence_lengths, take
from .row_softmax import RowSoftmax
from .row_statistics import RowStatistics


class SoftmaxChunk(NamedTuple):
    """A chunk of rows after the softmax.

    Attributes:
        rows: Where the rows stand in the batch.
        hidden: Their hidden states. Shape [N, H].
        softmax: What they left.
    """

    rows: Rows
    hidden: Tensor
    softmax: RowSoftmax


def softmax_chunks(
    head: LinearHead,
    hidden: Tensor,
    targets: Tensor,
    rows: Rows,
    *,
    owner: Tensor | None = None,
    entropy: bool = False,
    keeps: bool = True,
    known: RowStatistics | None = None,
) -> Iterator[SoftmaxChunk]:
    """Take some rows of a batch through head and softmax, a chunk at a time, in one memory.

    Args:
        head: The head.
        hidden: Hidden states of the batch. Shape [N, H].
        targets: Targets of the batch. Shape [N].
        rows: Which rows; alike on every rank of a shard.
        owner: The sequence of each row of the batch, where no chunk may cut through one.
        entropy: Whether to take the entropy.
        keeps: Whether the chunks' `gradient_` is called.
        known: What a forward left of the batch.
    """
    if head.shard is not None:
        head.shard.check_rows(len(rows), head.weight.device)
    run = implementation(head)
    most = run.rows_per_chunk(head, len(rows), keeps)
    chunks = list(row_chunks(rows, most, owner))
    if not chunks:
        return
    memory = run.new_memory(head, max(map(len, chunks)), keeps)
    for chunk in chunks:
        some = take(hidden, chunk)
        softmax = run.softmax_of_rows(
            head,
            memory,
            some,
            take(targets, chunk),
            head.transform.take(chunk),
            entropy=entropy,
            keeps=keeps,
            known=None if known is None else known.take(chunk),
        )
        yield SoftmaxChunk(chunk, some, softmax)


def is_one_chunk(head: LinearHead, rows: Rows, *, keeps: bool = True) -> bool:
    """Whether some rows go through in one chunk."""
    most: int = implementation(head).rows_per_chunk(head, len(rows), keeps)
    return len(rows) <= most


def holds_sequences(head: LinearHead, rows: Rows, owner: Tensor) -> bool:
    """Whether each sequence of some rows fits a chunk."""
    most: int = implementation(head).rows_per_chunk(head, len(rows), keeps=True)
    return len(rows) <= most or max(sequence_lengths(rows, owner)) <= most


def implementation(head: LinearHead) -> ModuleType:
    """Choose the module that runs a chunk, by the device of the weight."""
    if head.weight.is_cuda:
        from ._triton import head_softmax as kernels

        return kernels
    return cpu_head_softmax
