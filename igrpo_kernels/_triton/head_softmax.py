"""A chunk of rows through head and softmax on CUDA.

One of the two modules behind `..head_softmax`, which says what the functions owe their caller. On
devices with a copy engine the product of bf16 inputs leaves exponentials (`exp_product`); elsewhere
the library's product leaves fp32, and one pass over it makes them (`exp_rows`). From there all is
the same: the sums of the rows, and the rest of each row in one kernel (`head_rows`).
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from ..checks import describe
from ..linear_head import LinearHead, gradient_dtype
from ..relative_softmax import RelativeSums, softmax_of_logits
from ..row_selection import Rows, working_dtype
from ..row_softmax import LogitTransform, ProductGradient, TargetColumns
from ..row_statistics import LARGEST, RowStatistics
from ..vocabulary_shard import VocabularyShard
from .chunk import Chunk, contiguous
from .clip_terms import ClippedRows, names_of
from .exp_product import can_describe, exp_product, tile_for
from .exp_rows import exp_rows_, row_totals, target_logits
from .head_rows import clip_rows, gradient_rows, weigh_rows_

# Bytes of exponentials, or of fp32 products, held at a time: 8833 rows of 151,936 columns in bf16.
# Larger chunks spend less on summing dW, smaller ones hold less.
CHUNK_BYTES = 5 * 2**29
LEAST_CHUNK_BYTES = CHUNK_BYTES // 2


def budget(head: LinearHead) -> int:
    """Bytes held at a time: by default four times the weight's, within bounds.

    A small model's step holds little but these; a large one's has room for them.
    """
    if head.chunk_bytes is not None:
        return head.chunk_bytes
    weight = head.widest * head.weight.shape[1] * head.weight.itemsize
    return min(CHUNK_BYTES, max(LEAST_CHUNK_BYTES, 4 * weight))


def rows_per_chunk(head: LinearHead, count: int, keeps: bool) -> int:
    """How many of some rows go at a time: as many as fit the budget, at least one.

    By default all go at once where that takes no more memory: of several chunks the gradient of the
    weight is summed in fp32, which for bf16 is 2 VH bytes more, and 10 VH bytes of traffic a chunk.
    The ranks of a shard all count fp32 products: where a slice begins in memory, which chooses the
    product, is each rank's own.
    """
    tile = None if head.shard is not None else tile_for(head.weight)
    if tile is None:
        row = 4 * head.widest
    elif keeps:
        row = 2 * head.widest
    else:  # the sums and moments of the tiles
        row = 8 * -(-head.widest // tile.columns)
    most = max(1, budget(head) // max(1, row))
    if keeps and count > most and head.chunk_bytes is None and head.weight.requires_grad:
        size = -(-count // -(-count // most))
        wider = 4 - gradient_dtype(head.weight.dtype).itemsize
        if (count - size) * row <= wider * head.widest * head.weight.shape[1]:
            return count
    return most


def new_memory(head: LinearHead, rows: int, keeps: bool) -> Tensor:
    """Memory for a chunk: for exponentials, in rows of whole 16 bytes, or for fp32 products."""
    if tile_for(head.weight) is None:
        dtype = working_dtype(head.weight.dtype)
        return head.weight.new_empty((rows, head.vocabulary), dtype=dtype)
    if not keeps:
        return head.weight.new_empty(0)
    dtype = gradient_dtype(head.weight.dtype)
    step = 16 // dtype.itemsize
    return head.weight.new_empty((rows, -(-head.vocabulary // step) * step), dtype=dtype)


@dataclass(frozen=True)
class HeadSoftmax:
    """`RowSoftmax` over the kernels.

    Attributes:
        chunk: The rows.
        exponentials: E, in the caller's memory, 0 at the targets; None if not kept. Shape [N, V].
        lacks_slope: Whether E is still to be multiplied by the cap's slope.
        statistics: Log-prob, entropy, reference and total of each row, over all slices.
    """

    chunk: Chunk
    exponentials: Tensor | None
    lacks_slope: bool
    statistics: RowStatistics

    def gradient_(
        self,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None = None,
        *,
        dtype: torch.dtype,
        scales_hidden: bool = False,
    ) -> ProductGradient:
        """Finish E and the factors; only the entropy, and a cap beside it, take a pass over E."""
        assert self.exponentials is not None
        rows = self.exponentials, self.chunk, self.statistics
        upstream = contiguous(by_logprob), contiguous(by_entropy)
        with torch.cuda.device_of(self.exponentials):
            if not self.lacks_slope and by_entropy is None:
                return gradient_rows(*rows, upstream[0], scales_hidden=scales_hidden)
            weigh_rows_(*rows, *upstream)
            return gradient_rows(*rows, None, scales_hidden=scales_hidden)

    def clip(
        self, losses: ClippedRows, rows: Rows, *, scales_hidden: bool
    ) -> tuple[Tensor, list[str], Tensor, ProductGradient | None]:
        """Take the clipped-ratio loss of the rows and finish them, in one launch.

        Args:
            losses: The losses of the batch, of an objective that `has_kernel`.
            rows: Where these rows stand in the batch.
            scales_hidden: As in `gradient_`.

        Returns:
            The share in the loss; the names and sums of what is logged; the gradient, where E was
            kept.
        """
        rest = self.statistics, losses, rows
        with torch.cuda.device_of(self.chunk.hidden):
            terms, gradient = clip_rows(
                self.exponentials, self.chunk, *rest, scales_hidden=scales_hidden
            )
        sums = terms.sum(1)
        names = names_of(losses.inputs, self.statistics.entropy)
        return sums[0], names, sums[1:], gradient


def softmax_of_rows(
    head: LinearHead,
    memory: Tensor,
    hidden: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    *,
    entropy: bool,
    keeps: bool,
    known: RowStatistics | None = None,
) -> HeadSoftmax:
    """Take a chunk through head and softmax."""
    if hidden.dtype == torch.float64:
        raise TypeError(
            "float64 has no kernel: cast to float32, or move the tensors to the CPU, got "
            f"{describe(hidden)}"
        )
    tile = tile_for(head.weight)
    if tile is not None and not can_describe(hidden):
        hidden = hidden.clone(memory_format=torch.contiguous_format)
    # a number goes to the device once, and not for each launch
    transform = transform._replace(temperature=transform.temperature_tensor(hidden))
    chunk = Chunk(hidden, head.weight, head.bias, head.columns(targets).columns, transform)
    # the gradient of an entropy starts from log E, and multiplies by the cap's slope afterwards
    takes_log = entropy or (known is not None and known.entropy is not None)
    stores_slope = chunk.has_cap and not takes_log
    with torch.cuda.device_of(hidden):
        reference = _reference(chunk, head.shard) if known is None else known.reference
        options = {"moments": entropy and known is None, "stores_slope": stores_slope}
        kept = None
        if tile is not None:
            if keeps:
                kept = memory[: len(hidden), : head.vocabulary]
            sums, moments = exp_product(kept, chunk, reference, tile, sums=known is None, **options)
        else:
            products = memory[: len(hidden), : head.vocabulary]
            replace(head, bias=None).products_(products, hidden)
            dtype = gradient_dtype(hidden.dtype)
            written, sums, moments = exp_rows_(
                products, chunk, reference, dtype, stores=keeps, **options
            )
            kept = written if keeps else None
        if known is None:
            assert sums is not None
            finish = row_totals if head.shard is None else partial(_totals_over_slices, head)
            known = finish(kept, chunk, reference, sums, moments, stores_slope=stores_slope)
    return HeadSoftmax(chunk, kept, chunk.has_cap and not stores_slope, known)


def _reference(chunk: Chunk, shard: VocabularyShard | None) -> Tensor:
    logits = target_logits(chunk)
    return logits if shard is None else shard.add(logits)


def _totals_over_slices(
    head: LinearHead,
    exponentials: Tensor | None,
    chunk: Chunk,
    reference: Tensor,
    sums: Tensor,
    moments: Tensor | None,
    *,
    stores_slope: bool,
) -> RowStatistics:
    """`row_totals` over all slices; rows out of range, alike on every rank, are done on the host.

    To know whether there are any it waits for the device, as a collective's rows do anyway.
    """
    own = RelativeSums(sums.sum(0), None if moments is None else moments.sum(0))
    whole = own.over(head.shard)
    found = RowStatistics.of_sums(reference, *whole)
    rows = (~(whole.others < LARGEST)).nonzero().squeeze(1)
    if len(rows):
        hidden = chunk.hidden[rows]
        products = head.weight.new_empty((len(rows), head.vocabulary), dtype=torch.float32)
        transform = chunk.transform.take(rows)
        products = head.products_(products, hidden)
        logits = transform.apply(products, out=products)
        slope = transform.slope(logits) if stores_slope else 1.0
        at = TargetColumns(chunk.columns[rows], is_slice=True)
        entropy = moments is not None
        safe = softmax_of_logits(logits, at, entropy=entropy, shard=head.shard, out=logits)
        found.put_(rows, safe)
        if exponentials is not None:
            exponentials[rows] = logits.mul_(slope).to(exponentials.dtype)
    return found
