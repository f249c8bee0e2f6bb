"""From hidden states to loss and gradients in one pass: a chunk of rows from products to gradients.

The gradients are taken in the forward, while a chunk's exponentials are at hand: three matrix
products per row (6 TVH operations) where computing the logits again in the backward takes four.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .head_arguments import HeadBatch, without_autocast
from .head_softmax import SoftmaxChunk, holds_sequences, is_one_chunk, softmax_chunks
from .linear_head import HeadGradients, LinearHead
from .loss_from_logprobs import PolicyLoss
from .loss_terms import TokenInputs, TokenObjective, named_means
from .row_checks import check_rows
from .row_selection import Rows, rows_where
from .row_statistics import RowStatistics
from .upstream import times_upstream


class Share(NamedTuple):
    """The share of some rows in the loss.

    Attributes:
        loss: The share.
        by_logprob: Its gradient by the log-probs, where gradients are wanted. Shape [N].
        by_entropy: Its gradient by the entropies, where they have a coefficient. Shape [N].
        names: Of what is logged.
        sums: What is logged, added up. Shape [K].
    """

    loss: Tensor
    by_logprob: Tensor | None
    by_entropy: Tensor | None
    names: list[str]
    sums: Tensor


@dataclass(frozen=True)
class RowLosses:
    """The loss of each row of a batch as a function of its log-prob and entropy.

    Attributes:
        objective: What the loss of a row is made of.
        inputs: What the rows are given.
        weights: The aggregate's weight of each row, in a shape that broadcasts to the tokens.
    """

    objective: TokenObjective
    inputs: TokenInputs
    weights: Tensor

    @property
    def owner(self) -> Tensor | None:
        """The sequence of each row, where no chunk may cut through one. Shape [N]."""
        if self.objective.surrogate.scope != "sequence":
            return None
        return self.inputs.sequences.owners.reshape(-1)

    def may_be_nonzero(self) -> Tensor | None:
        """Mark the rows whose loss may differ from zero; None: any may. Shape of the tokens."""
        surrogate, inputs = self.objective.surrogate, self.inputs
        if self.objective.needs_every_row:
            return None
        marked = inputs.advantages != 0
        if inputs.importance_weights is not None and not surrogate.folds_importance_weights:
            marked = marked & (inputs.importance_weights != 0)
        if surrogate.scope != "token":
            # the log-prob of a row enters the losses of its whole sequence
            sequences = inputs.sequences
            marked = sequences.spread(sequences.sum(marked.long()) > 0)
        return marked.expand_as(inputs.sequences.mask)

    def share(self, rows: Rows, found: RowStatistics, *, gradients: bool) -> Share:
        """Return the share of some rows, from their log-probs and entropies."""
        inputs = self.inputs.take(rows)
        weights = self.inputs.sequences.pick(self.weights, rows, inputs.sequences.owners)
        logprobs, entropy = found.logprobs, found.entropy
        leaves: list[Tensor] = []
        with torch.set_grad_enabled(gradients):
            if gradients:
                logprobs = logprobs.detach().requires_grad_()
                leaves = [logprobs]
                if entropy is not None and self.objective.entropy_coef != 0:
                    entropy = entropy.detach().requires_grad_()
                    leaves.append(entropy)
            terms = self.objective.terms(inputs.tokens(logprobs), inputs.ref_logprobs, entropy)
            losses = terms.losses
            if losses.shape != logprobs.shape:
                losses = losses.expand_as(logprobs)
        slopes: list[Tensor | None] = [None, None]
        if gradients:
            found_slopes = torch.autograd.grad(losses, leaves, weights.expand_as(losses))
            slopes[: len(leaves)] = found_slopes
        loss = (weights * losses).sum()
        sums = terms.sums(inputs.sequences)
        return Share(loss, slopes[0], slopes[1], list(terms.logged), sums)

    def of_no_rows(self, entropy: bool) -> Share:
        """Return a share of zero, which knows the names of what is logged."""
        none = self.weights.new_empty(0)
        nothing = RowStatistics.zeros(none, none.dtype, entropy=entropy)
        return self.share(range(0), nothing, gradients=False)


@dataclass(frozen=True)
class FusedLoss:
    """One pass over the rows of a batch.

    Attributes:
        losses: The losses of the rows.
        head: The head.
        targets: Target of each row. Shape [...], of N elements.
        rows: The rows that count and whose loss may differ from zero.
        more: Further rows, which the metrics alone want.
        with_entropy: Whether to take the entropy too.
    """

    losses: RowLosses
    head: LinearHead
    targets: Tensor
    rows: Rows
    more: Rows
    with_entropy: bool

    @classmethod
    def of(
        cls, batch: HeadBatch, losses: RowLosses, entropy: bool, every: bool, skips: bool
    ) -> "FusedLoss":
        """Select the rows of a batch.

        With `skips` those whose loss may differ from zero, and with `every` the others too, for the
        metrics.
        """
        head, targets = batch.head, batch.targets
        check_rows(targets, batch.mask, head.transform.temperature, head.whole_vocabulary)
        marked, count = losses.may_be_nonzero() if skips else None, targets.numel()
        rows = rows_where(count, batch.mask, marked)
        more: Rows = range(0)
        if every and marked is not None:
            more = rows_where(count, batch.mask, ~marked)
        return cls(losses, head, targets, rows, more, entropy)

    @property
    def holds_sequences(self) -> bool:
        """Whether no sequence that has to stay whole is larger than a chunk."""
        owner = self.losses.owner
        return owner is None or holds_sequences(self.head, self.rows, owner)

    def loss(self, hidden: Tensor) -> PolicyLoss:
        """Return the loss, through which the gradient flows to hidden, weight and bias."""
        with without_autocast(hidden.device):
            if not torch.is_grad_enabled():
                return self.run(hidden, [False] * 3)[0]
            loss, found = FusedLossFunction.apply(hidden, self.head.weight, self.head.bias, self)
        return found._replace(loss=loss)

    def run(self, hidden: Tensor, needed: list[bool]) -> tuple[PolicyLoss, list[Tensor]]:
        """Return the loss and the gradients that are needed, of hidden, weight and bias."""
        keeps = any(needed)
        one_chunk = is_one_chunk(self.head, self.rows, keeps=keeps)
        gradients = HeadGradients(self.head, hidden, needed, one_chunk=one_chunk)
        shares, found = [], []
        for chunk in self._chunks(hidden, self.rows, keeps=keeps):
            shares.append(self._share(chunk, gradients if keeps else None))
            found.append((chunk.rows, chunk.softmax.statistics))
            del chunk  # and with it its memory, while `finish` rounds
        for rows, _, softmax in self._chunks(hidden, self.more, keeps=False):  # a loss of zero
            shares.append(self.losses.share(rows, softmax.statistics, gradients=False))
            found.append((rows, softmax.statistics))
        if not shares:
            shares = [self.losses.of_no_rows(self.with_entropy)]
        sums = sum((share.sums for share in shares[1:]), shares[0].sums)
        metrics = named_means(shares[0].names, sums, len(self.rows) + len(self.more))
        loss = sum((share.loss for share in shares[1:]), shares[0].loss)
        logprobs = self._by_row([(rows, some.logprobs) for rows, some in found])
        entropy = None
        if self.with_entropy:
            pairs = ((rows, some.entropy) for rows, some in found)
            entropy = self._by_row([(rows, part) for rows, part in pairs if part is not None])
        return PolicyLoss(loss, metrics, logprobs, entropy), gradients.finish()

    def _share(self, chunk: SoftmaxChunk, gradients: HeadGradients | None) -> Share:
        """Take a chunk from log-probs to its share in the loss, and in the gradients if given."""
        rows, hidden, softmax = chunk
        scales = gradients is not None and gradients.needs_weight
        if self.losses.objective.has_kernel(softmax.statistics.logprobs):
            from ._triton.head_softmax import HeadSoftmax

            if isinstance(softmax, HeadSoftmax) and not softmax.lacks_slope:
                loss, names, sums, gradient = softmax.clip(self.losses, rows, scales_hidden=scales)
                if gradients is not None and gradient is not None:
                    gradients.add(rows, hidden, gradient)
                return Share(loss, None, None, names, sums)
        share = self.losses.share(rows, softmax.statistics, gradients=gradients is not None)
        if gradients is not None:
            slopes, dtype = (share.by_logprob, share.by_entropy), gradients.matrix_dtype
            found = softmax.gradient_(*slopes, dtype=dtype, scales_hidden=scales)
            gradients.add(rows, hidden, found)
        return share

    def _by_row(self, parts: Iterable[tuple[Rows, Tensor]]) -> Tensor:
        """Lay out what the rows computed have come to; 0 elsewhere. Shape of the targets."""
        flat = self.losses.weights.new_zeros(self.targets.numel())
        for rows, part in parts:
            flat[slice(rows.start, rows.stop) if isinstance(rows, range) else rows] = part
        return flat.view(self.targets.shape)

    def _chunks(self, hidden: Tensor, rows: Rows, *, keeps: bool) -> Iterator[SoftmaxChunk]:
        return softmax_chunks(
            self.head,
            hidden,
            self.targets.flatten(),
            rows,
            owner=self.losses.owner,
            entropy=self.with_entropy,
            keeps=keeps,
        )


class FusedLossFunction(torch.autograd.Function):
    """Runs the pass in the forward; the backward multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, fused: FusedLoss
    ) -> tuple[Tensor, PolicyLoss]:
        """Return the loss, and all else. `weight` and `bias` are those of the pass' head."""
        ctx.needed = list(ctx.needs_input_grad[:3])
        found, gradients = fused.run(hidden, ctx.needed)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        return found.loss, found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Multiply by the upstream scalar."""
        found = iter(times_upstream(ctx.saved_tensors, grad_loss))
        return *(next(found).to(ctx.dtype) if need else None for need in ctx.needed), None
