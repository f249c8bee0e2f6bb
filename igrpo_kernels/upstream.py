"""A gradient that the forward has taken, times the upstream scalar in the backward."""

import torch
from torch import Tensor


def times_upstream(gradient: Tensor, scalar: Tensor) -> Tensor:
    """Multiply a saved gradient by the upstream scalar: in place, unless it may be wanted again.

    The scalar is 1 nearly always, and then this costs nothing. To be called in a backward, where
    PyTorch tells whether a second one may follow (`retain_graph=True`).
    """
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * scalar
    if gradient.is_cuda and gradient.is_contiguous():
        from ._triton.rescale import rescale_

        return rescale_(gradient, scalar)
    if not gradient.is_cuda and scalar == 1:
        return gradient
    return gradient.mul_(scalar)
