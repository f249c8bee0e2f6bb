# mypy: disable-error-code="no-untyped-def"
"""`clipped_policy_loss` on CUDA: loss and slope of every token in one pass.

The twin is `Clip` in `..surrogates.clipped`.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..row_checks import NAMESPACE
from ..surrogates.base import MAX_LOG_RATIO

BLOCK = 1024
LARGEST = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def clipped_policy_loss_kernel(
    losses_ptr, slopes_ptr,  # outputs [N]
    logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr,  # inputs [N]
    low, high, dual,  # scalars: 1 - clip_low, 1 + clip_high, and the dual clip or infinity
    tokens,  # size
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < tokens
    counts = tl.load(mask_ptr + at, mask=inside, other=0) != 0
    # a slot that does not count is not read: it may hold NaN or inf
    logprob = tl.load(logprobs_ptr + at, mask=counts, other=0.0)
    old_logprob = tl.load(old_logprobs_ptr + at, mask=counts, other=0.0)
    advantage = tl.load(advantages_ptr + at, mask=counts, other=0.0)
    log_ratio = logprob - old_logprob
    ratio = tl.exp(tl.minimum(log_ratio, LARGEST))
    pays = advantage > 0
    least = tl.where(pays, 0.0, low)
    largest = tl.where(pays, high, dual)
    moves = (ratio >= least) & (ratio <= largest) & (log_ratio <= LARGEST)
    clipped = tl.minimum(tl.maximum(ratio, least), largest)
    tl.store(losses_ptr + at, -clipped * advantage, mask=inside)
    tl.store(slopes_ptr + at, tl.where(moves, -ratio * advantage, 0.0), mask=inside)


@torch.library.custom_op(f"{NAMESPACE}::clipped_policy_loss", mutates_args=())
def losses_and_slopes(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss of each token and its derivative by the log-prob; zeros where masked."""
    losses = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    slopes = torch.empty_like(losses)
    tokens = losses.numel()
    if not tokens:
        return losses, slopes
    # the kernel runs on the current device, which need not be the tensor's
    with torch.cuda.device_of(logprobs):
        clipped_policy_loss_kernel[(triton.cdiv(tokens, BLOCK),)](
            losses,
            slopes,
            logprobs.contiguous(),
            old_logprobs.contiguous(),
            advantages.contiguous(),
            mask.contiguous(),
            1.0 - clip_low,
            1.0 + clip_high,
            math.inf if dual_clip is None else dual_clip,
            tokens,
            BLOCK=BLOCK,
            enable_fp_fusion=True,
        )
    return losses, slopes


@losses_and_slopes.register_fake
def _(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    losses = torch.empty_like(logprobs, memory_format=torch.contiguous_format)
    return losses, torch.empty_like(losses)


def _save_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1])


def _times_slopes(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (slopes,) = ctx.saved_tensors
    return slopes * grad_losses, None, None, None, None, None, None


losses_and_slopes.register_autograd(_times_slopes, setup_context=_save_slopes)
