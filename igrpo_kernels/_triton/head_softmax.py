"""A chunk of rows through head and softmax on CUDA: cuBLAS's product in fp32, then the row kernels.

One of the two modules behind `..head_softmax`, which says what the functions owe their caller.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linear_head import LinearHead
from ..relative_softmax import LogitTransform, ProductGradient
from ..row_selection import working_dtype
from ..row_statistics import RowStatistics
from .softmax_rows import TritonSoftmaxRows, softmax_rows_

CHUNK_BYTES = 2**32 + 2**30


def rows_per_chunk(head: LinearHead, keeps: bool) -> int:
    """How many rows of fp32 logits fit the budget; at least one."""
    budget = CHUNK_BYTES if head.chunk_bytes is None else head.chunk_bytes
    return max(1, budget // (4 * head.widest))


def new_memory(head: LinearHead, rows: int, keeps: bool) -> Tensor:
    """Memory for the logits of a chunk."""
    return head.weight.new_empty((rows, head.vocabulary), dtype=working_dtype(head.weight.dtype))


@dataclass(frozen=True)
class HeadSoftmax:
    """`RowSoftmax` over the row kernels."""

    inner: TritonSoftmaxRows

    @property
    def statistics(self) -> RowStatistics:
        """What the softmax left of each row."""
        return self.inner.statistics

    def gradient_(
        self, by_logprob: Tensor | None, by_entropy: Tensor | None = None, *, dtype: torch.dtype
    ) -> ProductGradient:
        """Overwrite the products by their gradient; rows without an upstream one get zeros."""
        return ProductGradient(self.inner.gradient_(by_logprob, by_entropy, dtype=dtype))


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
    products, columns = head.products_(memory, hidden), head.columns(targets).columns
    transform = replace(transform, temperature=transform.temperature_tensor(hidden))
    given = {"entropy": entropy, "shard": head.shard, "known": known}
    return HeadSoftmax(softmax_rows_(products, columns, transform, **given))
