# mypy: disable-error-code="no-untyped-def"
"""Log-probs of logits that are given, on CUDA: rows of [..., V] read in place, one program per row.

The algebra is that of the head: exponentials relative to the target's logit, which is read first,
in one pass without a maximum; a row out of range looks for its maximum and takes them again.
Rows are on axis 0 of the grid alone (the others end at 65,535). Logits may be fp32, bf16 or fp16
and are cast to fp32 right after the load; scalars are run-time arguments.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..checks import describe
from ..row_statistics import RowStatistics
from .chunk import contiguous
from .device_math import LEAST, LN2, LOG2E, RANGE, expm1, of_sums, surprise

BLOCK_V = 4096
LAUNCH = {"num_warps": 8, "enable_fp_fusion": True}


@triton.jit
def row_start(row, inner_size, outer_stride, inner_stride):
    """Offset of a row of a tensor [outer, inner, V], in 64 bits: N * V passes 2^31."""
    row = row.to(tl.int64)
    return (row // inner_size) * outer_stride + (row % inner_size) * inner_stride


@triton.jit
def above_reference(logits, reference, to_log2):
    """The exponent, in base 2, of exp((logits - reference) / temperature).

    The difference first: that of logits close to each other is exact, and a common offset drops
    out. Of a product minus a product the compiler fuses one, and leaves the rounding of the other.
    """
    return (logits.to(tl.float32) - reference) * to_log2


@triton.jit
def relative_sums(
    logits_ptr, readable, target, to_log2, reference,
    HAS_ENTROPY: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Sum of exp(z - reference) over a row but its target, and of that times (z - reference).

    The reference is a logit as it was given.
    """
    sums = tl.zeros((BLOCK_V,), tl.float32)
    moments = tl.zeros((BLOCK_V,), tl.float32)
    for start in range(0, readable, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + columns, mask=columns < readable, other=-float("inf"))
        shifted = above_reference(logits, reference, to_log2)
        exponentials = tl.where(columns == target, 0.0, tl.exp2(shifted))
        sums += exponentials
        if HAS_ENTROPY:
            moments += exponentials * tl.maximum(shifted, LEAST)
    return tl.sum(sums, 0), tl.sum(moments, 0) * LN2


@triton.jit(do_not_specialize=["inner_size"])
def logit_rows_fwd_kernel(
    logprobs_ptr, entropy_ptr, references_ptr, totals_ptr,  # outputs [N]; the second may be None
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # [N, V], [N], [N] or None, [N] or [1]
    vocabulary, inner_size,  # sizes
    outer_stride, inner_stride, temperature_stride,  # strides
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    to_log2 = LOG2E / temperature
    target = tl.load(targets_ptr + row).to(tl.int32)
    readable = vocabulary
    if mask_ptr is not None:  # a row left out is not read; its target may be anything
        counts = tl.load(mask_ptr + row) != 0
        target = tl.where(counts, target, 0)
        readable = tl.where(counts, vocabulary, 0)
    logits_ptr += row_start(row, inner_size, outer_stride, inner_stride)
    inside = (target >= 0) & (target < readable)
    at_target = tl.load(logits_ptr + target, mask=inside, other=0.0).to(tl.float32)
    reference = at_target
    others, moment = relative_sums(
        logits_ptr, readable, target, to_log2, reference, entropy_ptr is not None, BLOCK_V
    )
    if (others < RANGE) == 0:  # inf and NaN too
        highest = tl.full((BLOCK_V,), -float("inf"), tl.float32)
        for start in range(0, readable, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            logits = tl.load(logits_ptr + columns, mask=columns < readable, other=-float("inf"))
            highest = tl.maximum(highest, logits.to(tl.float32))
        reference = tl.max(highest, 0)
        others, moment = relative_sums(
            logits_ptr, readable, target, to_log2, reference, entropy_ptr is not None, BLOCK_V
        )

    gap = tl.where(reference == at_target, 0.0, (at_target - reference) / temperature)
    logprob, entropy, total = of_sums(others, moment, gap)
    if mask_ptr is not None:
        logprob = tl.where(counts, logprob, 0.0)
        entropy = tl.where(counts, entropy, 0.0)
    tl.store(logprobs_ptr + row, logprob)
    tl.store(references_ptr + row, reference)
    tl.store(totals_ptr + row, total)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, entropy)


@triton.jit(do_not_specialize=["inner_size"])
def logit_rows_bwd_kernel(
    grad_ptr,  # output [N, V]; may be logits_ptr
    logits_ptr, targets_ptr, mask_ptr, temperature_ptr,  # inputs, as in the forward
    logprobs_ptr, entropy_ptr, references_ptr, totals_ptr,  # what the forward left, [N]
    by_logprob_ptr, by_entropy_ptr,  # upstream gradients, [N]; None is zero
    vocabulary, inner_size,  # sizes
    grad_outer_stride, grad_inner_stride, outer_stride, inner_stride, temperature_stride,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    temperature = tl.load(temperature_ptr + row.to(tl.int64) * temperature_stride)
    inverse_temperature = 1.0 / temperature
    by_logprob, by_entropy, above = 0.0, 0.0, 0.0
    logprob = tl.load(logprobs_ptr + row)
    total = tl.load(totals_ptr + row)
    if by_logprob_ptr is not None:
        by_logprob = tl.load(by_logprob_ptr + row) * inverse_temperature
    active = by_logprob != 0
    at_target = -by_logprob * expm1(logprob)
    if by_entropy_ptr is not None:
        by_entropy = tl.load(by_entropy_ptr + row) * inverse_temperature
        active |= by_entropy != 0
        entropy = tl.load(entropy_ptr + row)
        at_target -= by_entropy * surprise(logprob, entropy)
        above = entropy - tl.log(total)
    if mask_ptr is not None:
        active &= tl.load(mask_ptr + row) != 0
    # a row of no upstream gradient is not read, and gets exact zeros
    readable = tl.where(active, vocabulary, 0)
    at_target = tl.where(active, at_target, 0.0)
    reference = tl.load(references_ptr + row)
    to_log2 = LOG2E / temperature
    inverse_total = 1.0 / total
    target = tl.load(targets_ptr + row).to(tl.int32)
    logits_ptr += row_start(row, inner_size, outer_stride, inner_stride)
    grad_ptr += row_start(row, inner_size, grad_outer_stride, grad_inner_stride)
    for start in range(0, vocabulary, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + columns, mask=columns < readable, other=-float("inf"))
        shifted = above_reference(logits, reference, to_log2)
        probs = tl.exp2(shifted) * inverse_total
        factor = by_logprob
        if by_entropy_ptr is not None:
            factor += by_entropy * (tl.maximum(shifted, LEAST) * LN2 + above)
        grad = tl.where(columns == target, at_target, -factor * probs)
        grad = tl.where(active, grad, 0.0)
        tl.store(grad_ptr + columns, grad.to(grad_ptr.dtype.element_ty), mask=columns < vocabulary)


@dataclass(frozen=True)
class RowLayout:
    """The layout in memory of the rows of a tensor [..., V]: as [outer, inner, V]."""

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


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor, with_entropy: bool
) -> RowStatistics:
    """Return log-prob, entropy, reference (not over temperature) and total of each row."""
    if logits.dtype == torch.float64:
        raise TypeError(
            "float64 has no kernel: cast to float32, or move the tensors to the CPU, got "
            f"{describe(logits)}"
        )
    logits = with_row_layout(logits)
    layout = RowLayout.of(logits)
    new = [targets.new_empty(layout.rows, dtype=torch.float32) for _ in range(4)]
    found = RowStatistics(new[0], new[1] if with_entropy else None, *new[2:])
    if not layout.rows:
        return found
    # the kernel runs on the current device, which need not be the tensor's
    with torch.cuda.device_of(logits):
        logit_rows_fwd_kernel[(layout.rows,)](
            *found,
            logits,
            targets,
            mask,
            temperature,
            logits.shape[-1],
            layout.inner_size,
            layout.outer_stride,
            layout.inner_stride,
            0 if temperature.numel() == 1 else 1,
            BLOCK_V=BLOCK_V,
            **LAUNCH,
        )
    return found


def write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: RowStatistics,
    by_logprob: Tensor | None,
    by_entropy: Tensor | None,
) -> None:
    """Overwrite `grad`, which may be `logits`, by the gradient of the logits."""
    torch.autograd.graph.increment_version(grad)  # what a kernel writes, autograd does not see
    walked, written = with_row_layout(logits), with_row_layout(grad)
    layout, grad_layout = RowLayout.of(walked), RowLayout.of(written)
    if not layout.rows:
        return
    with torch.cuda.device_of(logits):
        logit_rows_bwd_kernel[(layout.rows,)](
            written,
            walked,
            targets,
            mask,
            temperature,
            *known,
            *map(contiguous, (by_logprob, by_entropy)),
            walked.shape[-1],
            layout.inner_size,
            grad_layout.outer_stride,
            grad_layout.inner_stride,
            layout.outer_stride,
            layout.inner_stride,
            0 if temperature.numel() == 1 else 1,
            BLOCK_V=BLOCK_V,
            **LAUNCH,
        )
    if written.data_ptr() != grad.data_ptr():  # a copy, whose rows can be walked
        grad.copy_(written.view(grad.shape))
