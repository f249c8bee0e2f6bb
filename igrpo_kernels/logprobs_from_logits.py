"""Log-probs (and entropies) of sampled tokens from logits, in fp32 whatever the logits' dtype."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_flag, check_floating
from .relative_softmax import SoftmaxRows, exponentials, softmax_of_logits
from .row_checks import NAMESPACE, check_rows, check_targets, row_temperature
from .row_selection import Rows, nonzero, row_pieces, rows_where, take, working_dtype
from .row_softmax import LogitTransform, TargetColumns
from .row_statistics import RowStatistics


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
    the backward keeps nothing of the size of the logits but the logits. Arithmetic is in fp32 (fp64
    for fp64 logits), with the target left out of the sum, so that a confident token keeps its
    digits. Logits of -inf have probability zero and gradient zero; a row of nothing but -inf gives
    NaN, as in torch. The same call gives the same bits; how many rows stand beside a row may change
    its last ones. Once differentiable, in log-probs and entropy.

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

    Examples:
        >>> logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [9.0, 0.0, 0.0, 0.0]])
        >>> token_logprobs(logits, torch.tensor([3, 0]))
        tensor([-1.3863e+00, -3.7016e-04])
    """
    check_floating("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must have shape [..., V] with V >= 1, got {list(logits.shape)}")
    check_flag("return_entropy", return_entropy)
    check_flag("inplace_backward", inplace_backward)
    targets, mask = check_targets(targets, mask, logits)
    per_row = row_temperature(temperature, targets, working_dtype(logits.dtype))
    if inplace_backward and logits.requires_grad and torch.is_grad_enabled():
        _check_own_memory(logits)
    compute = _op if torch.compiler.is_compiling() else _ScoreRows.apply
    logprobs, *more = compute(
        logits.unsqueeze(0) if logits.dim() == 1 else logits,
        targets.flatten(),
        None if mask is None else mask.flatten(),
        per_row,
        return_entropy,
        inplace_backward,
    )
    logprobs = logprobs.view(targets.shape)
    return (logprobs, more[0].view(targets.shape)) if return_entropy else logprobs


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


def _flat(logits: Tensor) -> Tensor:
    """View [..., V] as [N, V] where memory allows; elsewhere rows are found by their axes."""
    return logits.view(-1, logits.shape[-1]) if logits.is_contiguous() else logits


def _at(logits: Tensor, rows: Rows) -> Any:
    """Where rows stand among the leading axes of logits."""
    if logits.dim() == 2:
        return slice(rows.start, rows.stop) if isinstance(rows, range) else rows
    if isinstance(rows, range):
        rows = torch.arange(rows.start, rows.stop, device=logits.device)
    return torch.unravel_index(rows, logits.shape[:-1])


def _take(logits: Tensor, rows: Rows) -> Tensor:
    """Return some rows of logits in the dtype of the arithmetic: a view of them, or a copy."""
    some = take(logits, rows) if logits.dim() == 2 else logits[_at(logits, rows)]
    return some.to(working_dtype(logits.dtype))


def _score_rows(
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    with_entropy: bool,
    inplace_backward: bool = False,
) -> RowStatistics:
    """Return what all rows leave."""
    check_rows(targets, mask, temperature, logits.shape[-1])
    if logits.is_cuda:
        from ._triton import logit_rows as kernels

        temperatures = LogitTransform(temperature).temperature_tensor(logits)
        return kernels.forward(logits, targets, mask, temperatures, with_entropy)
    logits, rows = _flat(logits), rows_where(targets.shape[0], mask)
    transform, found = LogitTransform(temperature), []
    for some in row_pieces(rows, logits.shape[-1]):
        chunk = transform.take(some).apply(_take(logits, some))
        at = TargetColumns(take(targets, some))
        found.append(softmax_of_logits(chunk, at, entropy=with_entropy))
    if not found:
        dtype = working_dtype(logits.dtype)
        return RowStatistics.zeros(targets, dtype, entropy=with_entropy)
    return RowStatistics.join(found).spread(rows, targets.shape[0])


def _differentiate_rows(logits: Tensor, *rest: Any) -> Tensor:
    """Return the gradient of the logits, in memory of its own."""
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _write_gradient(grad, logits, *rest)
    return grad


def _differentiate_rows_(logits: Tensor, *rest: Any) -> None:
    """Overwrite logits by their gradient."""
    _write_gradient(logits, logits, *rest)


def _write_gradient(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    known: list[Tensor | None],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """Overwrite `grad`, which may be `logits`, by the gradient of the logits."""
    statistics = RowStatistics.of_tensors(known)
    upstream = grad_logprobs, grad_entropy
    if logits.is_cuda:
        from ._triton import logit_rows as kernels

        temperatures = LogitTransform(temperature).temperature_tensor(logits)
        kernels.write_gradient(grad, logits, targets, mask, temperatures, statistics, *upstream)
        return
    grad, logits = _flat(grad), _flat(logits)
    transform, count = LogitTransform(temperature), targets.shape[0]
    active = rows_where(count, mask, nonzero(*upstream))
    for rows in row_pieces(active, logits.shape[-1]):
        some, scale = statistics.take(rows), transform.take(rows)
        chunk = exponentials(_take(logits, rows), scale, some.reference[:, None])
        softmax = SoftmaxRows(some, TargetColumns(take(targets, rows)), scale, chunk)
        above = (take(part, rows) for part in upstream)
        found = softmax.gradient_of_all_(*above, dtype=chunk.dtype)
        if isinstance(rows, range) and grad.dim() == 2:
            found.multiplied(grad.dtype, out=take(grad, rows))
        else:
            grad[_at(grad, rows)] = found.multiplied(grad.dtype)
    if len(active) < count:
        others = torch.ones_like(targets, dtype=torch.bool)
        others[active] = False
        grad[others.view(grad.shape[:-1])] = 0


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, temperature, ctx.with_entropy, ctx.in_place = inputs
    ctx.temperature = None if isinstance(temperature, Tensor) else temperature
    ctx.save_for_backward(*tensors, temperature if ctx.temperature is None else None, *output)
    ctx.set_materialize_grads(False)


def _run_backward(
    differentiate: Callable[..., Tensor],
    differentiate_: Callable[..., None],
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None = None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:  # an empty tensor, and so is its gradient
        grad_entropy = None
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 6
    logits, targets, mask, temperature, *known = ctx.saved_tensors
    temperature = temperature if ctx.temperature is None else ctx.temperature
    given = targets, mask, temperature, known, grad_logprobs, grad_entropy
    if ctx.in_place:
        grad = logits.detach()
        differentiate_(grad, *given)
    else:
        grad = differentiate(logits, *given)
    return grad, *[None] * 5


class _ScoreRows(torch.autograd.Function):
    """The op without a compiler: a `custom_op` costs the host more than a small batch's work."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor | None, ...]:
        """Score the rows."""
        output = _score_rows(*inputs)
        _save_for_backward(ctx, inputs, output)
        return output[: 1 + ctx.with_entropy]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Differentiate the rows."""
        return _run_backward(_differentiate_rows, _differentiate_rows_, ctx, *gradients)


ROWS = "Tensor targets, Tensor? mask, Tensor temperature"
KNOWN = "Tensor[] known, Tensor? grad_logprobs, Tensor? grad_entropy"
_op = torch.library.custom_op(
    f"{NAMESPACE}::token_logprobs",
    lambda *inputs: _score_rows(*inputs).tensors,
    mutates_args=(),
    schema=f"(Tensor logits, {ROWS}, bool with_entropy, bool inplace_backward=False) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    f"{NAMESPACE}::token_logprobs_backward",
    _differentiate_rows,
    mutates_args=(),
    schema=f"(Tensor logits, {ROWS}, {KNOWN}) -> Tensor",
)
_backward_op_ = torch.library.custom_op(
    f"{NAMESPACE}::token_logprobs_backward_",
    _differentiate_rows_,
    mutates_args=("logits",),
    schema=f"(Tensor(a!) logits, {ROWS}, {KNOWN}) -> ()",
)
_op.register_autograd(
    partial(_run_backward, _backward_op, _backward_op_), setup_context=_save_for_backward
)


@_op.register_fake
def _(logits: Tensor, targets: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, with_entropy = working_dtype(logits.dtype), rest[2]
    return RowStatistics.zeros(targets, dtype, entropy=with_entropy).tensors


@_backward_op.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)
