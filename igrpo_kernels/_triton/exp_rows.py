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
from .chunk import Chunk, rows_of
from .device_math import LEAST, LN2, LOG2E, RANGE, exponents, of_sums


@triton.jit
def target_logits_kernel(
    target_logits_ptr,  # output [N]
    w_ptr, w_stride, w_step, bias_ptr,  # [V, H], [V] or None
    x_ptr, x_stride, targets_ptr, vocabulary, width,  # [N, H], [N]
    scale, softcap, temperature_ptr, temperature_stride,  # number, it or None, [N] or [1]
    BLOCK_H: tl.constexpr,
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
        w_at = target * w_stride + at.to(tl.int64) * w_step
        w = tl.load(w_ptr + w_at, mask=mask, other=0.0)
        product += x * w.to(tl.float32)
    total = tl.sum(product, 0)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
    to_log2 = LOG2E / tl.load(temperature_ptr + row * temperature_stride)
    logit, _ = exponents(total, scale, softcap, to_log2, 0.0)
    tl.store(target_logits_ptr + row, tl.where(inside, logit * LN2, 0.0))


@triton.jit
def exp_rows_kernel(
    e_ptr, e_stride, sums_ptr, moments_ptr,  # outputs [N, V] or None, [N], [N] or None
    products_ptr, products_stride,  # input [N, V]; may be e_ptr
    bias_ptr, targets_ptr, references_ptr, vocabulary,  # [V] or None, [N], [N]
    scale, softcap, temperature_ptr, temperature_stride,  # number, it or None, [N] or [1]
    STORES_SLOPE: tl.constexpr, NARROWS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """exp(z - reference) of a row, 0 at the target, in place of its products; their sum and moment.

    In half the width (NARROWS) they take the first half of the row.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int32)
    reference = tl.load(references_ptr + row) * LOG2E
    to_log2 = LOG2E / tl.load(temperature_ptr + row * temperature_stride)
    sums = tl.zeros((BLOCK_V,), tl.float32)
    moments = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocabulary
        products = tl.load(products_ptr + row * products_stride + columns, mask=inside, other=0.0)
        if bias_ptr is not None:
            products += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
        shifted, slope = exponents(products, scale, softcap, to_log2, reference)
        counts = inside & (columns != target)
        exponentials = tl.where(counts, tl.exp2(shifted), 0.0)
        sums += exponentials
        if moments_ptr is not None:
            moments += exponentials * tl.maximum(shifted, LEAST)
        if e_ptr is not None:
            if STORES_SLOPE:
                exponentials *= slope
            if NARROWS:  # the first block overwrites products that other threads still load
                tl.debug_barrier()
            stored = exponentials.to(e_ptr.dtype.element_ty)
            tl.store(e_ptr + row * e_stride + columns, stored, mask=inside)
    tl.store(sums_ptr + row, tl.sum(sums, 0))
    if moments_ptr is not None:
        tl.store(moments_ptr + row, tl.sum(moments, 0) * LN2)


@triton.jit
def products_tile(
    w_ptr, w_stride, w_step, bias_ptr, x_ptr, x_stride, row, column, rows, vocabulary, width,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
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
        w = tl.load(w_ptr + at.to(tl.int64)[:, None] * w_step, mask=w_mask, other=0.0)
        products = tl.dot(x, w, products, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=columns < vocabulary, other=0.0)
        products += bias.to(tl.float32)[None, :]
    return products, columns


@triton.jit(do_not_specialize=["rows", "tiles"])
def row_totals_kernel(
    logprobs_ptr, entropy_ptr, references_ptr, totals_ptr,  # outputs [N]; the second may be None
    e_ptr, e_stride,  # [N, V] or None; rows out of range are written again
    sums_ptr, moments_ptr, target_logits_ptr, rows, tiles,  # inputs [tiles of V, N] twice, [N]
    w_ptr, w_stride, w_step, bias_ptr, x_ptr, x_stride, targets_ptr, vocabulary, width,
    scale, softcap, temperature_ptr, temperature_stride,  # as in the other kernels
    STORES_SLOPE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
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
        if moments_ptr is not None:
            moment += tl.sum(tl.load(moments_ptr + at, mask=mask, other=0.0), 0)
    target_logit = tl.load(target_logits_ptr + row, mask=inside, other=0.0)
    reference = target_logit
    redone = inside & ((others < RANGE) == 0)  # inf and NaN too
    if tl.max(redone.to(tl.int32), 0) > 0:
        target = tl.load(targets_ptr + row, mask=inside, other=-1)
        temperature = tl.load(temperature_ptr + row * temperature_stride, mask=inside, other=1.0)
        to_log2 = LOG2E / temperature
        highest = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        for column in range(0, vocabulary, BLOCK_V):
            products, columns = products_tile(
                w_ptr, w_stride, w_step, bias_ptr, x_ptr, x_stride, row, column, rows, vocabulary,
                width, BLOCK_N, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            logits, _ = exponents(products, scale, softcap, to_log2[:, None], 0.0)
            logits = tl.where((columns < vocabulary)[None, :], logits, -float("inf"))
            highest = tl.maximum(highest, tl.max(logits, 1))
        again = tl.zeros((BLOCK_N,), tl.float32)
        moment_again = tl.zeros((BLOCK_N,), tl.float32)
        for column in range(0, vocabulary, BLOCK_V):
            products, columns = products_tile(
                w_ptr, w_stride, w_step, bias_ptr, x_ptr, x_stride, row, column, rows, vocabulary,
                width, BLOCK_N, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            shifted, slope = exponents(products, scale, softcap, to_log2[:, None], highest[:, None])
            here = (columns < vocabulary)[None, :]
            counts = here & (columns[None, :] != target[:, None])
            exponentials = tl.where(counts, tl.exp2(shifted), 0.0)
            again += tl.sum(exponentials, 1)
            if moments_ptr is not None:
                moment_again += tl.sum(exponentials * tl.maximum(shifted, LEAST), 1) * LN2
            if e_ptr is not None:
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

    gap = tl.where(redone, target_logit - reference, 0.0)
    logprob, entropy, total = of_sums(others, moment, gap)
    tl.store(logprobs_ptr + row, logprob, mask=inside)
    tl.store(references_ptr + row, reference, mask=inside)
    tl.store(totals_ptr + row, total, mask=inside)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy, mask=inside)


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
    target_logits_kernel[(len(logits),)](
        logits, *chunk.of_weight, *chunk.of_rows, BLOCK_H=BLOCK_H, **FUSION
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
    exp_rows_kernel[(rows,)](
        *rows_of(exponentials if stores else None),
        sums,
        found,
        *rows_of(products),
        chunk.bias,
        chunk.columns,
        references,
        vocabulary,
        *chunk.to_logits,
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
    tiles, rows = sums.shape
    found = chunk.new_statistics(entropy=moments is not None)
    row_totals_kernel[(triton.cdiv(rows, TOTALS["BLOCK_N"]),)](
        *found,
        *rows_of(exponentials),
        sums,
        moments,
        target_logits,
        rows,
        tiles,
        *chunk.of_weight,
        *chunk.of_rows,
        STORES_SLOPE=stores_slope,
        **TOTALS,
        **FUSION,
    )
    return found
