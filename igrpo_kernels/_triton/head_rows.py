# mypy: disable-error-code="no-untyped-def"
"""The rest of a row of the head, between its products: one program a row.

From log-prob and total to the share in the loss and its gradient: the row's factor c, its hidden
state times c, and E at the target. Then

    gradient of the products = c E,   dX = c (E W),   dW = E' (c X)
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_selection import Rows
from ..row_softmax import ProductGradient
from ..row_statistics import RowStatistics
from .chunk import Chunk, rows_of, where
from .clip_terms import ClippedRows, clip_arguments, clip_terms, names_of, store_terms
from .device_math import LEAST, expm1, surprise


@triton.jit
def scale_row(
    out_ptr, out_stride, to_row, x_ptr, x_stride, row, factor, width, BLOCK_H: tl.constexpr
):
    """A row times its factor, rounded once."""
    for start in range(0, width, BLOCK_H):
        at = start + tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + row * x_stride + at, mask=at < width, other=0.0).to(tl.float32)
        scaled = (x * factor).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + to_row * out_stride + at, scaled, mask=at < width)


@triton.jit
def slope_of_cap(logits, temperature, softcap):
    """Of cap at these logits: 1 - (z temperature / softcap)^2."""
    capped = logits * (temperature / softcap)
    return 1 - capped * capped


@triton.jit
def finish_row(
    factors_ptr, scaled_ptr, e_ptr, e_stride, row, by_logprob, logprob, references_ptr, totals_ptr,
    x_ptr, x_stride, targets_ptr, vocabulary, width,
    scale, softcap, temperature_ptr, temperature_stride,
    IS_WEIGHED: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write c, the hidden state times c, and -others (times the cap's slope) at the target.

    IS_WEIGHED: E holds the upstream gradient and its target already.
    """
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    total = tl.load(totals_ptr + row)
    factor = -by_logprob * (scale / temperature) / total
    tl.store(factors_ptr + row, factor)
    if not IS_WEIGHED:
        at_target = total * expm1(logprob)
        if softcap is not None:
            logit = tl.load(references_ptr + row) + (logprob + tl.log(total))
            at_target *= slope_of_cap(logit, temperature, softcap)
        target = tl.load(targets_ptr + row)
        inside = (target >= 0) & (target < vocabulary)
        stored = at_target.to(e_ptr.dtype.element_ty)
        tl.store(e_ptr + row * e_stride + target, stored, mask=inside)
    if scaled_ptr is not None:
        scale_row(scaled_ptr, width, row, x_ptr, x_stride, row, factor, width, BLOCK_H)


@triton.jit
def gradient_rows_kernel(
    factors_ptr, scaled_ptr, e_ptr, e_stride,  # outputs [N], [N, H] or None; [N, V], at the targets
    by_logprob_ptr,  # input [N]; None: E has been weighed by it
    logprobs_ptr, references_ptr, totals_ptr,  # inputs [N]
    x_ptr, x_stride, targets_ptr, vocabulary, width,  # inputs [N, H], [N]
    scale, softcap, temperature_ptr, temperature_stride,  # number, it or None, [N] or [1]
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """From the upstream gradient of a log-prob to the factor of its row."""
    row = tl.program_id(0).to(tl.int64)
    by_logprob = 1.0
    if by_logprob_ptr is not None:
        by_logprob = tl.load(by_logprob_ptr + row)
    finish_row(
        factors_ptr, scaled_ptr, e_ptr, e_stride, row, by_logprob, tl.load(logprobs_ptr + row),
        references_ptr, totals_ptr, x_ptr, x_stride, targets_ptr, vocabulary, width, scale, softcap,
        temperature_ptr, temperature_stride, by_logprob_ptr is None, BLOCK_H,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first", "advantage_span", "importance_span", "weight_span"])
def clip_rows_kernel(
    terms_ptr, factors_ptr, scaled_ptr, e_ptr, e_stride,  # outputs [K, N], and as above or None
    logprobs_ptr, entropy_ptr, references_ptr, totals_ptr,  # inputs [N]; the second may be None
    x_ptr, x_stride, targets_ptr, vocabulary, width,  # inputs [N, H], [N]
    scale, softcap, temperature_ptr, temperature_stride,  # number, it or None, [N] or [1]
    rows, first, rows_ptr,  # N; where the rows stand in the batch: from here on, or [N]
    old_ptr, ref_ptr, advantages_ptr, importance_ptr, weights_ptr,  # as in `clip_terms`
    advantage_span, importance_span, weight_span, low, high, dual, kl_coef,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The whole of a row: ratio, clipped loss, upstream gradient, and what that leaves behind."""
    row = tl.program_id(0).to(tl.int64)
    at = first + row
    if rows_ptr is not None:
        at = tl.load(rows_ptr + row)
    logprob = tl.load(logprobs_ptr + row)
    loss, slope, ratio, is_low, is_high, k3, importance = clip_terms(
        at, at >= 0, logprob, old_ptr, ref_ptr, advantages_ptr, importance_ptr, weights_ptr,
        advantage_span, importance_span, weight_span, low, high, dual, kl_coef, True,
    )  # fmt: skip
    entropy = logprob
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + row)
    store_terms(
        terms_ptr + row, rows, loss, logprob, ratio, is_low, is_high, k3, entropy, importance,
        ref_ptr, entropy_ptr, importance_ptr,
    )  # fmt: skip
    if e_ptr is not None:
        finish_row(
            factors_ptr, scaled_ptr, e_ptr, e_stride, row, slope, logprob, references_ptr,
            totals_ptr, x_ptr, x_stride, targets_ptr, vocabulary, width, scale, softcap,
            temperature_ptr, temperature_stride, False, BLOCK_H,
        )  # fmt: skip


@triton.jit
def weigh_rows_kernel(
    e_ptr, e_stride,  # [N, V], overwritten: exp(z - reference), 0 at the target
    by_logprob_ptr, by_entropy_ptr,  # inputs [N]; None is zero
    logprobs_ptr, entropy_ptr, references_ptr, totals_ptr,  # inputs [N]
    targets_ptr, vocabulary,  # input [N]
    softcap, temperature_ptr, temperature_stride,  # number or None, [N] or [1]
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the entropy adds to a row's gradient, and the cap's slope: both functions of log E.

    E_j (by_logprob + by_entropy (log p_j + entropy)) slope_j,  log p_j = log E_j - log total
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row).to(tl.int32)
    logprob = tl.load(logprobs_ptr + row)
    total = tl.load(totals_ptr + row)
    log_total = tl.log(total)
    reference = tl.load(references_ptr + row)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    by_logprob = 0.0
    if by_logprob_ptr is not None:
        by_logprob = tl.load(by_logprob_ptr + row)
    at_target = by_logprob * total * expm1(logprob)
    by_entropy, entropy = 0.0, 0.0
    if by_entropy_ptr is not None:
        by_entropy = tl.load(by_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        at_target += by_entropy * total * surprise(logprob, entropy)
    if softcap is not None:
        at_target *= slope_of_cap(reference + (logprob + log_total), temperature, softcap)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocabulary
        at = e_ptr + row * e_stride + columns
        exponentials = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.maximum(tl.log(exponentials), LEAST)
        weighed = exponentials * by_logprob
        if by_entropy_ptr is not None:
            weighed += exponentials * by_entropy * (shifted - log_total + entropy)
        if softcap is not None:
            weighed *= slope_of_cap(reference + shifted, temperature, softcap)
        weighed = tl.where(columns == target, at_target, weighed)
        tl.store(at, weighed.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def scale_rows_kernel(
    out_ptr, out_stride, first, rows_ptr,  # output [B, H]; where the rows stand in it, [N] or None
    products_ptr, products_stride, factors_ptr, width,  # inputs [N, H], [N]
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows times their factors, to where they stand in the batch."""
    row = tl.program_id(0).to(tl.int64)
    to_row = first + row
    if rows_ptr is not None:
        to_row = tl.load(rows_ptr + row)
    factor = tl.load(factors_ptr + row)
    scale_row(
        out_ptr, out_stride, to_row, products_ptr, products_stride, row, factor, width, BLOCK_H
    )


BLOCK_V = 4096
BLOCK_H = 1024
FUSION = {"enable_fp_fusion": True}


def weigh_rows_(
    exponentials: Tensor,
    chunk: Chunk,
    found: RowStatistics,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
) -> None:
    """Multiply rows of E by their upstream gradients and the cap's slope, targets included."""
    weigh_rows_kernel[(len(exponentials),)](
        *rows_of(exponentials),
        by_logprob,
        by_entropy,
        *found,
        chunk.columns,
        exponentials.shape[1],
        *chunk.to_logits[1:],
        BLOCK_V=BLOCK_V,
        num_warps=8,
        **FUSION,
    )


def gradient_rows(
    exponentials: Tensor,
    chunk: Chunk,
    found: RowStatistics,
    by_logprob: Tensor | None,
    *,
    scales_hidden: bool,
) -> ProductGradient:
    """Finish rows of E and their factors; without `by_logprob` E has been weighed already."""
    gradient = new_gradient(exponentials, chunk, scales_hidden)
    gradient_rows_kernel[(len(exponentials),)](
        *outputs_of(gradient),
        by_logprob,
        found.logprobs,
        found.reference,
        found.total,
        *chunk.of_rows,
        BLOCK_H=BLOCK_H,
        **FUSION,
    )
    return gradient


def new_gradient(exponentials: Tensor, chunk: Chunk, scales_hidden: bool) -> ProductGradient:
    """Memory for what a row's kernel leaves."""
    scaled = torch.empty_like(chunk.hidden, dtype=exponentials.dtype) if scales_hidden else None
    return ProductGradient(exponentials, chunk.new_rows(), scaled_hidden=scaled)


def outputs_of(gradient: ProductGradient | None) -> tuple[Any, ...]:
    """Kernel arguments: factors_ptr, scaled_ptr, e_ptr, e_stride."""
    if gradient is None:
        return None, None, None, 0
    return gradient.factors, gradient.scaled_hidden, *rows_of(gradient.matrix)


def clip_rows(
    exponentials: Tensor | None,
    chunk: Chunk,
    found: RowStatistics,
    losses: ClippedRows,
    rows: Rows,
    *,
    scales_hidden: bool,
) -> tuple[Tensor, ProductGradient | None]:
    """Take rows from log-prob to gradient in one launch; return their terms too.

    The terms are the loss, and those of `names_of`. Shape [K, N].
    """
    gradient = None
    if exponentials is not None:
        gradient = new_gradient(exponentials, chunk, scales_hidden)
    count, inputs = len(chunk.hidden), losses.inputs
    terms = found.total.new_empty((1 + len(names_of(inputs, found.entropy)), count))
    clip_rows_kernel[(count,)](
        terms,
        *outputs_of(gradient),
        *found,
        *chunk.of_rows,
        count,
        *where(rows),
        *clip_arguments(inputs, losses.weights, losses.objective),
        BLOCK_H=BLOCK_H,
        **FUSION,
    )
    return terms, gradient


def put_scaled_rows_(out: Tensor, rows: Rows, values: Tensor, factors: Tensor) -> None:
    """Overwrite some rows of a batch by values [N, H] times their factors."""
    with torch.cuda.device_of(values):
        scale_rows_kernel[(len(values),)](
            *rows_of(out),
            *where(rows),
            *rows_of(values),
            factors,
            values.shape[1],
            BLOCK_H=BLOCK_H,
            **FUSION,
        )
