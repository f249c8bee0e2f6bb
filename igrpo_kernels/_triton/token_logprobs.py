"""`token_logprobs` on CUDA: the row kernels over the logits where they lie."""

import torch
from torch import Tensor

from ..softmax_rows import LogitTransform
from ..softmax_statistics import RowStatistics
from .softmax_rows import softmax_rows_backward, softmax_rows_forward, with_row_layout


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor, with_entropy: bool
) -> RowStatistics:
    """Return log-prob, entropy, maximum and normalizer of each row."""
    transform = LogitTransform(temperature)
    return softmax_rows_forward(
        with_row_layout(logits), targets, mask, transform, entropy=with_entropy
    )


def backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: RowStatistics,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Return the gradient of the logits, contiguous and in their dtype."""
    walked = with_row_layout(logits)
    grad = torch.empty_like(walked, memory_format=torch.contiguous_format)
    softmax_rows_backward(
        grad,
        walked,
        targets,
        mask,
        LogitTransform(temperature),
        known,
        grad_logprobs,
        grad_entropy,
    )
    return grad.view(logits.shape)
