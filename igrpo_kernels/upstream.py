"""Gradients that the forward has taken, times the upstream scalar in the backward."""

from collections.abc import Sequence

import torch
from torch import Tensor


def times_upstream(gradients: Sequence[Tensor], scalar: Tensor) -> list[Tensor]:
    """Multiply saved gradients by the upstream scalar: in place, unless they may be wanted again.

    The scalar is 1 nearly always, and then this costs nothing. To be called in a backward, where
    PyTorch tells whether a second one may follow (`retain_graph=True`).
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return [gradient * scalar for gradient in gradients]
    if scalar.is_cuda:  # read there: no host waits for it
        from ._triton.rescale import rescale_

        return [rescale_(gradient, scalar) for gradient in gradients]
    if scalar.item() == 1:
        return list(gradients)
    return [gradient.mul_(scalar) for gradient in gradients]
