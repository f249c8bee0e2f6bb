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
BLOCK = 1024


@triton.jit
def shared(at, span, WIDE: tl.constexpr):
    """Which value belongs to a token, where `span` in a row share one; 32-bit division is cheap."""
    return at // span if WIDE else at.to(tl.int32) // span


@triton.jit
def clip_terms(
    at, counts, logprob,  # tokens, whether they count, and their log-probs
    old_ptr, ref_ptr,  # of all tokens; None: the log-prob itself, no reference
    advantages_ptr, importance_ptr, weights_ptr,  # of all tokens / span; the last two may be None
    advantage_span, importance_span, weight_span,
    low, high, dual, kl_coef,  # 1 - low, 1 + high, the dual clip or infinity
    WIDE: tl.constexpr,
):  # fmt: skip
    """Loss and its slope by the log-prob, weighed; ratio, the sides clipped, k3, importance."""
    old_logprob = logprob
    if old_ptr is not None:
        old_logprob = tl.load(old_ptr + at, mask=counts, other=0.0)
    advantage = tl.load(advantages_ptr + shared(at, advantage_span, WIDE), mask=counts, other=0.0)
    log_ratio = logprob - old_logprob
    ratio = tl.exp(tl.minimum(log_ratio, LARGEST, NAN))
    pays, costs = advantage > 0, advantage < 0
    least = tl.where(costs, low, 0.0)
    most = tl.where(pays, high, tl.where(costs, dual, float("inf")))
    clipped = tl.minimum(tl.maximum(ratio, least, NAN), most, NAN)
    moves = (ratio >= least) & (ratio <= most) & (log_ratio <= LARGEST)
    loss = -clipped * advantage
    slope = -ratio * advantage
    importance = tl.zeros_like(loss)
    if importance_ptr is not None:
        index = shared(at, importance_span, WIDE)
        importance = tl.load(importance_ptr + index, mask=counts, other=0.0)
        loss *= importance
        slope *= importance
    slope = tl.where(moves, slope, 0.0)  # at last: 0 * inf, where a weight is infinite
    k3 = tl.zeros_like(loss)
    if ref_ptr is not None:
        x = tl.load(ref_ptr + at, mask=counts, other=0.0) - logprob
        stopped = tl.minimum(x, LARGEST, NAN)
        grown = expm1(stopped)
        k3 = grown - stopped
        # 0 * inf, where the reference is for the metrics alone and has no weight on a token
        loss += tl.where(kl_coef == 0, 0.0, kl_coef * k3)
        slope -= kl_coef * tl.where(x <= LARGEST, grown, 0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + shared(at, weight_span, WIDE), mask=counts, other=0.0)
        loss *= weight
        slope *= weight
    is_low, is_high = costs & (ratio < low), pays & (ratio > high)
    return loss, slope, ratio, is_low.to(tl.float32), is_high.to(tl.float32), k3, importance


@triton.jit
def store_terms(
    terms_ptr, step, loss, logprob, ratio, is_low, is_high, k3, entropy, importance,
    ref_ptr, entropy_ptr, importance_ptr,  # None: not given, and so not logged
):  # fmt: skip
    """The loss and what is logged, `step` apart and in the order of `names_of`."""
    tl.store(terms_ptr, loss)
    terms_ptr += step
    tl.store(terms_ptr, logprob)
    terms_ptr += step
    tl.store(terms_ptr, ratio)
    terms_ptr += step
    tl.store(terms_ptr, is_low)
    terms_ptr += step
    tl.store(terms_ptr, is_high)
    if ref_ptr is not None:
        terms_ptr += step
        tl.store(terms_ptr, k3)
    if entropy_ptr is not None:
        terms_ptr += step
        tl.store(terms_ptr, entropy)
    if importance_ptr is not None:
        terms_ptr += step
        tl.store(terms_ptr, importance)


@triton.jit
def clip_tokens_kernel(
    losses_ptr, slopes_ptr, sums_ptr,  # outputs [N], [N], [K, programs]; None where not wanted
    logprobs_ptr, entropy_ptr, mask_ptr, tokens,  # inputs [N]; the second and third may be None
    old_ptr, ref_ptr, advantages_ptr, importance_ptr, weights_ptr,  # as in `clip_terms`
    advantage_span, importance_span, weight_span, low, high, dual, kl_coef,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of each token, times its weight; its slope; and what a block's tokens add up to."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    counts = inside
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    # a slot that does not count is not read: it may hold NaN or inf
    logprob = tl.load(logprobs_ptr + at, mask=counts, other=0.0).to(tl.float32)
    loss, slope, ratio, is_low, is_high, k3, importance = clip_terms(
        at, counts, logprob, old_ptr, ref_ptr, advantages_ptr, importance_ptr, weights_ptr,
        advantage_span, importance_span, weight_span, low, high, dual, kl_coef, WIDE,
    )  # fmt: skip
    if losses_ptr is not None:
        tl.store(losses_ptr + at, tl.where(counts, loss, 0.0), mask=inside)
    if slopes_ptr is not None:
        tl.store(slopes_ptr + at, tl.where(counts, slope, 0.0), mask=inside)
    if sums_ptr is not None:
        entropy = logprob
        if entropy_ptr is not None:
            entropy = tl.load(entropy_ptr + at, mask=counts, other=0.0)
        store_terms(
            sums_ptr + tl.program_id(0), tl.num_programs(0), tl.sum(tl.where(counts, loss, 0.0)),
            tl.sum(logprob), tl.sum(tl.where(counts, ratio, 0.0)), tl.sum(is_low), tl.sum(is_high),
            tl.sum(tl.where(counts, k3, 0.0)), tl.sum(entropy), tl.sum(importance),
            ref_ptr, entropy_ptr, importance_ptr,
        )  # fmt: skip


def names_of(inputs: TokenInputs, entropy: Tensor | None) -> list[str]:
    """What the kernels add up about each token besides its loss, in their order."""
    given = {
        "kl": inputs.ref_logprobs,
        "entropy": entropy,
        "importance_weight": inputs.importance_weights,
    }
    always = ["logprob", "ratio", "clip_fraction_low", "clip_fraction_high"]
    return [*always, *(name for name, values in given.items() if values is not None)]


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


def clip_arguments(
    inputs: TokenInputs, weights: Tensor | None, objective: TokenObjective
) -> tuple[Any, ...]:
    """Kernel arguments: `old_ptr` to `kl_coef` of `clip_terms`."""
    clip, tokens = objective.surrogate, inputs.sequences.mask.numel()
    assert isinstance(clip, Clip)
    shared = (inputs.advantages, inputs.importance_weights, weights)
    return (
        *map(contiguous, (inputs.old_logprobs, inputs.ref_logprobs, *shared)),
        *(span(values, tokens) for values in shared),
        1.0 - clip.low,
        1.0 + clip.high,
        math.inf if clip.dual is None else float(clip.dual),
        float(objective.kl_coef),
    )


def span(values: Tensor | None, tokens: int) -> int:
    """How many tokens in a row share one of the values."""
    return 1 if values is None else max(1, tokens // max(1, values.numel()))


def clip_tokens(
    logprobs: Tensor,
    inputs: TokenInputs,
    objective: TokenObjective,
    weights: Tensor | None = None,
    entropy: Tensor | None = None,
    *,
    losses: bool = False,
    slopes: bool = False,
    sums: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Launch over all tokens; return what is wanted of losses, slopes and sums, in fp32.

    Losses and slopes have the shape of the tokens and are zero where those do not count. The sums
    are of the loss and of `names_of` over those that do. Shape [K].
    """
    tokens, sequences = logprobs.numel(), inputs.sequences
    options: dict[str, Any] = {"dtype": torch.float32, "memory_format": torch.contiguous_format}
    found = [torch.empty_like(logprobs, **options) if some else None for some in (losses, slopes)]
    programs = triton.cdiv(tokens, BLOCK)
    parts = None
    if sums:
        count = 1 + len(names_of(inputs, entropy))
        parts = logprobs.new_empty((count, programs), dtype=torch.float32)
    mask = None if sequences.complete else sequences.mask
    if tokens:
        # the kernel runs on the current device, which need not be the tensor's
        with torch.cuda.device_of(logprobs):
            clip_tokens_kernel[(programs,)](
                *found,
                parts,
                *map(contiguous, (logprobs, entropy, mask)),
                tokens,
                *clip_arguments(inputs, weights, objective),
                WIDE=tokens >= 2**31,
                BLOCK=BLOCK,
                num_warps=8,
                enable_fp_fusion=True,
            )
    return found[0], found[1], None if parts is None else parts.sum(1)


def clipped_loss(
    logprobs: Tensor,
    entropy: Tensor | None,
    inputs: TokenInputs,
    weights: Tensor,
    objective: TokenObjective,
) -> tuple[Tensor, list[str], Tensor]:
    """Return the loss of a batch, and the names and sums of what is logged about its tokens."""
    logged = None if entropy is None else entropy.detach()
    loss, sums = ClippedLoss.apply(logprobs, inputs, objective, weights, logged)
    return loss, names_of(inputs, entropy), sums[1:]


class ClippedLosses(torch.autograd.Function):
    """The loss of each token."""

    @staticmethod
    def forward(
        ctx: Any, logprobs: Tensor, inputs: TokenInputs, objective: TokenObjective
    ) -> Tensor:
        """Return the losses, and keep their slopes."""
        ctx.dtype, ctx.sequences = logprobs.dtype, inputs.sequences
        losses, slopes, _ = clip_tokens(
            logprobs, inputs, objective, losses=True, slopes=ctx.needs_input_grad[0]
        )
        assert losses is not None
        ctx.save_for_backward(slopes)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the slopes by the upstream gradients."""
        (slopes,) = ctx.saved_tensors
        grad = ctx.sequences.select(slopes * grad_losses)  # upstream may be infinite where masked
        return grad.to(ctx.dtype), None, None


class ClippedLoss(torch.autograd.Function):
    """The loss of a batch, and the sums of what is logged about its tokens."""

    @staticmethod
    def forward(
        ctx: Any,
        logprobs: Tensor,
        inputs: TokenInputs,
        objective: TokenObjective,
        weights: Tensor,
        entropy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and all sums, and keep the slopes of the tokens."""
        ctx.dtype = logprobs.dtype
        slopes = ctx.needs_input_grad[0]
        _, slopes, sums = clip_tokens(
            logprobs, inputs, objective, weights, entropy, slopes=slopes, sums=True
        )
        assert sums is not None
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(sums)
        return sums[0].clone(), sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the slopes by the upstream scalar."""
        (slopes,) = times_upstream(ctx.saved_tensors, grad_loss)
        return slopes.to(ctx.dtype), None, None, None, None
