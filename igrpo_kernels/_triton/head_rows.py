# mypy: disable-error-code="no-untyped-def"
"""The rest of a row of the head, between its products: one program a row.

From log-prob and total to the share in the loss and its gradient: the row's factor c, its hidden
state times c, and E at the target. Then

    gradient of the products = c E,   dX = c (E W),   dW = E' (c X)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_selection import Rows
from ..row_softmax import ProductGradient
from ..row_statistics import RowStatistics
from .chunk import Chunk, contiguous, where
from .clip_terms import ClippedRows, clip_numbers, clip_terms, names_of, span
from .device_math import LEAST, expm1


@triton.jit
def scale_row(
    out_ptr, x_ptr, row, to_row, factor, width, x_stride, out_stride, BLOCK_H: tl.constexpr
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
    factors_ptr, scaled_ptr, e_ptr, x_ptr, references_ptr, row, target, by_logprob, logprob, total,
    temperature, scale, softcap, vocabulary, width, x_stride, e_stride,
    HAS_SOFTCAP: tl.constexpr, IS_WEIGHED: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Write c, the hidden state times c, and -others (times the cap's slope) at the target.

    IS_WEIGHED: E holds the upstream gradient and its target already.
    """
    factor = -by_logprob * (scale / temperature) / total
    tl.store(factors_ptr + row, factor)
    if not IS_WEIGHED:
        at_target = total * expm1(logprob)
        if HAS_SOFTCAP:
            logit = tl.load(references_ptr + row) + (logprob + tl.log(total))
            at_target *= slope_of_cap(logit, temperature, softcap)
        inside = (target >= 0) & (target < vocabulary)
        stored = at_target.to(e_ptr.dtype.element_ty)
        tl.store(e_ptr + row * e_stride + target, stored, mask=inside)
    if SCALES:
        scale_row(scaled_ptr, x_ptr, row, row, factor, width, x_stride, width, BLOCK_H)


@triton.jit
def gradient_rows_kernel(
    factors_ptr, scaled_ptr, e_ptr,  # outputs [N], [N, H] or None; [N, V], written at the targets
    by_logprob_ptr, logprobs_ptr, totals_ptr, references_ptr, targets_ptr,  # inputs [N]
    x_ptr, temperature_ptr,  # inputs [N, H], [N] or [1]
    scale, softcap,  # scalars
    vocabulary, width, x_stride, e_stride, temperature_stride,  # sizes
    HAS_SOFTCAP: tl.constexpr, IS_WEIGHED: tl.constexpr, SCALES: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """From the upstream gradient of a log-prob to the factor of its row."""
    row = tl.program_id(0).to(tl.int64)
    by_logprob = 1.0
    if not IS_WEIGHED:
        by_logprob = tl.load(by_logprob_ptr + row)
    finish_row(
        factors_ptr, scaled_ptr, e_ptr, x_ptr, references_ptr, row, tl.load(targets_ptr + row),
        by_logprob, tl.load(logprobs_ptr + row), tl.load(totals_ptr + row),
        tl.load(temperature_ptr + row * temperature_stride), scale, softcap, vocabulary, width,
        x_stride, e_stride, HAS_SOFTCAP, IS_WEIGHED, SCALES, BLOCK_H,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "first", "advantage_span", "importance_span", "weight_span"])
def clip_rows_kernel(
    terms_ptr, factors_ptr, scaled_ptr, e_ptr,  # outputs [K, N], and as in the kernel above
    logprobs_ptr, entropy_ptr, totals_ptr, references_ptr, targets_ptr, x_ptr, temperature_ptr,
    rows_ptr, old_ptr, ref_ptr,  # where the rows stand in the batch, [N] or None; of the batch, [B]
    advantages_ptr, importance_ptr, weights_ptr,  # of the batch, [B / span]
    low, high, dual, kl_coef, scale, softcap,  # scalars
    rows, first, advantage_span, importance_span, weight_span,  # sizes
    vocabulary, width, x_stride, e_stride, temperature_stride,
    HAS_ROWS: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_IMPORTANCE: tl.constexpr, HAS_GRADIENT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, SCALES: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The whole of a row: ratio, clipped loss, upstream gradient, and what that leaves behind."""
    row = tl.program_id(0).to(tl.int64)
    at = first + row
    if HAS_ROWS:
        at = tl.load(rows_ptr + row)
    logprob = tl.load(logprobs_ptr + row)
    old_logprob, ref_logprob, importance = logprob, logprob, logprob
    if HAS_OLD:
        old_logprob = tl.load(old_ptr + at)
    if HAS_REF:
        ref_logprob = tl.load(ref_ptr + at)
    if HAS_IMPORTANCE:
        importance = tl.load(importance_ptr + at // importance_span)
    advantage = tl.load(advantages_ptr + at // advantage_span)
    loss, slope, ratio, is_low, is_high, k3 = clip_terms(
        logprob, old_logprob, advantage, importance, ref_logprob, low, high, dual, kl_coef,
        HAS_IMPORTANCE, HAS_REF,
    )  # fmt: skip
    weight = tl.load(weights_ptr + at // weight_span)
    terms_ptr += row
    tl.store(terms_ptr, loss * weight)
    tl.store(terms_ptr + rows, logprob)
    tl.store(terms_ptr + 2 * rows, ratio)
    tl.store(terms_ptr + 3 * rows, is_low.to(tl.float32))
    tl.store(terms_ptr + 4 * rows, is_high.to(tl.float32))
    terms_ptr += 5 * rows
    if HAS_REF:
        tl.store(terms_ptr, k3)
        terms_ptr += rows
    if HAS_ENTROPY:
        tl.store(terms_ptr, tl.load(entropy_ptr + row))
        terms_ptr += rows
    if HAS_IMPORTANCE:
        tl.store(terms_ptr, importance)
    if HAS_GRADIENT:
        finish_row(
            factors_ptr, scaled_ptr, e_ptr, x_ptr, references_ptr, row, tl.load(targets_ptr + row),
            slope * weight, logprob, tl.load(totals_ptr + row),
            tl.load(temperature_ptr + row * temperature_stride), scale, softcap, vocabulary, width,
            x_stride, e_stride, HAS_SOFTCAP, False, SCALES, BLOCK_H,
        )  # fmt: skip


@triton.jit
def weigh_rows_kernel(
    e_ptr,  # [N, V], overwritten: exp(z - reference), 0 at the target
    by_logprob_ptr, by_entropy_ptr,  # inputs [N]; None is zero
    logprobs_ptr, entropy_ptr, totals_ptr, references_ptr, targets_ptr, temperature_ptr,  # [N]
    softcap,  # scalar
    vocabulary, e_stride, temperature_stride,  # sizes
    HAS_LOGPROB: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """What the entropy adds to a row's gradient, and the cap's slope: both functions of log E.

    E_j (by_logprob + by_entropy (log p_j + entropy)) slope_j,  log p_j = log E_j - log total
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logprob = tl.load(logprobs_ptr + row)
    total = tl.load(totals_ptr + row)
    log_total = tl.log(total)
    reference = tl.load(references_ptr + row)
    temperature = tl.load(temperature_ptr + row * temperature_stride)
    by_logprob = 0.0
    if HAS_LOGPROB:
        by_logprob = tl.load(by_logprob_ptr + row)
    at_target = by_logprob * total * expm1(logprob)
    by_entropy, entropy = 0.0, 0.0
    if HAS_ENTROPY:
        by_entropy = tl.load(by_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        bounded = tl.maximum(logprob, LEAST)
        at_target += by_entropy * total * tl.exp(bounded) * (bounded + entropy)
    if HAS_SOFTCAP:
        at_target *= slope_of_cap(reference + (logprob + log_total), temperature, softcap)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        inside = columns < vocabulary
        at = e_ptr + row * e_stride + columns
        exponentials = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        shifted = tl.maximum(tl.log(exponentials), LEAST)
        weighed = exponentials * by_logprob
        if HAS_ENTROPY:
            weighed += exponentials * by_entropy * (shifted - log_total + entropy)
        if HAS_SOFTCAP:
            weighed *= slope_of_cap(reference + shifted, temperature, softcap)
        weighed = tl.where(columns == target, at_target, weighed)
        tl.store(at, weighed.to(e_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first"])
def scale_rows_kernel(
    out_ptr, values_ptr, factors_ptr, rows_ptr,  # output [B, H]; inputs [N, H], [N], [N] or None
    first, width, values_stride, out_stride,  # sizes
    HAS_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Rows times their factors, to where they stand in the batch."""
    row = tl.program_id(0).to(tl.int64)
    to_row = first + row
    if HAS_ROWS:
        to_row = tl.load(rows_ptr + row)
    factor = tl.load(factors_ptr + row)
    scale_row(out_ptr, values_ptr, row, to_row, factor, width, values_stride, out_stride, BLOCK_H)


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
    temperature, stride = chunk.temperature
    weigh_rows_kernel[(len(exponentials),)](
        exponentials,
        by_logprob,
        by_entropy,
        found.logprobs,
        found.entropy,
        found.total,
        found.reference,
        chunk.columns,
        temperature,
        chunk.softcap,
        exponentials.shape[1],
        exponentials.stride(0),
        stride,
        HAS_LOGPROB=by_logprob is not None,
        HAS_ENTROPY=by_entropy is not None,
        HAS_SOFTCAP=chunk.has_cap,
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
    temperature, stride = chunk.temperature
    gradient_rows_kernel[(len(exponentials),)](
        gradient.factors,
        gradient.scaled_hidden,
        exponentials,
        by_logprob,
        found.logprobs,
        found.total,
        found.reference,
        chunk.columns,
        chunk.hidden,
        temperature,
        chunk.scale,
        chunk.softcap,
        *chunk.weight.shape,
        chunk.hidden.stride(0),
        exponentials.stride(0),
        stride,
        HAS_SOFTCAP=chunk.has_cap,
        IS_WEIGHED=by_logprob is None,
        SCALES=scales_hidden,
        BLOCK_H=BLOCK_H,
        **FUSION,
    )
    return gradient


def new_gradient(exponentials: Tensor, chunk: Chunk, scales_hidden: bool) -> ProductGradient:
    """Memory for what a row's kernel leaves."""
    scaled = torch.empty_like(chunk.hidden, dtype=exponentials.dtype) if scales_hidden else None
    return ProductGradient(exponentials, chunk.new_rows(), scaled_hidden=scaled)


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
    gradient, stride_of_e = None, 0
    if exponentials is not None:
        gradient = new_gradient(exponentials, chunk, scales_hidden)
        stride_of_e = exponentials.stride(0)
    count = len(chunk.hidden)
    first, index = where(rows)
    inputs = losses.inputs
    terms = found.total.new_empty((1 + len(names_of(inputs, found.entropy)), count))
    shared = (inputs.advantages, inputs.importance_weights, losses.weights)
    tokens = inputs.sequences.mask.numel()
    temperature, stride = chunk.temperature
    clip_rows_kernel[(count,)](
        terms,
        None if gradient is None else gradient.factors,
        None if gradient is None else gradient.scaled_hidden,
        exponentials,
        found.logprobs,
        found.entropy,
        found.total,
        found.reference,
        chunk.columns,
        chunk.hidden,
        temperature,
        index,
        *map(contiguous, (inputs.old_logprobs, inputs.ref_logprobs)),
        *map(contiguous, shared),
        *clip_numbers(losses.objective),
        chunk.scale,
        chunk.softcap,
        count,
        first,
        *(span(values, tokens) for values in shared),
        *chunk.weight.shape,
        chunk.hidden.stride(0),
        stride_of_e,
        stride,
        HAS_ROWS=index is not None,
        HAS_OLD=inputs.old_logprobs is not None,
        HAS_REF=inputs.ref_logprobs is not None,
        HAS_ENTROPY=found.entropy is not None,
        HAS_IMPORTANCE=inputs.importance_weights is not None,
        HAS_GRADIENT=gradient is not None,
        HAS_SOFTCAP=chunk.has_cap,
        SCALES=scales_hidden and gradient is not None,
        BLOCK_H=BLOCK_H,
        **FUSION,
    )
    return terms, gradient


def put_scaled_rows_(out: Tensor, rows: Rows, values: Tensor, factors: Tensor) -> None:
    """Overwrite some rows of a batch by values [N, H] times their factors."""
    first, index = where(rows)
    with torch.cuda.device_of(values):
        scale_rows_kernel[(len(values),)](
            out,
            values,
            factors,
            index,
            first,
            values.shape[1],
            values.stride(0),
            out.stride(0),
            HAS_ROWS=index is not None,
            BLOCK_H=BLOCK_H,
            **FUSION,
        )
