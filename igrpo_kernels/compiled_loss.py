"""The one pass as an op, for torch.compile: the objective goes in as names and numbers.

A compiler can't look into the pass, whose rows depend on the data, nor hand an op a dataclass. So
the op's schema holds the objective taken apart, and the gradients come out for the backward.
"""

from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from .fused_loss import FusedLoss, RowLosses
from .head_arguments import HeadBatch, without_autocast
from .head_softmax import implementation
from .kl import K1, K2, K3, RatioWeighted, ScoreWeighted
from .linear_head import LinearHead, gradient_dtype
from .loss_from_logprobs import PolicyLoss
from .loss_terms import TokenInputs, TokenObjective
from .row_checks import NAMESPACE
from .row_selection import working_dtype
from .row_softmax import LogitTransform
from .sequences import Sequences
from .surrogates import (
    Cispo,
    Clip,
    DppoKl,
    DppoTv,
    Gmpo,
    Reinforce,
    Sapo,
    SequenceClip,
    SequenceTokenClip,
    Vespo,
)
from .vocabulary_shard import from_schema, to_schema

ESTIMATORS, WEIGHTED = (K1, K2, K3), (RatioWeighted, ScoreWeighted)
OF_TOKENS = (Clip, Cispo, DppoKl, DppoTv, Reinforce, Sapo)
OF_SEQUENCES = (Gmpo, SequenceClip, SequenceTokenClip, Vespo)
PARTS = {
    part.__name__: part
    for part in (TokenObjective, *OF_TOKENS, *OF_SEQUENCES, *ESTIMATORS, *WEIGHTED)
}


def take_apart(part: Any) -> tuple[str, list[float]]:
    """Write a value as names and numbers: Clip(0.2, 0.28) as "Clip _ _ None" and [0.2, 0.28]."""
    if part is None:
        return "None", []
    if isinstance(part, int | float):
        return "_", [part]
    found = [take_apart(getattr(part, field.name)) for field in fields(part)]
    words = " ".join([type(part).__name__, *(words for words, _ in found)])
    return words, [number for _, numbers in found for number in numbers]


def put_together(words: str, numbers: list[float]) -> Any:
    """Undo `take_apart`."""
    left, known = iter(words.split()), iter(numbers)

    def read() -> Any:
        word = next(left)
        if word in PARTS:
            return PARTS[word](*(read() for _ in fields(PARTS[word])))
        return None if word == "None" else next(known)

    return read()


def can_carry(objective: TokenObjective, head: LinearHead, longest: int) -> bool:
    """Whether the op can run a loss: one of this package's, over sequences that fit a chunk.

    A compiler does not know how long the sequences are, only that none exceeds `longest`.
    """
    surrogate, kl = type(objective.surrogate), objective.kl
    while isinstance(kl, WEIGHTED):
        kl = kl.estimate
    fits = 4 * longest * head.widest <= implementation(head).budget(head)
    known = surrogate in OF_TOKENS or (surrogate in OF_SEQUENCES and fits)
    return known and type(kl) in ESTIMATORS


def carry(
    batch: HeadBatch, losses: RowLosses, entropy: bool, every: bool, skips: bool
) -> PolicyLoss:
    """Compute the loss by the op; the arguments are those of `FusedLoss.of`."""
    head, inputs = batch.head, losses.inputs
    leaves = batch.hidden, head.weight, head.bias
    grad = torch.is_grad_enabled()
    needed = [grad and leaf is not None and leaf.requires_grad for leaf in leaves]
    names = losses.of_no_rows(entropy).names
    loss, means, logprobs, entropies, *_ = _op(
        *leaves,
        batch.targets,
        batch.mask,
        inputs.sequences.owner,
        head.transform.temperature,
        inputs.advantages,
        inputs.old_logprobs,
        inputs.ref_logprobs,
        inputs.importance_weights,
        losses.weights,
        *take_apart(losses.objective),
        inputs.sequences.count,
        len(names),
        needed,
        entropy,
        every,
        skips,
        head.transform.softcap,
        head.transform.logit_scale,
        head.chunk_bytes,
        *to_schema(head.shard),
    )
    metrics = dict(zip(names, means.detach().unbind(), strict=True))
    return PolicyLoss(loss, metrics, logprobs.detach(), entropies.detach() if entropy else None)


def _run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    mask: Tensor | None,
    owner: Tensor | None,
    temperature: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None,
    importance_weights: Tensor | None,
    weights: Tensor,
    objective: str,
    numbers: list[float],
    sequences: int,
    metrics: int,
    needed: list[bool],
    entropy: bool,
    every: bool,
    skips: bool,
    softcap: float | None,
    logit_scale: float,
    chunk_bytes: int | None = None,
    slices: list[int] | None = None,
    group: str = "",
) -> tuple[Tensor, ...]:
    """Return loss, metrics, log-probs and entropies, and the gradients; empty where not wanted."""
    transform, shard = LogitTransform(temperature, softcap, logit_scale), from_schema(slices, group)
    weight = weight.detach().requires_grad_(needed[1])  # chunks are cut by it
    head = LinearHead(weight, bias, transform, shard, chunk_bytes)
    counts = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
    layout = Sequences(counts, sequences, owner, complete=mask is None)
    given = advantages, old_logprobs, ref_logprobs, importance_weights
    losses = RowLosses(put_together(objective, numbers), TokenInputs(layout, *given), weights)
    fused = FusedLoss.of(HeadBatch(head, hidden, targets, mask), losses, entropy, every, skips)
    with without_autocast(hidden.device), torch.no_grad(), _autograd():
        found, gradients = fused.run(hidden, needed)
    means = torch.stack(list(found.metrics.values()))
    assert found.logprobs is not None
    entropies = weights.new_empty(0) if found.entropy is None else found.entropy
    rest, nothing = iter(gradients), hidden.new_empty(0, dtype=gradient_dtype(hidden.dtype))
    of_leaves = (next(rest) if need else nothing.clone() for need in needed)
    return found.loss, means, found.logprobs, entropies, *of_leaves


def _autograd() -> AbstractContextManager[None]:
    """Let an op differentiate, as the slopes of a loss want: PyTorch runs ops below autograd."""
    key = torch._C.DispatchKey.AutogradFunctionality
    guard: AbstractContextManager[None] = torch._C._SetExcludeDispatchKeyGuard(key, False)
    return guard


_op = torch.library.custom_op(
    f"{NAMESPACE}::linear_policy_loss",
    _run,
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? mask, "
    "Tensor? owner, Tensor temperature, Tensor advantages, Tensor? old_logprobs, "
    "Tensor? ref_logprobs, Tensor? importance_weights, Tensor weights, str objective, "
    "float[] numbers, SymInt sequences, int metrics, bool[] needed, bool entropy, bool every, "
    "bool skips, float? softcap, float logit_scale, int? chunk_bytes=None, int[]? slices=None, "
    "str group='') -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@_op.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *rest: Any) -> Any:
    metrics, needed, entropy = rest[11:14]
    empty, dtype = hidden.new_empty, working_dtype(hidden.dtype)
    entropies = empty(targets.shape if entropy else 0, dtype=dtype)
    gradients = (
        empty(leaf.shape if leaf is not None and need else 0, dtype=gradient_dtype(hidden.dtype))
        for leaf, need in zip((hidden, weight, bias), needed, strict=True)
    )
    means = empty(metrics, dtype=dtype)
    return empty((), dtype=dtype), means, empty(targets.shape, dtype=dtype), entropies, *gradients


def _save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.others, ctx.dtype = len(inputs) - 3, inputs[0].dtype
    ctx.save_for_backward(*output[4:])
    ctx.set_materialize_grads(False)


def _times_upstream(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = (need and grad_loss is not None for need in ctx.needs_input_grad[:3])
    pairs = zip(ctx.saved_tensors, needs, strict=True)
    found = ((gradient * grad_loss).to(ctx.dtype) if need else None for gradient, need in pairs)
    return *found, *[None] * ctx.others


_op.register_autograd(_times_upstream, setup_context=_save_gradients)
