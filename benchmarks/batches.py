"""The inputs of each op: random, of a given seed, on a given device."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import DTYPES, FROZEN, SEQUENCES, Case

CLIP = 0.2
REFERENCE_BYTES = 2**30  # of float64 logits at a time


ABSENT = torch.empty(0)


@dataclass
class Batch:
    """B sequences of T tokens; inputs that require a gradient carry `.grad` after a step.

    Attributes:
        targets: Shape [B, T].
        advantages: Shape [B].
        mask: Shape [B, T].
        old_logprobs: Those of the same policy, give or take what a few steps change. Shape [B, T].
        upstream: Gradient that arrives at each token. Shape [B, T].
        hidden: Shape [B, T, H]. These and the following: as the op needs them.
        weight: Shape [V, H].
        logits: Shape [B, T, V].
        padded_logits: The tensor of which `logits` is a view, with one more row. [B, T + 1, V].
        logprobs: Shape [B, T].
    """

    targets: Tensor
    advantages: Tensor
    mask: Tensor
    old_logprobs: Tensor
    upstream: Tensor
    hidden: Tensor = ABSENT
    weight: Tensor = ABSENT
    logits: Tensor = ABSENT
    padded_logits: Tensor = ABSENT
    logprobs: Tensor = ABSENT

    def leaves(self) -> dict[str, Tensor]:
        """The inputs that require a gradient, by name."""
        inputs = {name: getattr(self, name) for name in ("hidden", "weight", "logits", "logprobs")}
        return {name: tensor for name, tensor in inputs.items() if tensor.requires_grad}

    def clear(self) -> None:
        """Drop the gradients of the last step."""
        for leaf in self.leaves().values():
            leaf.grad = None

    def grads(self) -> dict[str, Tensor]:
        """Gradients of the last step, by name."""
        return {f"{name} gradient": leaf.grad for name, leaf in self.leaves().items()}


def clipped_token_mean(logprobs: Tensor, batch: Batch) -> Tensor:
    """TRL's loss formula for one batch (`bnpo`, no KL), which is `Clip` with `TokenMean`."""
    ratio = torch.exp(logprobs - batch.old_logprobs)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    advantages = batch.advantages[:, None]
    losses = -torch.min(ratio * advantages, clipped * advantages)
    return (losses * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)


class Draw:
    """Random tensors on a device, the same for the same seed."""

    def __init__(self, seed: int, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device)

    def below(self, bound: int, *shape: int) -> Tensor:
        return torch.randint(bound, shape, generator=self.generator, device=self.device)


def advantages_and_mask(
    sequences: int, tokens: int, active: float, device: torch.device
) -> dict[str, Tensor]:
    """Advantages of +1 and -1 and what `Case.active` asks for, longest sequences last."""
    advantages = torch.where(torch.arange(sequences) % 2 == 0, 1.0, -1.0)
    lengths = torch.full((sequences,), float(tokens))
    if active < 1.0:  # 0.2 to 1.0 of the tokens of a sequence, 0.6 in the mean
        half = max(1, sequences // 2)
        lengths = torch.linspace(0.2, 1.0, half).repeat(2)[:sequences] * tokens
    if active == 0.3:
        advantages[: sequences // 2] = 0.0
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return {"advantages": advantages.to(device), "mask": mask.to(device)}


def make_linear(case: Case, seed: int, device: torch.device) -> Batch:
    draw = Draw(seed, device)
    tokens = case.tokens // SEQUENCES
    dtype = DTYPES[case.dtype]
    hidden = draw.normal(SEQUENCES, tokens, case.width).to(dtype).requires_grad_()
    weight = torch.empty(case.vocabulary, case.width, dtype=dtype, device=device)
    for rows in weight.split(2**16):  # no fp32 copy of the whole
        rows.copy_(draw.normal(*rows.shape) * case.width**-0.5)
    weight.requires_grad_(case.passes != FROZEN)
    targets = draw.below(case.vocabulary, SEQUENCES, tokens)
    old_logprobs = torch.cat(
        [
            logits.log_softmax(-1).gather(1, some.unsqueeze(1)).squeeze(1)
            for logits, some in products(hidden, weight, targets, torch.float32)
        ]
    ).view_as(targets)
    return Batch(
        targets,
        old_logprobs=old_logprobs + 0.05 * draw.normal(SEQUENCES, tokens),
        upstream=draw.normal(SEQUENCES, tokens),
        hidden=hidden,
        weight=weight,
        **advantages_and_mask(SEQUENCES, tokens, case.active, device),
    )


def products(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits [n, V] of some rows at a time, in `dtype`, and the rows' targets."""
    weight = weight.detach().to(dtype)
    chunk = max(1, REFERENCE_BYTES // (8 * weight.shape[0]))
    flat = hidden.detach().flatten(0, -2)
    for rows, some in zip(flat.split(chunk), targets.flatten().split(chunk), strict=True):
        yield rows.to(dtype) @ weight.t(), some


def make_logits(case: Case, seed: int, device: torch.device) -> Batch:
    """Logits of one long sequence, the last axis of a [1, T + 1, V] tensor's first T rows."""
    draw = Draw(seed, device)
    shape = (1, case.tokens + 1, case.vocabulary)
    padded = torch.empty(shape, dtype=DTYPES[case.dtype], device=device)
    for rows in padded[0].split(2**10):  # no fp32 copy of the whole
        rows.copy_(3 * draw.normal(*rows.shape))
    logits = padded[:, :-1].requires_grad_()
    targets = draw.below(case.vocabulary, 1, case.tokens)
    with torch.no_grad():
        chosen = logits.gather(-1, targets[..., None]).squeeze(-1).float()
        chunks = [rows.float().logsumexp(-1) for rows in logits[0].split(2**10)]
    old_logprobs = chosen - torch.cat(chunks)[None] + 0.05 * draw.normal(1, case.tokens)
    return Batch(
        targets,
        old_logprobs=old_logprobs,
        upstream=draw.normal(1, case.tokens),
        logits=logits,
        padded_logits=padded,
        **advantages_and_mask(1, case.tokens, case.active, device),
    )


def make_logprobs(case: Case, seed: int, device: torch.device) -> Batch:
    draw = Draw(seed, device)
    sequences = 256
    tokens = case.tokens // sequences
    logprobs = -draw.normal(sequences, tokens).abs()
    batch = Batch(
        torch.zeros_like(logprobs, dtype=torch.long),
        old_logprobs=logprobs + 0.2 * draw.normal(sequences, tokens),
        upstream=draw.normal(sequences, tokens),
        logprobs=logprobs.clone().requires_grad_(),
        **advantages_and_mask(sequences, tokens, 0.6, device),
    )
    batch.advantages = draw.normal(sequences)
    return batch
