"""A chunk of rows through head and softmax on a CPU: the product, then the exponentials in place.

One of the two modules behind `head_softmax`, whose docstring specifies the functions.
"""

from torch import Tensor

from .linear_head import LinearHead
from .relative_softmax import SoftmaxRows, exponentials, relative_sums, softmax_of_logits
from .row_selection import row_slices, take, working_dtype
from .row_softmax import LogitTransform
from .row_statistics import LARGEST, RowStatistics

# fp32 logits held at a time. Larger chunks spend less on accumulating dW, smaller ones hold less.
CHUNK_BYTES = 2**28


def budget(head: LinearHead) -> int:
    """Bytes held at a time."""
    return CHUNK_BYTES if head.chunk_bytes is None else head.chunk_bytes


def rows_per_chunk(head: LinearHead, count: int, keeps: bool) -> int:
    """How many rows of fp32 logits fit the budget; at least one."""
    return max(1, budget(head) // (4 * head.widest))


def new_memory(head: LinearHead, rows: int, keeps: bool) -> Tensor:
    """Memory for the logits of a chunk."""
    return head.weight.new_empty((rows, head.vocabulary), dtype=working_dtype(head.weight.dtype))


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
) -> SoftmaxRows:
    """Take a chunk through head and softmax."""
    at = head.columns(targets)
    products = head.products_(memory, hidden)
    if known is not None:
        for some in row_slices(products):
            piece, reference = take(products, some), take(known.reference, some)[:, None]
            exponentials(piece, transform.take(some), reference, out=piece)
        return SoftmaxRows(known, at, transform, products)
    reference = transform.apply(at.read(products))
    if head.shard is not None:
        reference = head.shard.add(reference)
    sums = relative_sums(products, at, transform, reference, entropy=entropy, out=products)
    sums = sums.over(head.shard)
    found = RowStatistics.of_sums(reference.squeeze(1), *sums)
    if not sums.others.max().item() < LARGEST:  # or there is a NaN
        rows = (~(sums.others < LARGEST)).nonzero().squeeze(1)
        again = head.products_(new_memory(head, rows.shape[0], keeps), hidden[rows])
        logits = transform.take(rows).apply(again, out=again)
        safe = softmax_of_logits(
            logits, at.take(rows), entropy=entropy, shard=head.shard, out=logits
        )
        found.put_(rows, safe)
        products[rows] = logits
    return SoftmaxRows(found, at, transform, products)
