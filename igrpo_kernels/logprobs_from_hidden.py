"""Log-probs of sampled tokens directly from hidden states: the [N, V] logits never exist whole."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .checks import check_flag
from .head_arguments import HeadBatch, without_autocast
from .head_softmax import SoftmaxChunk, is_one_chunk, softmax_chunks
from .linear_head import HeadGradients, LinearHead
from .row_checks import NAMESPACE, check_rows
from .row_selection import nonzero, rows_where, take, working_dtype
from .row_softmax import LogitTransform
from .row_statistics import RowStatistics
from .vocabulary_shard import VocabularyShard, from_schema, to_schema


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shard: VocabularyShard | None = None,
    chunk_bytes: int | None = None,
    skip_zero_rows: bool = True,
    return_entropy: Literal[False] = False,
) -> Tensor: ...


@overload
def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shard: VocabularyShard | None = None,
    chunk_bytes: int | None = None,
    skip_zero_rows: bool = True,
    return_entropy: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shard: VocabularyShard | None = None,
    chunk_bytes: int | None = None,
    skip_zero_rows: bool = True,
    return_entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute the log-prob of each target from hidden states and the head's weight.

    token_logprobs(cap(logit_scale * (hidden @ weight.T + bias)), targets, temperature=temperature)
    with cap(y) = softcap * tanh(y / softcap), or y where softcap is None

    Logits are computed a chunk of rows at a time, and again in the backward; from bf16 inputs too
    they accumulate in fp32 and are never rounded. A confident token keeps its digits: its log-prob
    is -log1p of the other tokens' odds. The weight's gradient is summed over chunks in fp32. Rows
    that the mask leaves out cost nothing, rows whose upstream gradient is exactly zero cost nothing
    in the backward, and an input that needs no gradient (frozen head, frozen trunk) gets none.
    Under torch.autocast the inputs are cast as a linear layer casts them. The same call gives the
    same bits; how many rows stand beside a row may change its last ones. Once differentiable, in
    log-probs and entropy.

    Args:
        hidden: Last hidden state of the position that predicts each target. Shape [..., H].
        weight: The head's weight; with `shard`, this rank's rows of it. Shape [V, H].
        targets: Index of each sampled token. Shape [...].
        mask: 1 (or True) where a row counts; None counts every row. Other rows give 0 and get a
            gradient of 0, whatever they hold. Shape [...].
        bias: The head's bias; with `shard`, this rank's part of it. Shape [V].
        temperature: Divides the logits: a number, or one per row. Treated as a constant. Shape
            [...].
        softcap: Bound on the logits before the temperature (Gemma 2).
        logit_scale: Factor on the products before the cap (Cohere, Granite).
        shard: Which slice of the vocabulary `weight` is, of those that the ranks of a process group
            hold. Same results on every rank; see `VocabularyShard`.
        chunk_bytes: Bytes of logits, or of their exponentials, held at a time, at least one row's.
            None: 256 MiB on a CPU; on CUDA four times the weight's, 1.25 GiB at least and 2.5 at
            most.
        skip_zero_rows: Find rows whose upstream gradient is exactly zero, and leave them out of the
            backward. On a GPU the host waits for that; with False and no mask it never waits (CUDA
            graphs).
        return_entropy: Also return the entropy.

    Returns:
        Log-probs, or log-probs and entropy, in fp32 (fp64 for fp64 inputs). Shape [...]. Gradient
        flows to hidden, weight and bias.

    Raises:
        TypeError: A dtype is wrong, hidden, weight and bias differ in it, or `shard` is not
            a VocabularyShard.
        ValueError: Shapes do not fit, a number is out of range, a target is outside the whole
            vocabulary on a row that counts (a device assertion for CUDA tensors), `weight` is not
            the slice that `shard` describes, or the ranks differ in the rows that count.

    Examples:
        >>> hidden, weight = torch.ones(2, 3), torch.eye(4, 3)
        >>> linear_token_logprobs(hidden, weight, torch.tensor([0, 3]))
        tensor([-1.2143, -2.2143])
    """
    check_flag("return_entropy", return_entropy)
    check_flag("skip_zero_rows", skip_zero_rows)
    options = temperature, softcap, logit_scale, shard, chunk_bytes
    batch = HeadBatch.of(hidden, weight, bias, targets, mask, *options)
    logprobs, entropy = score(batch, entropy=return_entropy, skip_zero_rows=skip_zero_rows)
    return logprobs if entropy is None else (logprobs, entropy)


def score(batch: HeadBatch, *, entropy: bool, skip_zero_rows: bool) -> tuple[Tensor, Tensor | None]:
    """Return the log-probs and, on request, the entropies of a batch. Shape of its targets."""
    head, hidden, targets, mask = batch
    compute = _op if torch.compiler.is_compiling() else _ScoreRows.apply
    logprobs, *more = compute(
        hidden,
        head.weight,
        head.bias,
        targets.flatten(),
        None if mask is None else mask.flatten(),
        head.transform.temperature,
        head.transform.softcap,
        head.transform.logit_scale,
        entropy,
        skip_zero_rows,
        head.chunk_bytes,
        *to_schema(head.shard),
    )
    return logprobs.view(targets.shape), more[0].view(targets.shape) if entropy else None


def _score_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    logit_scale: float,
    with_entropy: bool,
    skip_zero_rows: bool = True,
    chunk_bytes: int | None = None,
    slices: list[int] | None = None,
    group: str = "",
) -> RowStatistics:
    """Return what all rows leave."""
    transform, shard = LogitTransform(temperature, softcap, logit_scale), from_schema(slices, group)
    head = LinearHead(weight, bias, transform, shard, chunk_bytes)
    check_rows(targets, mask, temperature, head.whole_vocabulary)
    rows = rows_where(targets.shape[0], mask)
    with without_autocast(hidden.device):
        chunks = softmax_chunks(head, hidden, targets, rows, entropy=with_entropy, keeps=False)
        found = [softmax.statistics for *_, softmax in chunks]
    if not found:
        dtype = working_dtype(hidden.dtype)
        return RowStatistics.zeros(targets, dtype, entropy=with_entropy)
    return RowStatistics.join(found).spread(rows, targets.shape[0])


def _differentiate_rows(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    temperature: float | Tensor,
    known: list[Tensor | None],
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    needed: list[bool],
    softcap: float | None,
    logit_scale: float,
    skip_zero_rows: bool = True,
    chunk_bytes: int | None = None,
    slices: list[int] | None = None,
    group: str = "",
) -> list[Tensor]:
    """Return the gradients that are needed, of hidden, weight and bias."""
    transform, shard = LogitTransform(temperature, softcap, logit_scale), from_schema(slices, group)
    head = LinearHead(weight, bias, transform, shard, chunk_bytes)
    active = nonzero(grad_logprobs, grad_entropy) if skip_zero_rows else None
    rows = rows_where(targets.shape[0], mask, active)
    gradients = HeadGradients(head, hidden, needed, one_chunk=is_one_chunk(head, rows))
    statistics = RowStatistics.of_tensors(known)
    with without_autocast(hidden.device):
        for chunk in softmax_chunks(head, hidden, targets, rows, known=statistics):
            _add_gradients(gradients, chunk, grad_logprobs, grad_entropy)
            del chunk  # and with it its memory, while `finish` rounds
        return [gradient.to(hidden.dtype) for gradient in gradients.finish()]


def _add_gradients(gradients: HeadGradients, chunk: SoftmaxChunk, *upstream: Tensor | None) -> None:
    slopes = (take(part, chunk.rows) for part in upstream)
    scales = gradients.needs_weight
    found = chunk.softmax.gradient_(*slopes, dtype=gradients.matrix_dtype, scales_hidden=scales)
    gradients.add(chunk.rows, chunk.hidden, found)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    *tensors, temperature, ctx.softcap, ctx.logit_scale, ctx.with_entropy = inputs[:9]
    ctx.temperature = None if isinstance(temperature, Tensor) else temperature
    ctx.rest = inputs[9:]
    ctx.save_for_backward(*tensors, temperature if ctx.temperature is None else None, *output)
    ctx.set_materialize_grads(False)


def _run_backward(
    differentiate: Callable[..., list[Tensor]],
    ctx: Any,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None = None,
    *_: Tensor | None,
) -> tuple[Tensor | None, ...]:
    if not ctx.with_entropy:  # an empty tensor, and so is its gradient
        grad_entropy = None
    nothing = (None,) * (9 + len(ctx.rest))
    if grad_logprobs is None and grad_entropy is None:
        return nothing
    *tensors, temperature, logprobs, entropy, reference, total = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:3])
    computed = differentiate(
        *tensors,
        temperature if ctx.temperature is None else ctx.temperature,
        [logprobs, entropy, reference, total],
        grad_logprobs,
        grad_entropy,
        needed,
        ctx.softcap,
        ctx.logit_scale,
        *ctx.rest,
    )
    found = iter(computed)
    return *(next(found) if need else None for need in needed), *nothing[3:]


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
        return _run_backward(_differentiate_rows, ctx, *gradients)


HEAD = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, Tensor temperature"
)
REST = "bool skip_zero_rows=True, int? chunk_bytes=None, int[]? slices=None, str group=''"
_op = torch.library.custom_op(
    f"{NAMESPACE}::linear_token_logprobs",
    lambda *inputs: _score_rows(*inputs).tensors,
    mutates_args=(),
    schema=f"({HEAD}, float? softcap, float logit_scale, bool with_entropy, {REST}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
_backward_op = torch.library.custom_op(
    f"{NAMESPACE}::linear_token_logprobs_backward",
    _differentiate_rows,
    mutates_args=(),
    schema=f"({HEAD}, Tensor[] known, Tensor? grad_logprobs, Tensor? grad_entropy, bool[] needed, "
    f"float? softcap, float logit_scale, {REST}) -> Tensor[]",
)
_op.register_autograd(partial(_run_backward, _backward_op), setup_context=_save_for_backward)


@_op.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    targets, with_entropy = rest[2], rest[7]
    return RowStatistics.zeros(targets, working_dtype(hidden.dtype), entropy=with_entropy).tensors


@_backward_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    inputs = zip((hidden, weight, bias), rest[6], strict=True)
    return [x.new_empty(x.shape) for x, need in inputs if need and x is not None]
