"""The ops over logits and log-probs, here and at the peers."""

import torch
from torch import Tensor

from benchmarks.batches import CLIP, Batch, clipped_token_mean
from benchmarks.peers_linear import compiled, liger_grpo_loss
from igrpo_kernels import Clip, TokenMean, clipped_policy_loss, token_logprobs
from igrpo_kernels.loss_from_logprobs import policy_loss

Scores = tuple[Tensor, ...]


def igrpo_scores(batch: Batch) -> Scores:
    return token_logprobs(batch.logits, batch.targets, return_entropy=True)


def igrpo_loss(batch: Batch) -> Tensor:
    return igrpo_token_mean(token_logprobs(batch.logits, batch.targets), batch)


def torch_scores(batch: Batch) -> Scores:
    log_probs = batch.logits.float().log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    return log_probs.gather(-1, batch.targets[..., None]).squeeze(-1), entropy


def torch_loss(batch: Batch) -> Tensor:
    log_probs = batch.logits.float().log_softmax(-1)
    logprobs = log_probs.gather(-1, batch.targets[..., None]).squeeze(-1)
    return clipped_token_mean(logprobs, batch)


def compiled_scores(batch: Batch) -> Scores:
    return compiled(torch_scores)(batch)


def compiled_loss(batch: Batch) -> Tensor:
    return compiled(torch_loss)(batch)


def trl_scores(batch: Batch) -> Scores:
    """TRL 1.16: its Triton kernel on a GPU, its loops over rows in torch elsewhere."""
    if batch.logits.is_cuda:
        from trl.kernels import selective_log_softmax_and_entropy
    else:
        from trl.trainer.utils import selective_log_softmax_and_entropy

    return selective_log_softmax_and_entropy(batch.logits, batch.targets)


def trl_loss(batch: Batch) -> Tensor:
    """TRL 1.16's log-probs (its kernel takes the entropy along), then its loss."""
    if batch.logits.is_cuda:
        from trl.kernels import selective_log_softmax_and_entropy

        logprobs, _ = selective_log_softmax_and_entropy(batch.logits, batch.targets)
    else:
        from trl.trainer.utils import selective_log_softmax

        logprobs = selective_log_softmax(batch.logits, batch.targets)
    return clipped_token_mean(logprobs.float(), batch)


def liger_scores(batch: Batch) -> Scores:
    """Liger's Triton log-probs, which come without the entropy."""
    from liger_kernel.ops.grpo_loss import fused_selective_log_softmax

    return (fused_selective_log_softmax(batch.padded_logits, batch.targets, temperature=1.0),)


def liger_loss(batch: Batch) -> Tensor:
    """Liger's Triton GRPO loss; not in place, so that the logits live as they do for the others."""
    # a fresh row behind the logits would be a copy of them all: theirs is there already
    padded = Padded.apply(batch.logits, batch.padded_logits)
    return liger_grpo_loss(padded, batch, inplace=False)


def quack_scores(batch: Batch) -> Scores:
    """QuACK's cross entropy per token (CuTe, rows over clusters), which gives no entropy."""
    from quack.cross_entropy import cross_entropy

    rows = cross_entropy(batch.logits.flatten(0, 1), batch.targets.flatten(), reduction="none")
    return (-rows.view_as(batch.targets),)


def quack_loss(batch: Batch) -> Tensor:
    return clipped_token_mean(quack_scores(batch)[0], batch)


class Padded(torch.autograd.Function):
    """The tensor of which the logits are a view, with the gradient led to the logits."""

    @staticmethod
    def forward(ctx: object, logits: Tensor, padded: Tensor) -> Tensor:
        return padded.view_as(padded)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor, None]:
        return grad[:, :-1], None


def igrpo_clipped(batch: Batch) -> Tensor:
    return clipped_policy_loss(
        batch.logprobs,
        batch.advantages,
        batch.mask,
        old_logprobs=batch.old_logprobs,
        clip_low=CLIP,
        clip_high=CLIP,
    )


def igrpo_policy_loss(batch: Batch) -> Tensor:
    return igrpo_token_mean(batch.logprobs, batch)


def igrpo_token_mean(logprobs: Tensor, batch: Batch) -> Tensor:
    return policy_loss(
        logprobs,
        batch.advantages,
        batch.mask,
        surrogate=Clip(CLIP, CLIP),
        aggregate=TokenMean(),
        old_logprobs=batch.old_logprobs,
    ).loss


def trl_policy_loss(batch: Batch) -> Tensor:
    """TRL 1.16's lines, which are plain torch."""
    return clipped_token_mean(batch.logprobs, batch)


def compiled_policy_loss(batch: Batch) -> Tensor:
    return compiled(trl_policy_loss)(batch)


def trl_clipped(batch: Batch) -> Tensor:
    """TRL 1.16's lines, which are plain torch."""
    ratio = torch.exp(batch.logprobs - batch.old_logprobs)
    advantages = batch.advantages[:, None]
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP) * advantages
    return -torch.min(ratio * advantages, clipped) * batch.mask


def compiled_clipped(batch: Batch) -> Tensor:
    return compiled(trl_clipped)(batch)
