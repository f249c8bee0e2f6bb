"""`token_logprobs` on CUDA: the row kernels over the logits where they lie."""

from torch import Tensor

from ..relative_softmax import LogitTransform
from ..row_statistics import RowStatistics
from .softmax_rows import softmax_rows_backward, softmax_rows_forward, with_row_layout


def forward(
    logits: Tensor, targets: Tensor, mask: Tensor | None, temperature: Tensor, with_entropy: bool
) -> RowStatistics:
    """Return log-prob, entropy, maximum and normalizer of each row."""
    transform = LogitTransform(temperature)
    return softmax_rows_forward(
        with_row_layout(logits), targets, mask, transform, entropy=with_entropy
    )


def write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: RowStatistics,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Overwrite `grad`, which may be `logits`, by the gradient of the logits."""
    walked, written = with_row_layout(logits), with_row_layout(grad)
    softmax_rows_backward(
        written,
        walked,
        targets,
        mask,
        LogitTransform(temperature),
        known,
        grad_logprobs,
        grad_entropy,
    )
    if written.data_ptr() != grad.data_ptr():  # a copy, whose rows can be walked
        grad.copy_(written.view(grad.shape))
