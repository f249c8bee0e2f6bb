# mypy: disable-error-code="no-untyped-def"
"""Before and after the head's product: targets' logits, exponentials of products, sums of rows.

`exp_rows_kernel` takes the place of the fused epilogue where the product is a library's, in fp32;
`row_totals_kernel` brings the sums of the tiles to log-probs, and takes rows out of range again.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_statistics import RowStatistics
from .chunk import Chunk
from .device_math import FLOOR, LEAST, LN2, LOG2E, RANGE, exponents, log1p


@triton.jit
def target_logits_kernel(
    logits_ptr,  # output [N]
    x_ptr, w_ptr, bias_ptr, targets_ptr, temperature_ptr,  # [N, H], [V, H], [V], [N], [N] or [1]
    scale, softcap,  # scalars
    vocabulary, width, x_stride, w_stride, w_step, temperature_stride,  # sizes
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The logit at the target of a row; 0 where that stands in another slice."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int64)
    inside = (target >= 0) & (target < vocabulary)
    readable = tl.where(inside, width, 0)
    product = tl.zeros((BLOCK_H,), tl.float32)
    for start in range(0, width, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        mask = at < readable
        x = tl.load(x_ptr + row * x_stride + at, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + target * w_stride + at * w_step, mask=mask, other=0.0)
        product += x * w.to(tl.float32)
    total = tl.sum(product, 0)
    if HAS_BIAS:
        total += tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
    to_log2 = LOG2E / tl.load(temperature_ptr + row * temperature_stride)
    logit, _ = exponents(total, scale, softcap, to_log2, 0.0, HAS_SOFTCAP)
    tl.store(logits_ptr + row, tl.where(inside, logit * LN2, 0.0))


@triton.jit
def exp_rows_kernel(
    e_ptr, sums_ptr, moments_ptr,  # outputs [N, V] or None, [N], [N] or None
    products_ptr, bias_ptr,  # inputs [N, V] and [V] or None; the former may be e_ptr
    targets_ptr, references_ptr, temperature_ptr,  # [N], [N], [N] or [1]
    scale, softcap,  # scalars
    vocabulary, e_stride, products_stride, temperature_stride,  # sizes
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_MOMENT: tl.constexpr,
    STORES: tl.constexpr, STORES_SLOPE: tl.constexpr, NARROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """exp(z - reference) of a row, 0 at the target, in place of its products; their sum and moment.

    In half the width (NARROWS) they take the first half of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    reference = tl.load(references_ptr + row) * LOG2E
    to_log2 = LOG2E / tl.load(temperature_ptr + row * temperature_stride)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    moments = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocabulary
        products = tl.load(products_ptr + row * products_stride + columns, mask=inside, other=0.0)
        if HAS_BIAS:
            products += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        shifted, slope = exponents(products, scale, softcap, to_log2, reference, HAS_SOFTCAP)
        counts = inside & (columns != target)
        exponentials = tl.where(counts, tl.exp2(shifted), 0.0)
        sums += exponentials
        if HAS_MOMENT:
            moments += exponentials * tl.maximum(shifted, LEAST)
        if STORES:
            if STORES_SLOPE:
                exponentials *= slope
            if NARROWS:  # the first block overwrites products that other threads still load
                tl.debug_barrier()
            stored = exponentials.to(e_ptr.dtype.element_ty)
            tl.store(e_ptr + row * e_stride + columns, stored, mask=inside)
    tl.store(sums_ptr + row, tl.sum(sums, 0))
    if HAS_MOMENT:
        tl.store(moments_ptr + row, tl.sum(moments, 0) * LN2)


@triton.jit
def products_tile(
    x_ptr, w_ptr, bias_ptr, row, column, rows, vocabulary, width, x_stride, w_stride, w_step,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Products of some rows and columns, x W' + b, by plain loads."""
    columns = column + tl.arange(0, BLOCK_V)
    products = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    w_ptr += columns.to(tl.int64)[None, :] * w_stride
    x_ptr += row[:, None] * x_stride
    for start in range(0, width, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        x_mask = (row < rows)[:, None] & (at < width)[None, :]
        x = tl.load(x_ptr + at[None, :], mask=x_mask, other=0.0)
        w_mask = (at < width)[:, None] & (columns < vocabulary)[None, :]
        w = tl.load(w_ptr + at[:, None] * w_step, mask=w_mask, other=0.0)
        products = tl.dot(x, w, products, input_precision="ieee")
    if HAS_BIAS:
        bias = tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0)
        products += bias.to(tl.float32)[None, :]
    return products, columns


@triton.jit(do_not_specialize=["rows", "tiles"])
def row_totals_kernel(
    logprobs_ptr, entropy_ptr, references_ptr, totals_ptr,  # outputs [N]
    e_ptr,  # [N, V] or None; rows out of range are written again
    sums_ptr, moments_ptr, target_logits_ptr,  # inputs [tiles of V, N] twice, [N]
    x_ptr, w_ptr, bias_ptr, targets_ptr, temperature_ptr,  # as in the other kernels
    scale, softcap,  # scalars
    rows, tiles, vocabulary, width,  # sizes
    x_stride, w_stride, w_step, e_stride, temperature_stride,  # strides
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_MOMENT: tl.constexpr,
    STORES: tl.constexpr, STORES_SLOPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Add up the tiles' sums, and finish log-prob and entropy.

    Where a block has a row out of range it takes its product again, twice: for the maximum, and for
    exponentials relative to that. No row that is in range changes, and no host has to know.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = row < rows
    others = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, tiles, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        at = tile.to(tl.int64)[:, None] * rows + row[None, :]
        mask = (tile < tiles)[:, None] & inside[None, :]
        others += tl.sum(tl.load(sums_ptr + at, mask=mask, other=0.0), 0)
        if HAS_MOMENT:
            moment += tl.sum(tl.load(moments_ptr + at, mask=mask, other=0.0), 0)
    target_logit = tl.load(target_logits_ptr + row, mask=inside, other=0.0)
    reference = target_logit
    redone = inside & ((others < RANGE) == 0)  # inf and NaN too
    if tl.max(redone.to(tl.int32), 0) > 0:
        target = tl.load(targets_ptr + row, mask=inside, other=-1)
        temperature = tl.load(temperature_ptr + row * temperature_stride, mask=inside, other=1.0)
        to_log2 = LOG2E / temperature
        highest = tl.full((BLOCK_N,), FLOOR, tl.float32)
        for column in range(0, vocabulary, BLOCK_V):
            products, columns = products_tile(
                x_ptr, w_ptr, bias_ptr, row, column, rows, vocabulary, width,
                x_stride, w_stride, w_step, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            logits, _ = exponents(products, scale, softcap, to_log2[:, None], 0.0, HAS_SOFTCAP)
            logits = tl.where((columns < vocabulary)[None, :], logits, FLOOR)
            highest = tl.maximum(highest, tl.max(logits, 1))
        again = tl.zeros((BLOCK_N,), tl.float32)
        moment_again = tl.zeros((BLOCK_N,), tl.float32)
        for column in range(0, vocabulary, BLOCK_V):
            products, columns = products_tile(
                x_ptr, w_ptr, bias_ptr, row, column, rows, vocabulary, width,
                x_stride, w_stride, w_step, HAS_BIAS, BLOCK_N, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            shifted, slope = exponents(
                products, scale, softcap, to_log2[:, None], highest[:, None], HAS_SOFTCAP
            )
            here = (columns < vocabulary)[None, :]
            counts = here & (columns[None, :] != target[:, None])
            exponentials = tl.where(counts, tl.exp2(shifted), 0.0)
            again += tl.sum(exponentials, 1)
            if HAS_MOMENT:
                moment_again += tl.sum(exponentials * tl.maximum(shifted, LEAST), 1) * LN2
            if STORES:
                if STORES_SLOPE:
                    exponentials *= slope
                tl.store(
                    e_ptr + row[:, None] * e_stride + columns[None, :],
                    exponentials.to(e_ptr.dtype.element_ty),
                    mask=redone[:, None] & here,
                )
        others = tl.where(redone, again, others)
        moment = tl.where(redone, moment_again, moment)
        reference = tl.where(redone, highest * LN2, reference)

    # total = e^gap + others, and by log1p where that is 1 + others: a confident token keeps digits
    gap = tl.where(redone, target_logit - reference, 0.0)
    at_target = tl.exp(gap)
    excess = others + tl.where(redone, at_target - 1.0, 0.0)
    log_total = log1p(excess)
    tl.store(logprobs_ptr + row, gap - log_total, mask=inside)
    tl.store(references_ptr + row, reference, mask=inside)
    tl.store(totals_ptr + row, 1.0 + excess, mask=inside)
    if HAS_MOMENT:
        mean = (moment + at_target * tl.maximum(gap, LEAST)) / (1.0 + excess)
        tl.store(entropy_ptr + row, log_total - mean, mask=inside)


BLOCK_V = 4096
BLOCK_H = 1024
TOTALS = {
    "BLOCK_T": 32,
    "BLOCK_N": 64,
    "BLOCK_V": 32,
    "BLOCK_H": 32,
    "num_warps": 8,
    "num_stages": 2,
}
FUSION = {"enable_fp_fusion": True}


def target_logits(chunk: Chunk) -> Tensor:
    """Return the logit at each target; 0 where that is not among the columns. Shape [N]."""
    logits = chunk.new_rows()
    temperature, stride = chunk.temperature
    target_logits_kernel[(len(logits),)](
        logits,
        chunk.hidden,
        chunk.weight,
        chunk.bias,
        chunk.columns,
        temperature,
        chunk.scale,
        chunk.softcap,
        *chunk.weight.shape,
        chunk.hidden.stride(0),
        *chunk.weight.stride(),
        stride,
        HAS_BIAS=chunk.bias is not None,
        HAS_SOFTCAP=chunk.has_cap,
        BLOCK_H=BLOCK_H,
        **FUSION,
    )
    return logits


def exp_rows_(
    products: Tensor,
    chunk: Chunk,
    references: Tensor,
    dtype: torch.dtype,
    *,
    moments: bool,
    stores: bool,
    stores_slope: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Overwrite products by exponentials; return these, and their sums and moments. [1, N].

    In a dtype of half the width they take the first half of each row.
    """
    rows, vocabulary = products.shape
    narrows = dtype != products.dtype
    exponentials = products.view(dtype)[:, :vocabulary] if narrows else products
    sums, found = products.new_empty((1, rows)), products.new_empty((1, rows)) if moments else None
    temperature, stride = chunk.temperature
    exp_rows_kernel[(rows,)](
        exponentials,
        sums,
        found,
        products,
        chunk.bias,
        chunk.columns,
        references,
        temperature,
        chunk.scale,
        chunk.softcap,
        vocabulary,
        exponentials.stride(0),
        products.stride(0),
        stride,
        HAS_BIAS=chunk.bias is not None,
        HAS_SOFTCAP=chunk.has_cap,
        HAS_MOMENT=moments,
        STORES=stores,
        STORES_SLOPE=stores_slope,
        NARROWS=narrows,
        BLOCK_V=BLOCK_V,
        num_warps=8,
        **FUSION,
    )
    return exponentials, sums, found


def row_totals(
    exponentials: Tensor | None,
    chunk: Chunk,
    target_logits: Tensor,
    sums: Tensor,
    moments: Tensor | None,
    *,
    stores_slope: bool,
) -> RowStatistics:
    """Finish the rows from what their tiles add up to. Shape [tiles, N] of sums and moments."""
    logprobs, reference, total = (chunk.new_rows() for _ in range(3))
    entropy = None if moments is None else chunk.new_rows()
    temperature, stride = chunk.temperature
    row_totals_kernel[(triton.cdiv(len(total), TOTALS["BLOCK_N"]),)](
        logprobs,
        entropy,
        reference,
        total,
        exponentials,
        sums,
        moments,
        target_logits,
        chunk.hidden,
        chunk.weight,
        chunk.bias,
        chunk.columns,
        temperature,
        chunk.scale,
        chunk.softcap,
        len(total),
        len(sums),
        *chunk.weight.shape,
        chunk.hidden.stride(0),
        *chunk.weight.stride(),
        0 if exponentials is None else exponentials.stride(0),
        stride,
        HAS_BIAS=chunk.bias is not None,
        HAS_SOFTCAP=chunk.has_cap,
        HAS_MOMENT=moments is not None,
        STORES=exponentials is not None,
        STORES_SLOPE=stores_slope,
        **TOTALS,
        **FUSION,
    )
    return RowStatistics(logprobs, entropy, reference, total)
