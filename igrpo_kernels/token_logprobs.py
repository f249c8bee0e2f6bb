"""Log-probs (and entropies) of sampled tokens from logits, in fp32 whatever the logits' dtype."""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from .checks import check_floating
from .row_chunks import (
    NAMESPACE,
    active_rows,
    check_rows,
    check_targets,
    counted_rows,
    row_pieces,
    row_temperature,
    take,
    working_dtype,
)
from .softmax_rows import LogitTransform, RowSoftmax, softmax_rows_
from .softmax_statistics import RowStatistics


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    inplace_backward: bool = False,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-prob of each target, and on request the entropy of its distribution.

    logprob[n] = z[n, targets[n]] - logsumexp_j z[n, j],   z = logits / temperature
    entropy[n] = -sum_j p[n, j] log p[n, j],               p = softmax(z)

    The same as `log_softmax(logits.float() / temperature).gather(...)`, a chunk of rows at a time:
    nothing of the size of the logits is kept for the backward but the logits. Arithmetic is in fp32
    (fp64 for fp64 logits). Logits of -inf have probability zero and gradient zero; a row in which
    all are -inf gives NaN, as in torch. The same call gives the same bits; how many rows stand
    beside a row may change its last ones. Once differentiable, in log-probs and entropy.

    Args:
        logits: Scores of the vocabulary. Shape [..., V].
        targets: Index of each sampled token. Rows that do not count may hold anything, such as
            -100. Shape [...].
        mask: 1 (or True) where a row counts; None counts every row. Other rows cost nothing, give
            0 and get a gradient of 0, whatever their logits hold. Shape [...].
        temperature: Divides the logits: a number, or one per row. Treated as a constant. Shape
            [...].
        inplace_backward: Let the backward overwrite `logits` by their gradient, which then takes no
            memory of its own. They must be an op's output that nothing else needs in its backward;
            where something does, and in a second backward, autograd raises.
        return_entropy: Also return the entropy.

    Returns:
        Log-probs, or log-probs and entropy, in fp32 (fp64 for fp64 logits). Shape [...].

    Raises:
        TypeError: `logits` is not floating point or `targets` not integer.
        ValueError: Shapes do not fit, the temperature is not above zero, or a target is outside the
            vocabulary on a row that counts (a device assertion for CUDA tensors), or
            `inplace_backward` would overwrite a leaf or expanded logits.

    Example:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
        >>> token_logprobs(logits, torch.tensor([3, 0]))
        tensor([-1.3863e+00, -3.7008e-04])
    """
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {list(logits.shape)}")
    flat, counted = check_targets(targets, mask, logits.shape[:-1])
    per_row = row_temperature(temperature, targets, working_dtype(logits.dtype))
    if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        _check_own_memory(logits)
    logits = logits.unsqueeze(0) if logits.dim() == 1 else logits
    logprobs, entropy, *_ = _forward(
        logits, flat, counted, per_row, return_entropy, inplace_backward
    )
    logprobs = logprobs.view(targets.shape)
    return (logprobs, entropy.view(targets.shape)) if return_entropy else logprobs


def _check_own_memory(logits: Tensor) -> None:
    """Raise unless the gradient can take the memory of the logits."""
    if logits.is_leaf:
        raise ValueError("inplace_backward would overwrite a leaf: logits must be an op's output")
    axes = zip(logits.shape, logits.stride(), strict=True)
    if any(size > 1 and stride == 0 for size, stride in axes):
        raise ValueError(
            "inplace_backward needs memory for each logit: logits must not be expanded, got shape "
            f"{list(logits.shape)} with strides {list(logits.stride())}"
        )


def _softmax_chunk(
    logits: Tensor,
    targets: Tensor,
    temperature: Tensor,
    rows: Tensor,
    *,
    entropy: bool,
    known: RowStatistics | None = None,
) -> tuple[tuple[Tensor, ...], RowSoftmax]:
    """Run `softmax_rows_` on a copy of some rows of logits; return where they stand, and it."""
    at = torch.unravel_index(rows, logits.shape[:-1])
    chunk = logits[at].to(working_dtype(logits.dtype))
    transform = LogitTransform(temperature).take(rows)
    known = None if known is None else known.take(rows)
    return at, softmax_rows_(chunk, targets[rows], transform, entropy=entropy, known=known)


@torch.library.custom_op(f"{NAMESPACE}::token_logprobs", mutates_args=())
def _forward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    with_entropy: bool,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_rows(targets, mask, temperature, logits.shape[-1])
    if logits.is_cuda:
        from ._triton import token_logprobs as kernels

        return kernels.forward(logits, targets, mask, temperature, with_entropy).tensors
    found = RowStatistics.zeros(targets, working_dtype(logits.dtype), entropy=with_entropy)
    for chunk in row_pieces(counted_rows(targets, mask), logits.shape[-1]):
        _, softmax = _softmax_chunk(logits, targets, temperature, chunk, entropy=with_entropy)
        found.put_(chunk, softmax.statistics)
    return found.tensors


@_forward.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    with_entropy: bool,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return RowStatistics.zeros(targets, working_dtype(logits.dtype), entropy=with_entropy).tensors


@torch.library.custom_op(f"{NAMESPACE}::token_logprobs_backward", mutates_args=())
def _backward(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: list[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(grad, logits, targets, mask, temperature, known, grad_logprobs, grad_entropy)
    return grad


@_backward.register_fake
def _(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: list[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(f"{NAMESPACE}::token_logprobs_backward_", mutates_args=("logits",))
def _backward_(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: list[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    _write_gradient(logits, logits, targets, mask, temperature, known, grad_logprobs, grad_entropy)


def _write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: Tensor,
    known: list[Tensor],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Overwrite `grad`, which may be `logits`, by the gradient of the logits."""
    statistics = RowStatistics.of_tensors(known)
    upstream = grad_logprobs, grad_entropy
    if logits.is_cuda:
        from ._triton import token_logprobs as kernels

        kernels.write_gradient(grad, logits, targets, mask, temperature, statistics, *upstream)
        return
    active = active_rows(mask, *upstream)
    for rows in row_pieces(active, logits.shape[-1]):
        at, softmax = _softmax_chunk(
            logits, targets, temperature, rows, entropy=grad_entropy is not None, known=statistics
        )
        some = softmax.gradient_(take(grad_logprobs, rows), take(grad_entropy, rows))
        grad[at] = some.to(grad.dtype)
    others = torch.ones_like(targets, dtype=torch.bool)
    others[active] = False
    grad[others.view(grad.shape[:-1])] = 0


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.with_entropy, ctx.in_place = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _run_backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:  # an empty tensor, and so is its gradient
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 6
    logits, *others, logprobs, entropy, maximum, normalizer = ctx.saved_tensors
    known = [logprobs, entropy, maximum, normalizer]
    if ctx.in_place:
        grad = logits.detach()
        _backward_(grad, *others, known, grad_logprobs, grad_entropy)
    else:
        grad = _backward(logits, *others, known, grad_logprobs, grad_entropy)
    return grad, *[None] * 5


_forward.register_autograd(_run_backward, setup_context=_save_for_backward)
