# mypy: disable-error-code="no-untyped-def"
"""The clipped-ratio loss on CUDA: `Clip` with k3 and importance weights, in one formula.

Two kernels call it: that of tokens whose log-probs are given, here, and that of rows of a head, in
`head_rows`. The twin is `..loss_terms.TokenObjective` over `..surrogates.clipped.Clip`.
"""

import math
from typing import Any, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..loss_terms import TokenInputs, TokenObjective
from ..surrogates.base import MAX_LOG_RATIO
from ..surrogates.clipped import Clip
from ..upstream import times_upstream
from .chunk import contiguous
from .device_math import expm1

LARGEST = tl.constexpr(MAX_LOG_RATIO)
NAN = tl.constexpr(tl.PropagateNan.ALL)
BLOCK = 2048
# What the kernels leave of each token, or of each block of them, one under the other
TERMS = (
    "loss",
    "logprob",
    "ratio",
    "clip_fraction_low",
    "clip_fraction_high",
    "kl",
    "importance_weight",
)


@triton.jit
def clip_terms(
    logprob, old_logprob, advantage, importance, ref_logprob, low, high, dual, kl_coef,
    HAS_IMPORTANCE: tl.constexpr, HAS_REF: tl.constexpr,
):  # fmt: skip
    """Loss of tokens and its slope by the log-prob; then ratio, the two sides clipped, and k3."""
    log_ratio = logprob - old_logprob
    ratio = tl.exp(tl.minimum(log_ratio, LARGEST, NAN))
    pays = advantage > 0
    least = tl.where(pays, 0.0, low)
    most = tl.where(pays, high, dual)
    clipped = tl.minimum(tl.maximum(ratio, least, NAN), most, NAN)
    moves = (ratio >= least) & (ratio <= most) & (log_ratio <= LARGEST)
    loss = -clipped * advantage
    slope = tl.where(moves, -ratio * advantage, 0.0)
    if HAS_IMPORTANCE:
        loss *= importance
        slope *= importance
    k3 = tl.zeros_like(loss)
    if HAS_REF:
        x = ref_logprob - logprob
        grown = expm1(tl.minimum(x, LARGEST, NAN))
        k3 = grown - x
        loss += kl_coef * k3
        slope -= kl_coef * tl.where(x <= LARGEST, grown, -1.0)
    return loss, slope, ratio, (advantage < 0) & (ratio < low), pays & (ratio > high), k3


@triton.jit
def clip_tokens_kernel(
    losses_ptr, slopes_ptr, sums_ptr,  # outputs [N], [N], [7, programs]; None where not wanted
    logprobs_ptr, old_ptr, ref_ptr, mask_ptr,  # inputs [N]; all but the first may be None
    advantages_ptr, importance_ptr, weights_ptr,  # inputs [N / span]; the last two may be None
    low, high, dual, kl_coef,  # scalars: 1 - low, 1 + high, the dual clip or infinity
    tokens, advantage_span, importance_span, weight_span,  # sizes
    HAS_MASK: tl.constexpr, HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr,
    HAS_IMPORTANCE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_LOSSES: tl.constexpr,
    HAS_SLOPES: tl.constexpr, HAS_SUMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each token, times its weight; its slope; and what a block's tokens add up to."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    counts = inside
    if HAS_MASK:
        counts = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    # a slot that does not count is not read: it may hold NaN or inf
    logprob = tl.load(logprobs_ptr + at, mask=counts, other=0.0).to(tl.float32)
    old_logprob, ref_logprob, importance = logprob, logprob, logprob
    if HAS_OLD:
        old_logprob = tl.load(old_ptr + at, mask=counts, other=0.0)
    if HAS_REF:
        ref_logprob = tl.load(ref_ptr + at, mask=counts, other=0.0)
    if HAS_IMPORTANCE:
        importance = tl.load(importance_ptr + at // importance_span, mask=counts, other=0.0)
    advantage = tl.load(advantages_ptr + at // advantage_span, mask=counts, other=0.0)
    loss, slope, ratio, is_low, is_high, k3 = clip_terms(
        logprob, old_logprob, advantage, importance, ref_logprob, low, high, dual, kl_coef,
        HAS_IMPORTANCE, HAS_REF,
    )  # fmt: skip
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + at // weight_span, mask=counts, other=0.0)
        loss *= weight
        slope *= weight
    if HAS_LOSSES:
        tl.store(losses_ptr + at, tl.where(counts, loss, 0.0), mask=inside)
    if HAS_SLOPES:
        tl.store(slopes_ptr + at, tl.where(counts, slope, 0.0), mask=inside)
    if HAS_SUMS:
        sums_ptr += tl.program_id(0)
        programs = tl.num_programs(0)
        tl.store(sums_ptr, tl.sum(tl.where(counts, loss, 0.0)))
        tl.store(sums_ptr + programs, tl.sum(logprob))
        tl.store(sums_ptr + 2 * programs, tl.sum(tl.where(counts, ratio, 0.0)))
        tl.store(sums_ptr + 3 * programs, tl.sum((counts & is_low).to(tl.float32)))
        tl.store(sums_ptr + 4 * programs, tl.sum((counts & is_high).to(tl.float32)))
        tl.store(sums_ptr + 5 * programs, tl.sum(tl.where(counts, k3, 0.0)))
        tl.store(sums_ptr + 6 * programs, tl.sum(tl.where(counts, importance, 0.0)))


class ClippedRows(Protocol):
    """The loss of each row of a batch: `..fused_loss.RowLosses`."""

    @property
    def objective(self) -> TokenObjective:
        """What the loss of a row is made of."""
        ...

    @property
    def inputs(self) -> TokenInputs:
        """What the rows are given."""
        ...

    @property
    def weights(self) -> Tensor:
        """The aggregate's weight of each row."""
        ...


def clip_numbers(objective: TokenObjective) -> tuple[float, float, float, float]:
    """The bounds of the ratio, the dual clip's (infinite without one), and the weight of k3."""
    clip = objective.surrogate
    assert isinstance(clip, Clip)
    dual = math.inf if clip.dual is None else float(clip.dual)
    return 1.0 - clip.low, 1.0 + clip.high, dual, float(objective.kl_coef)


def logged(sums: Tensor, inputs: TokenInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Name the sums of `TERMS`: the loss, and what there is to log."""
    loss, *rest = sums.unbind()
    named = dict(zip(TERMS[1:], rest, strict=True))
    if inputs.ref_logprobs is None:
        del named["kl"]
    if inputs.importance_weights is None:
        del named["importance_weight"]
    return loss, named


def span(values: Tensor | None, tokens: int) -> int:
    """How many tokens in a row share one of the values."""
    return 1 if values is None else max(1, tokens // max(1, values.numel()))


def clip_tokens(
    logprobs: Tensor,
    inputs: TokenInputs,
    weights: Tensor | None,
    objective: TokenObjective,
    *,
    losses: bool = False,
    slopes: bool = False,
    sums: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch over all tokens; return what is wanted of losses, slopes and sums, in fp32.

    Losses and slopes have the shape of the tokens and are zero where those do not count; the sums,
    [7], are of `TERMS` over those that do.
    """
    tokens, sequences = logprobs.numel(), inputs.sequences
    found = [
        torch.empty_like(logprobs, dtype=torch.float32, memory_format=torch.contiguous_format)
        if wanted
        else None
        for wanted in (losses, slopes)
    ]
    programs = triton.cdiv(tokens, BLOCK)
    parts = inputs.advantages.new_empty((len(TERMS), programs)) if sums else None
    optional = (inputs.importance_weights, weights)
    if tokens:
        # the kernel runs on the current device, which need not be the tensor's
        with torch.cuda.device_of(logprobs):
            clip_tokens_kernel[(programs,)](
                *found,
                parts,
                *map(contiguous, (logprobs, inputs.old_logprobs, inputs.ref_logprobs)),
                None if sequences.complete else sequences.mask.contiguous(),
                *map(contiguous, (inputs.advantages, *optional)),
                *clip_numbers(objective),
                tokens,
                *(span(values, tokens) for values in (inputs.advantages, *optional)),
                HAS_MASK=not sequences.complete,
                HAS_OLD=inputs.old_logprobs is not None,
                HAS_REF=inputs.ref_logprobs is not None,
                HAS_IMPORTANCE=inputs.importance_weights is not None,
                HAS_WEIGHTS=weights is not None,
                HAS_LOSSES=losses,
                HAS_SLOPES=slopes,
                HAS_SUMS=sums,
                BLOCK=BLOCK,
                enable_fp_fusion=True,
            )
    return found[0], found[1], None if parts is None else parts.sum(1)


class ClippedLosses(torch.autograd.Function):
    """The loss of each token."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, inputs: TokenInputs, objective: TokenObjective
    ) -> Tensor:
        """Return the losses, and keep their slopes."""
        ctx.dtype = logprobs.dtype
        losses, slopes, _ = clip_tokens(
            logprobs, inputs, None, objective, losses=True, slopes=ctx.needs_input_grad[0]
        )
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the slopes by the upstream gradients."""
        (slopes,) = ctx.saved_tensors
        return (slopes * grad_losses).to(ctx.dtype), None, None


class ClippedLoss(torch.autograd.Function):
    """The loss of a batch, and the sums of what is logged about its tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        inputs: TokenInputs,
        weights: Tensor,
        objective: TokenObjective,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and all sums, and keep the slopes of the tokens."""
        ctx.dtype = logprobs.dtype
        _, slopes, sums = clip_tokens(
            logprobs, inputs, weights, objective, slopes=ctx.needs_input_grad[0], sums=True
        )
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the slopes by the upstream scalar."""
        (slopes,) = ctx.saved_tensors
        return times_upstream(slopes, grad_loss).to(ctx.dtype), None, None, None
