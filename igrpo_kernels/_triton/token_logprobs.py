"""`token_logprobs` on CUDA: the row kernels over the logits where they lie."""

import torch
from torch import Tensor

from ..softmax_rows import LogitTransform
from .softmax_rows import softmax_rows_backward, softmax_rows_forward, with_row_layout


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor]:
    """Return log-probs and entropies (an empty tensor where not asked for)."""
    transform = LogitTransform(temperature)
    rows = softmax_rows_forward(
        with_row_layout(logits), targets, mask, transform, entropy=with_entropy
    )
    return rows.logprobs, rows.logprobs.new_zeros(0) if rows.entropy is None else rows.entropy


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient of the logits, contiguous and in their dtype."""
    transform = LogitTransform(temperature)
    walked = with_row_layout(logits)
    rows = softmax_rows_forward(walked, targets, mask, transform, entropy=grad_entropy is not None)
    grad = torch.empty_like(walked, memory_format=torch.contiguous_format)
    softmax_rows_backward(grad, walked, targets, mask, transform, rows, grad_logprobs, grad_entropy)
    return grad.view(logits.shape)
