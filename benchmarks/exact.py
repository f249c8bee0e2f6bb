"""What each op must give, in float64 and written out by hand: the gate before any clock runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.batches import CLIP, REFERENCE_BYTES, Batch, clipped_token_mean, products
from benchmarks.cases import FORWARD, FROZEN, Case

Outputs = dict[str, Tensor]
PART = 2**26  # elements that are compared at a time


@dataclass(frozen=True)
class Upstream:
    """What arrives at the log-probs from above, and the loss there, if there is one."""

    gradient: Tensor
    outputs: Outputs


def in_float64(batch: Batch) -> Batch:
    """The same batch without its leaves, the rest in float64."""
    return Batch(
        batch.targets,
        batch.advantages.double(),
        batch.mask,
        batch.old_logprobs.double(),
        batch.upstream.double(),
    )


def given(logprobs: Tensor, batch: Batch) -> Upstream:
    """The gradient that the batch brings along; the log-probs are the output."""
    return Upstream(batch.upstream.double(), {"logprobs": logprobs})


def of_the_loss(logprobs: Tensor, batch: Batch) -> Upstream:
    """The gradient of the clipped loss."""
    logprobs = logprobs.detach().requires_grad_()
    loss = clipped_token_mean(logprobs, in_float64(batch))
    return Upstream(torch.autograd.grad(loss, logprobs)[0], {"loss": loss.detach()})


def of_cross_entropy(logprobs: Tensor, batch: Batch) -> Upstream:
    """The gradient of the mean cross entropy, which some peers compute in the loss's place."""
    return Upstream(torch.full_like(logprobs, -1 / logprobs.numel()), {"loss": -logprobs.mean()})


def chosen(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(1, targets[:, None]).squeeze(1)


def gradient_of_logits(logits: Tensor, targets: Tensor, upstream: Tensor) -> Tensor:
    """g (1[j = target] - p_j). Shape [N, V]."""
    grad = -logits.softmax(-1)
    grad.scatter_add_(1, targets[:, None], torch.ones_like(grad[:, :1]))
    return grad.mul_(upstream[:, None])


def linear(case: Case, batch: Batch, above: Callable[[Tensor, Batch], Upstream]) -> Outputs:
    """The ops over hidden states, in two sweeps over chunks of rows."""
    hidden, weight = batch.hidden.detach().flatten(0, -2).double(), batch.weight.detach().double()

    def sweep() -> Iterator[tuple[Tensor, Tensor]]:
        return products(hidden, weight, batch.targets, torch.float64)

    parts = [chosen(logits.log_softmax(-1), targets) for logits, targets in sweep()]
    logprobs = torch.cat(parts).view_as(batch.targets)
    if case.passes == FORWARD:
        return {"logprobs": logprobs}
    upstream = above(logprobs, batch)
    flat = upstream.gradient.flatten()
    by_hidden = torch.empty_like(hidden)
    by_weight = None if case.passes == FROZEN else torch.zeros_like(weight)
    start = 0
    for logits, targets in sweep():
        at = slice(start, start := start + len(targets))
        grad = gradient_of_logits(logits, targets, flat[at])
        by_hidden[at] = grad @ weight
        if by_weight is not None:
            by_weight.addmm_(grad.t(), hidden[at])
    result = upstream.outputs | {"hidden gradient": by_hidden.view_as(batch.hidden)}
    return result if by_weight is None else result | {"weight gradient": by_weight}


def token_logprobs(case: Case, batch: Batch) -> Outputs:
    """Log-probs and entropies; or, with a backward, the loss and the gradient of the logits."""
    flat, targets = batch.logits.detach().flatten(0, 1), batch.targets.flatten()
    size = max(1, REFERENCE_BYTES // (8 * case.vocabulary))
    chunks = list(zip(flat.split(size), targets.split(size), strict=True))
    logprobs, entropy = [], []
    for logits, some in chunks:
        log_probs = logits.double().log_softmax(-1)
        logprobs.append(chosen(log_probs, some))
        entropy.append(-(log_probs.exp() * log_probs).sum(-1))
    together = torch.cat(logprobs).view_as(batch.targets)
    if case.passes == FORWARD:
        return {"logprobs": together, "entropy": torch.cat(entropy).view_as(batch.targets)}
    upstream = of_the_loss(together, batch)
    parts = upstream.gradient.flatten().split(size)
    grads = [
        gradient_of_logits(logits.double(), some, part)
        for (logits, some), part in zip(chunks, parts, strict=True)
    ]
    return upstream.outputs | {"logits gradient": torch.cat(grads).view_as(batch.logits)}


def clipped_policy_loss(case: Case, batch: Batch) -> Outputs:
    """The loss of each token and its derivative, times what arrives."""
    exact = in_float64(batch)
    advantages = exact.advantages[:, None]
    ratio = torch.exp(batch.logprobs.detach().double() - exact.old_logprobs)
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    losses = torch.maximum(-ratio * advantages, -clipped * advantages)
    moves = -ratio * advantages >= -clipped * advantages
    slopes = torch.where(moves, -ratio * advantages, 0.0)
    counts = batch.mask != 0
    return {
        "losses": torch.where(counts, losses, 0.0),
        "logprobs gradient": torch.where(counts, slopes * exact.upstream, 0.0),
    }


def policy_loss(case: Case, batch: Batch) -> Outputs:
    """The clipped loss and its gradient."""
    upstream = of_the_loss(batch.logprobs.detach().double(), batch)
    return upstream.outputs | {"logprobs gradient": upstream.gradient}


def error(got: Tensor, wanted: Tensor, name: str) -> float:
    """Of gradients the difference's norm over the norm; of others its largest over the largest.

    A loss is a mean of terms around one, which may cancel: it is measured against one at least.
    """
    parts = zip(got.detach().flatten().split(PART), wanted.flatten().split(PART), strict=True)
    pairs = ((mine.double() - exact, exact) for mine, exact in parts)
    if name.endswith("gradient"):
        squares = [torch.stack([d.square().sum(), e.square().sum()]) for d, e in pairs]
        difference, size = torch.stack(squares).sum(0).sqrt()
    else:
        largest = [torch.stack([d.abs().max(), e.abs().max()]) for d, e in pairs]
        difference, size = torch.stack(largest).amax(0)
        size = size.clamp(min=1.0)
    return (difference / size).item()


def errors(got: Outputs, wanted: Outputs) -> dict[str, float]:
    """Error of each output, by name; a peer may leave one out."""
    return {name: error(got[name], wanted[name], name) for name in wanted if name in got}
