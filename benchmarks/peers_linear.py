"""The ops over hidden states, here and at the peers. Each gives log-probs [B, T] or the loss."""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.batches import CLIP, Batch, clipped_token_mean
from igrpo_kernels import Clip, TokenMean, linear_policy_loss, linear_token_logprobs

TRL_CHUNK = 32768  # the vocabulary width that TRL's trainer passes


def igrpo_logprobs(batch: Batch) -> Tensor:
    return linear_token_logprobs(batch.hidden, batch.weight, batch.targets)


def igrpo_loss(batch: Batch) -> Tensor:
    return linear_policy_loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.advantages,
        batch.mask,
        surrogate=Clip(CLIP, CLIP),
        aggregate=TokenMean(),
        old_logprobs=batch.old_logprobs,
    ).loss


def torch_logprobs(batch: Batch) -> Tensor:
    """All logits at once, for every row, in fp32 from the softmax on."""
    logits = batch.hidden @ batch.weight.t()
    return logits.float().log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)


def torch_loss(batch: Batch) -> Tensor:
    return clipped_token_mean(torch_logprobs(batch), batch)


@cache
def compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=False)


def compiled_logprobs(batch: Batch) -> Tensor:
    return compiled(torch_logprobs)(batch)


def compiled_loss(batch: Batch) -> Tensor:
    return compiled(torch_loss)(batch)


def torch_linear_logprobs(batch: Batch) -> Tensor:
    """torch 2.13's chunked linear cross entropy, per token."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    hidden, targets = batch.hidden.flatten(0, 1), batch.targets.flatten()
    options = LinearCrossEntropyOptions()
    rows = linear_cross_entropy(hidden, batch.weight, targets, reduction="none", options=options)
    return -rows.view_as(batch.targets)


def torch_linear_loss(batch: Batch) -> Tensor:
    return clipped_token_mean(torch_linear_logprobs(batch), batch)


def trl_rows(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    arguments = (1.0, TRL_CHUNK, None, 1.0, ())
    return ChunkedLogProbFunction.apply(hidden, weight, None, targets, *arguments)[0]


def trl_logprobs(batch: Batch) -> Tensor:
    """TRL 1.16's fused head over every row."""
    rows = trl_rows(batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten())
    return rows.view_as(batch.targets)


def trl_loss(batch: Batch) -> Tensor:
    """TRL 1.16's fused head over the rows that the mask keeps, then its loss."""
    keep = batch.mask.bool()
    rows = trl_rows(batch.hidden[keep], batch.weight, batch.targets[keep])
    logprobs = torch.zeros_like(batch.old_logprobs).masked_scatter(keep, rows)
    return clipped_token_mean(logprobs, batch)


def liger_loss(batch: Batch) -> Tensor:
    """Liger 0.8.5's chunked GRPO loss, uncompiled: compiling it was no faster on a CPU."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="bnpo", temperature=1.0
    )
    return loss(
        batch.hidden,
        batch.weight,
        batch.targets,
        batch.mask,
        batch.advantages,
        old_per_token_logps=batch.old_logprobs,
    )[0]


def liger_triton_loss(batch: Batch) -> Tensor:
    """All logits by torch, one more row per sequence, then Liger's Triton GRPO loss in place."""
    hidden = torch.nn.functional.pad(batch.hidden, (0, 0, 0, 1))
    return liger_grpo_loss(hidden @ batch.weight.t(), batch, inplace=True)


def liger_grpo_loss(logits: Tensor, batch: Batch, *, inplace: bool) -> Tensor:
    """Liger's Triton GRPO loss from logits with one more row per sequence."""
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    return triton_grpo_loss(
        logits,
        batch.old_logprobs,
        None,
        batch.targets,
        batch.advantages,
        batch.mask,
        temperature=1.0,
        beta=0.0,
        eps_low=CLIP,
        eps_high=CLIP,
        inplace=inplace,
        loss_type="bnpo",
        reduce=True,
    )[0]


def liger_scaled_logprobs(batch: Batch) -> Tensor:
    """Liger's fused linear cross entropy per token: CuTe DSL on Hopper, chunked torch elsewhere."""
    from liger_kernel.ops.fused_linear_scaled_cross_entropy import (
        LigerFusedLinearScaledCrossEntropyFunction,
    )

    rows = LigerFusedLinearScaledCrossEntropyFunction.apply(
        batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten()
    )
    return -(rows[0] if isinstance(rows, tuple) else rows).view_as(batch.targets)


def liger_scaled_loss(batch: Batch) -> Tensor:
    return clipped_token_mean(liger_scaled_logprobs(batch), batch)


def quack_cross_entropy(batch: Batch) -> Tensor:
    """QuACK's chunked linear cross entropy: the mean over all rows, no ratio and no clip."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(
        batch.hidden.flatten(0, 1), batch.weight, batch.targets.flatten(), reduction="mean"
    )
