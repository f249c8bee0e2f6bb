"""Random heads for the tests of `linear_token_logprobs`, and plain torch beside them."""

from collections.abc import Callable

import torch
from torch import Tensor


def plain(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Log-probs and entropies with all logits at once, in the dtype of the inputs. [2, N]."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = (logits / temperature).log_softmax(-1)
    logprobs = log_p.gather(-1, targets[..., None]).squeeze(-1)
    return torch.stack([logprobs, -(log_p.exp() * log_p).sum(-1)])


def head(
    rows: int, width: int, vocabulary: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Random hidden states, weight, bias (as leaves) and targets."""
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width) / width**0.5 * 2).to(dtype).requires_grad_()
    bias = torch.randn(vocabulary).to(dtype).requires_grad_()
    return hidden, weight, bias, torch.randint(0, vocabulary, (rows,))


def gradients(function: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Values and gradients in float64 of a function of leaves, under a fixed upstream gradient."""
    fresh = [leaf.detach().requires_grad_() for leaf in leaves]
    values = function(*fresh)
    upstream = torch.linspace(-1, 1, values.numel(), dtype=values.dtype).view_as(values)
    grads = torch.autograd.grad(values, fresh, upstream)
    return values.detach().double(), [grad.double() for grad in grads]
