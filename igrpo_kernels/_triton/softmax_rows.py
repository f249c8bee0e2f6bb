# mypy: disable-error-code="no-untyped-def"
"""The row kernels: log-prob and entropy of rows of logits, and the gradient, in place or not.

One program per row, on axis 0 of the grid alone (the others end at 65,535). Logits may be fp32,
bf16 or fp16 and are cast to fp32 right after the load; scalars are run-time arguments.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import describe
from ..relative_softmax import LogitTransform
from ..row_statistics import RowStatistics, SoftmaxStatistics
from ..vocabulary_shard import VocabularyShard
from .online_softmax import FLOOR, LEAST, cap, fold, merge, row_start, transform

BLOCK_V = 4096
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def softmax_rows_fwd_kernel(
    logprobs_ptr, entropy_ptr, maximum_ptr, normalizer_ptr,  # outputs [N]
    products_ptr, targets_ptr, mask_ptr, temperature_ptr,  # inputs [N, V], [N], [N], [N] or [1]
    logit_scale, softcap,  # scalars
    vocabulary, inner_size,  # sizes
    outer_stride, inner_stride, temperature_stride,  # strides
    HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_SLICE: tl.constexpr, BLOCK_V: tl.constexpr, LANE_WIDTH: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    target = tl.load(targets_ptr + row)
    readable = vocabulary
    if HAS_MASK:  # a row left out is not read; its target may be anything
        counts = tl.load(mask_ptr + row) != 0
        target = tl.where(counts, target, 0)
        readable = tl.where(counts, vocabulary, 0)
    products_ptr += row_start(row, inner_size, outer_stride, inner_stride)
    LANES: tl.constexpr = BLOCK_V // LANE_WIDTH
    maximum = tl.full((LANES,), FLOOR, tl.float32)
    normalizer = tl.zeros((LANES,), tl.float32)
    moment = tl.zeros((LANES,), tl.float32)
    lane = tl.arange(0, LANES)[:, None]
    within = tl.arange(0, LANE_WIDTH)[None, :]
    lanes = LANE_WIDTH * lane + within if ALIGNED else lane + LANES * within
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + lanes
        products = tl.load(products_ptr + columns, mask=columns < readable, other=0.0)
        logits = transform(
            products.to(tl.float32), logit_scale, softcap, inverse_temperature, HAS_SOFTCAP
        )
        logits = tl.where(columns < vocabulary, logits, -float("inf"))
        maximum, normalizer, moment = fold(maximum, normalizer, moment, logits, HAS_ENTROPY)
    maximum, normalizer, moment = merge(maximum, normalizer, moment, HAS_ENTROPY)

    inside = (target >= 0) & (target < vocabulary)
    product = tl.load(products_ptr + target, mask=inside, other=0.0).to(tl.float32)
    logit = transform(product, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
    if IS_SLICE:  # what merges, instead of what it merges to
        logprob = tl.where(inside, logit, -float("inf"))
        entropy = moment
    else:
        logprob = (logit - maximum) - tl.log(normalizer)
        entropy = tl.log(normalizer) - moment / normalizer
    if HAS_MASK:
        logprob = tl.where(counts, logprob, 0.0)
        entropy = tl.where(counts, entropy, 0.0)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(maximum_ptr + row, maximum)
    tl.store(normalizer_ptr + row, normalizer)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, entropy)


@triton.jit
def softmax_rows_bwd_kernel(
    grad_ptr,  # output [N, V]; may be products_ptr, in its dtype or (NARROWS) in half its width
    products_ptr, targets_ptr, mask_ptr, temperature_ptr,  # inputs, as in the forward
    maximum_ptr, normalizer_ptr, entropy_ptr,  # what the forward left, [N]
    grad_logprobs_ptr, grad_entropy_ptr,  # upstream gradients, [N]
    logit_scale, softcap,  # scalars
    vocabulary, inner_size,  # sizes
    grad_outer_stride, grad_inner_stride, outer_stride, inner_stride, temperature_stride,
    HAS_MASK: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    NARROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    grad_logprob = tl.load(grad_logprobs_ptr + row)
    # A row of no upstream gradient is not read, and gets exact zeros
    active = grad_logprob != 0
    if HAS_ENTROPY:
        grad_entropy = tl.load(grad_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        active |= grad_entropy != 0
    if HAS_MASK:
        active &= tl.load(mask_ptr + row) != 0
    inverse_temperature = 1.0 / tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    maximum = tl.load(maximum_ptr + row)
    normalizer = tl.load(normalizer_ptr + row)
    inverse_normalizer = 1.0 / normalizer
    target = tl.load(targets_ptr + row)
    readable = tl.where(active, vocabulary, 0)
    products_ptr += row_start(row, inner_size, outer_stride, inner_stride)
    grad_ptr += row_start(row, inner_size, grad_outer_stride, grad_inner_stride)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        products = tl.load(products_ptr + columns, mask=columns < readable, other=0.0)
        products = products.to(tl.float32)
        logits = transform(products, logit_scale, softcap, inverse_temperature, HAS_SOFTCAP)
        probs = tl.exp(logits - maximum) * inverse_normalizer
        grad = grad_logprob * (tl.where(columns == target, 1.0, 0.0) - probs)
        if HAS_ENTROPY:
            log_probs = tl.maximum(logits - maximum, LEAST) - tl.log(normalizer)
            grad -= grad_entropy * probs * (log_probs + entropy)
        grad *= inverse_temperature * logit_scale
        if HAS_SOFTCAP:
            slope = cap(products * logit_scale, softcap)
            grad *= 1 - slope * slope
        grad = tl.where(active, grad, 0.0).to(grad_ptr.dtype.element_ty)
        if NARROWS:  # the first block's gradients lie on products that other threads still load
            tl.debug_barrier()
        tl.store(grad_ptr + columns, grad, mask=columns < vocabulary)


@dataclass(frozen=True)
class RowLayout:
    """How the rows of a tensor of shape [..., V] lie in memory: as [outer, inner, V]."""

    rows: int
    inner_size: int
    outer_stride: int
    inner_stride: int

    @classmethod
    def of(cls, values: Tensor) -> "RowLayout":
        """Read it off a tensor of at most two leading axes, with neighbors in the vocabulary."""
        if values.dim() == 2:
            return cls(values.shape[0], max(1, values.shape[0]), 0, values.stride(0))
        outer, inner, _ = values.shape
        return cls(outer * inner, max(1, inner), values.stride(0), values.stride(1))


def with_row_layout(values: Tensor) -> Tensor:
    """Return `values` itself where its rows can be walked, as those of logits[:, :-1] can."""
    if values.dim() not in (2, 3):
        values = values.reshape(-1, values.shape[-1])
    return values if values.stride(-1) == 1 else values.contiguous()


def lanes(products: Tensor, layout: RowLayout) -> dict[str, int | bool]:
    """Deal a block's logits to lanes so that one thread holds a lane: no shuffles in the loop.

    Where rows are aligned a thread loads 16 bytes at once, and that is its lane; elsewhere it loads
    one logit at a time, a warp's side by side, and a lane is what a thread sees of a block.
    """
    steps = (products.shape[-1], layout.outer_stride, layout.inner_stride)
    aligned = products.data_ptr() % 16 == 0 and all(step % 16 == 0 for step in steps)
    width = 16 // products.element_size() if aligned else BLOCK_V // (32 * LAUNCH["num_warps"])
    return {"LANE_WIDTH": max(1, width), "ALIGNED": aligned}


def _check_dtype(products: Tensor) -> None:
    if products.dtype == torch.float64:
        raise TypeError(
            "float64 has no kernel: cast to float32, or move the tensors to the CPU, got "
            f"{describe(products)}"
        )


def softmax_rows_forward(
    products: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    transform: LogitTransform,
    *,
    entropy: bool,
    is_slice: bool = False,
) -> RowStatistics:
    """Launch the forward over the rows of `products`, which it leaves as they are.

    Of a slice of the vocabulary it finds the target's logit (-inf where the target is outside of
    the slice) in place of the log-prob, and the moment in place of the entropy.
    """
    _check_dtype(products)
    layout = RowLayout.of(products)
    statistics = [targets.new_empty(layout.rows, dtype=torch.float32) for _ in range(4)]
    result = RowStatistics(statistics[0], statistics[1] if entropy else None, *statistics[2:])
    if not layout.rows:
        return result
    # the kernel runs on the current device, which need not be the tensor's
    with torch.cuda.device_of(products):
        softmax_rows_fwd_kernel[(layout.rows,)](
            *statistics,
            products,
            targets,
            mask,
            transform.temperature,
            float(transform.logit_scale),
            float(transform.softcap or 1.0),
            products.shape[-1],
            layout.inner_size,
            layout.outer_stride,
            layout.inner_stride,
            0 if transform.temperature.numel() == 1 else 1,
            HAS_MASK=mask is not None,
            HAS_ENTROPY=entropy,
            HAS_SOFTCAP=transform.softcap is not None,
            IS_SLICE=is_slice,
            BLOCK_V=BLOCK_V,
            **lanes(products, layout),
            **LAUNCH,
        )
    return result


def softmax_rows_backward(
    grad: Tensor,
    products: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    transform: LogitTransform,
    statistics: RowStatistics,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Launch the backward: write the products' gradient to `grad`.

    That may be `products`, or the first half of each of its rows seen in a dtype of half the width.
    """
    layout, grad_layout = RowLayout.of(products), RowLayout.of(grad)
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(statistics.logprobs)
    if not layout.rows:
        return grad
    with torch.cuda.device_of(products):
        softmax_rows_bwd_kernel[(layout.rows,)](
            grad,
            products,
            targets,
            mask,
            transform.temperature,
            statistics.reference,
            statistics.total,
            statistics.entropy,
            grad_logprobs.contiguous(),
            None if grad_entropy is None else grad_entropy.contiguous(),
            float(transform.logit_scale),
            float(transform.softcap or 1.0),
            products.shape[-1],
            layout.inner_size,
            grad_layout.outer_stride,
            grad_layout.inner_stride,
            layout.outer_stride,
            layout.inner_stride,
            0 if transform.temperature.numel() == 1 else 1,
            HAS_MASK=mask is not None,
            HAS_ENTROPY=grad_entropy is not None,
            HAS_SOFTCAP=transform.softcap is not None,
            NARROWS=grad.data_ptr() == products.data_ptr() and grad.dtype != products.dtype,
            BLOCK_V=BLOCK_V,
            **LAUNCH,
        )
    return grad


@dataclass(frozen=True)
class TritonSoftmaxRows:
    """A chunk of rows after the forward kernel: `SoftmaxRows`, with the products left in place.

    Attributes:
        products: In the caller's buffer. Shape [N, V].
        targets: Index into the vocabulary. Shape [N].
        transform: Scale, cap and temperature of these rows.
        found: What the forward kernel left of all rows.
        kept: Index of the rows that `keep_` left; None for all.
    """

    products: Tensor
    targets: Tensor
    transform: LogitTransform
    found: RowStatistics
    kept: Tensor | None = None

    @property
    def statistics(self) -> RowStatistics:
        """Log-prob, entropy, maximum and normalizer of each row that was kept."""
        return self.found if self.kept is None else self.found.take(self.kept)

    def keep_(self, rows: Tensor) -> "TritonSoftmaxRows":
        """Keep some rows, in ascending order; nothing moves before the gradient is there."""
        return replace(self, kept=rows if self.kept is None else self.kept[rows])

    def gradient_(
        self,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None = None,
        *,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Overwrite the products by their gradient; to be called once. Shape [N, V].

        In half the width it takes the first half of each row's memory, and the rows that are kept
        move to the second halves: neither needs memory of its own.
        """
        products, vocabulary = self.products, self.products.shape[1]
        halves = products if dtype in (None, products.dtype) else products.view(dtype)
        grad = softmax_rows_backward(
            halves[:, :vocabulary],
            products,
            self.targets,
            None,
            self.transform,
            self.found,
            self._spread(grad_logprobs),
            self._spread(grad_entropy),
        )
        if self.kept is None:
            return grad
        if halves is products:
            return grad[self.kept]
        second = halves[: len(self.kept), vocabulary:]
        return torch.index_select(grad, 0, self.kept, out=second)

    def _spread(self, upstream: Tensor | None) -> Tensor | None:
        """Give every row of the products its upstream gradient: zero unless it was kept."""
        if upstream is None or self.kept is None:
            return upstream
        every = upstream.new_zeros(len(self.products))
        return every.index_copy_(0, self.kept, upstream)


def softmax_rows_(
    products: Tensor,
    targets: Tensor,
    transform: LogitTransform,
    *,
    entropy: bool = False,
    shard: VocabularyShard | None = None,
    known: RowStatistics | None = None,
) -> TritonSoftmaxRows:
    """Take log-probs (and entropy) of a chunk of rows. See the twin in `..softmax_rows`."""
    if known is not None:
        return TritonSoftmaxRows(products, targets, transform, known)
    found = softmax_rows_forward(
        products, targets, None, transform, entropy=entropy, is_slice=shard is not None
    )
    if shard is not None:
        own = SoftmaxStatistics(found.reference, found.total, found.logprobs, found.entropy)
        found = shard.merge(own).rows
    return TritonSoftmaxRows(products, targets, transform, found)
