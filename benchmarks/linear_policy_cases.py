"""One problem for all heads: the batch, and each peer's forward and backward over it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from igrpo_kernels import Clip, TokenMean, linear_policy_loss

CLIP = 0.2
TRL_CHUNK = 32768  # the vocabulary width that TRL's trainer passes


@dataclass
class Batch:
    """Hidden states to advantages of B sequences of T tokens; leaves carry `.grad` after a step."""

    hidden: Tensor  # [B, T, H]
    weight: Tensor  # [V, H]
    targets: Tensor  # [B, T]
    advantages: Tensor  # [B]
    mask: Tensor  # [B, T]
    old_logprobs: Tensor  # [B, T]


def make_batch(
    sequences: int, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, *, sparse: bool
) -> Batch:
    """Every row active; or, sparse, 60 % of rows unmasked and half of the groups at advantage zero.

    The old log-probs are those of the same policy, give or take what a few steps change.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    hidden = randn(sequences, tokens, width).to(dtype).requires_grad_()
    weight = (randn(vocabulary, width) * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (sequences, tokens), generator=generator)
    advantages = torch.where(torch.arange(sequences) % 2 == 0, 1.0, -1.0)
    mask = torch.ones(sequences, tokens, dtype=torch.long)
    if sparse:
        advantages[: sequences // 2] = 0.0
        lengths = torch.linspace(0.2, 1.0, sequences // 2).repeat(2) * tokens
        mask = (torch.arange(tokens) < lengths[:, None]).long()
    with torch.no_grad():
        logits = (hidden.flatten(0, 1) @ weight.t()).float()
        old_logprobs = logits.log_softmax(-1).gather(1, targets.view(-1, 1)).view_as(targets)
    old_logprobs += 0.05 * randn(sequences, tokens)
    return Batch(hidden, weight, targets, advantages, mask, old_logprobs)


def clipped_token_mean(logprobs: Tensor, batch: Batch) -> Tensor:
    """TRL's loss formula for one batch (`bnpo`, no KL), which is `Clip` with `TokenMean`."""
    ratio = torch.exp(logprobs - batch.old_logprobs)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    advantages = batch.advantages[:, None]
    losses = -torch.min(ratio * advantages, clipped * advantages)
    return (losses * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)


def igrpo(batch: Batch) -> Tensor:
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


def plain_torch(batch: Batch) -> Tensor:
    """All logits at once, for every row, in fp32 from the softmax on."""
    logits = batch.hidden @ batch.weight.t()
    logprobs = logits.float().log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    return clipped_token_mean(logprobs, batch)


def trl(batch: Batch) -> Tensor:
    """TRL 1.16's fused head over the rows that the mask keeps, then its loss."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    keep = batch.mask.bool()
    rows = ChunkedLogProbFunction.apply(
        batch.hidden[keep],
        batch.weight,
        None,
        batch.targets[keep],
        1.0,
        TRL_CHUNK,
        None,
        1.0,
        (),
    )[0]
    logprobs = torch.zeros_like(batch.old_logprobs).masked_scatter(keep, rows)
    return clipped_token_mean(logprobs, batch)


def liger(batch: Batch) -> Tensor:
    """Liger 0.8.5's chunked GRPO loss, uncompiled."""
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


PEERS: dict[str, Callable[[Batch], Tensor]] = {
    "igrpo": igrpo,
    "torch": plain_torch,
    "trl": trl,
    "liger": liger,
}


def error_against_float64(batch: Batch) -> tuple[float, float]:
    """Relative error of the last step's gradients of hidden and weight, in the Frobenius norm."""
    exact = Batch(
        batch.hidden.detach().double().requires_grad_(),
        batch.weight.detach().double().requires_grad_(),
        batch.targets,
        batch.advantages.double(),
        batch.mask,
        batch.old_logprobs.double(),
    )
    logits = exact.hidden @ exact.weight.t()
    logprobs = logits.log_softmax(-1).gather(-1, exact.targets[..., None]).squeeze(-1)
    clipped_token_mean(logprobs, exact).backward()

    def error(leaf: Tensor, reference: Tensor) -> float:
        assert leaf.grad is not None
        assert reference.grad is not None
        return ((leaf.grad.double() - reference.grad).norm() / reference.grad.norm()).item()

    return error(batch.hidden, exact.hidden), error(batch.weight, exact.weight)


def step(peer: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """One forward and backward; the gradients replace those of the last step."""
    batch.hidden.grad = batch.weight.grad = None
    loss = peer(batch)
    loss.backward()
    return loss.detach()
