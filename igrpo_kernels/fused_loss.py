"""From hidden states to loss and gradients in one pass: a chunk of rows from products to gradients.

The gradients are taken in the forward, while a chunk's exponentials are at hand: three matrix
products per row (6 TVH operations) where computing the logits again in the backward takes four.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head_softmax import is_one_chunk, softmax_chunks
from .linear_head import HeadGradients, LinearHead
from .loss_terms import TokenInputs, TokenObjective, mean_logged
from .relative_softmax import ProductGradient, RowSoftmax
from .row_selection import Rows, take
from .row_statistics import RowStatistics
from .upstream import times_upstream


class Upstream(NamedTuple):
    """The loss of some rows, and its gradients by their log-probs and entropies."""

    loss: Tensor
    by_logprob: Tensor | None
    by_entropy: Tensor | None


@dataclass(frozen=True)
class RowLosses:
    """The loss of each row of a batch as a function of its log-prob and entropy.

    Attributes:
        objective: What the loss of a row is made of.
        inputs: What the rows are given, one value per row, packed.
        weights: The aggregate's weight of each row. Shape [N].
    """

    objective: TokenObjective
    inputs: TokenInputs
    weights: Tensor

    @property
    def owner(self) -> Tensor | None:
        """The sequence of each row, where no chunk may cut through one."""
        return self.inputs.sequences.owner if self.objective.surrogate.scope == "sequence" else None

    def may_be_nonzero(self) -> Tensor | None:
        """Mark the rows whose loss may differ from zero; None: any may."""
        surrogate, inputs = self.objective.surrogate, self.inputs
        if self.objective.needs_every_row:
            return None
        marked = inputs.advantages != 0
        if inputs.importance_weights is not None and not surrogate.folds_importance_weights:
            marked = marked & (inputs.importance_weights != 0)
        if surrogate.scope == "token":
            return marked
        # the log-prob of a row enters the losses of its whole sequence
        sequences = inputs.sequences
        return sequences.spread(sequences.sum(marked.long()) > 0)

    def differentiate(
        self, rows: Rows, found: RowStatistics, *, gradients: bool
    ) -> tuple[Upstream, dict[str, Tensor]]:
        """Return the share of some rows in the loss with its gradients, and the sums to log."""
        inputs = self.inputs.take(rows)
        logprobs, entropy = found.logprobs, found.entropy
        if not gradients:
            terms = self.objective(inputs.tokens(logprobs), inputs.ref_logprobs, entropy)
            upstream = Upstream((take(self.weights, rows) * terms.losses).sum(), None, None)
            return upstream, terms.sums(inputs.sequences)
        with torch.enable_grad():
            given = [logprobs.detach().requires_grad_()]
            if entropy is not None and self.objective.entropy_coef != 0:
                given.append(entropy.detach().requires_grad_())
                entropy = given[1]
            terms = self.objective(inputs.tokens(given[0]), inputs.ref_logprobs, entropy)
            loss = (take(self.weights, rows) * terms.losses).sum()
            by_logprob, *by_entropy = torch.autograd.grad(loss, given)
        upstream = Upstream(loss.detach(), by_logprob, by_entropy[0] if by_entropy else None)
        return upstream, terms.sums(inputs.sequences)


@dataclass(frozen=True)
class FusedLoss:
    """One pass over the rows of a batch.

    Attributes:
        losses: The losses of the rows.
        head: The head.
        targets: Target of each row. Shape [N].
        rows: The rows that count and whose loss may differ from zero.
        more: Further rows, which the metrics alone want.
        with_entropy: Whether to take the entropy too.
        metrics: Where `run` puts the means of what is logged.
    """

    losses: RowLosses
    head: LinearHead
    targets: Tensor
    rows: Rows
    more: Rows
    with_entropy: bool
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def loss(self, hidden: Tensor) -> Tensor:
        """Return the loss, through which the gradient flows to hidden, weight and bias."""
        if not torch.is_grad_enabled():
            return self.run(hidden, [False] * 3)[0]
        return FusedLossFunction.apply(hidden, self.head.weight, self.head.bias, self)

    def run(self, hidden: Tensor, needed: list[bool]) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and the gradients that are needed, of hidden, weight and bias."""
        keeps = any(needed)
        one_chunk = is_one_chunk(self.head, self.rows, keeps=keeps)
        gradients = HeadGradients(self.head, hidden, needed, one_chunk=one_chunk)
        shares, logged = [], []
        for rows, some, softmax in self._chunks(hidden, self.rows, keeps=keeps):
            share, sums, gradient = self._step(rows, softmax, gradients if keeps else None)
            shares.append(share)
            logged.append(sums)
            if gradient is not None:
                gradients.add(rows, some, gradient)
        for rows, _, softmax in self._chunks(hidden, self.more, keeps=False):
            logged.append(self.losses.differentiate(rows, softmax.statistics, gradients=False)[1])
        if not logged:
            none = self.losses.weights[:0]
            found = RowStatistics.zeros(none, none.dtype, entropy=self.with_entropy)
            logged.append(self.losses.differentiate(range(0), found, gradients=False)[1])
        count = max(1, len(self.rows) + len(self.more))
        self.metrics.update(mean_logged(logged, count))
        loss = self.losses.weights.new_zeros(()) if not shares else sum(shares[1:], shares[0])
        return loss, gradients.finish()

    def _step(
        self, rows: Rows, softmax: RowSoftmax, gradients: HeadGradients | None
    ) -> tuple[Tensor, dict[str, Tensor], ProductGradient | None]:
        """Take a chunk from log-probs to the gradient of its products, where that is wanted."""
        scales = gradients is not None and gradients.needs_weight
        if self.losses.objective.has_kernel(self.losses.weights):
            from ._triton.head_softmax import HeadSoftmax

            if isinstance(softmax, HeadSoftmax) and not softmax.lacks_slope:
                return softmax.clip(self.losses, rows, scales_hidden=scales)
        found, keeps = softmax.statistics, gradients is not None
        upstream, sums = self.losses.differentiate(rows, found, gradients=keeps)
        if gradients is None:
            return upstream.loss, sums, None
        slopes, dtype = (upstream.by_logprob, upstream.by_entropy), gradients.matrix_dtype
        gradient = softmax.gradient_(*slopes, dtype=dtype, scales_hidden=scales)
        return upstream.loss, sums, gradient

    def _chunks(self, hidden: Tensor, rows: Rows, *, keeps: bool) -> Any:
        return softmax_chunks(
            self.head,
            hidden,
            self.targets,
            rows,
            owner=self.losses.owner if rows is self.rows else None,
            entropy=self.with_entropy,
            keeps=keeps,
        )


class FusedLossFunction(torch.autograd.Function):
    """Runs the pass in the forward; the backward multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, fused: FusedLoss
    ) -> Tensor:
        """Return the loss. `weight` and `bias` are those of the pass' head."""
        ctx.needed = list(ctx.needs_input_grad[:3])
        loss, gradients = fused.run(hidden, ctx.needed)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply by the upstream scalar."""
        gradients = iter(ctx.saved_tensors)
        scaled = [
            times_upstream(next(gradients), grad_loss).to(ctx.dtype) if need else None
            for need in ctx.needed
        ]
        return *scaled, None
