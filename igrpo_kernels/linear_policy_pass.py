"""The pass behind `linear_policy_loss`: a chunk of rows from products to gradients, once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .kl import KlEstimator
from .linear_head import HeadGradients, LinearHead
from .policy_loss import token_losses, token_means
from .row_chunks import active_rows, take
from .sequences import Sequences
from .softmax_rows import LogitTransform, RowSoftmax, softmax_rows_
from .softmax_statistics import RowStatistics
from .surrogates.base import Surrogate, TokenLosses, Tokens
from .vocabulary_shard import VocabularyShard


@dataclass(frozen=True)
class RowLosses:
    """What the loss of a row depends on besides its log-prob and entropy. Rows: shape [N].

    Attributes:
        advantages: Advantage of each row.
        weights: The aggregate's weight of each row.
        old_logprobs: None: the log-probs themselves, detached.
        ref_logprobs: None without a reference.
        importance_weights: None without a correction.
        owner: Index of the sequence of each row.
        count: B, the number of sequences.
        surrogate: One whose scope is not the batch.
        kl: The KL estimator.
        kl_coef: Its weight.
        entropy_coef: The entropy's weight.
    """

    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    importance_weights: Tensor | None
    owner: Tensor
    count: int
    surrogate: Surrogate
    kl: KlEstimator
    kl_coef: float
    entropy_coef: float

    def matter(self) -> Tensor:
        """Mark the rows whose loss is not zero whatever the log-probs are."""
        if self.kl_coef != 0 or self.entropy_coef != 0:
            return torch.ones_like(self.advantages, dtype=torch.bool)
        matter = self.advantages != 0
        if self.importance_weights is not None and not self.surrogate.folds_importance_weights:
            matter &= self.importance_weights != 0
        if self.surrogate.scope == "token":
            return matter
        # the log-prob of a row enters the losses of its whole sequence
        sums = torch.zeros(self.count, dtype=torch.long, device=matter.device)
        return sums.index_add_(0, self.owner, matter.long())[self.owner] > 0

    @property
    def whole(self) -> Tensor | None:
        """The sequence of each row, where no chunk may cut through one."""
        return self.owner if self.surrogate.scope == "sequence" else None

    def tokens(self, rows: Tensor, logprobs: Tensor) -> Tokens:
        """View some rows as packed tokens."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs[rows]
        mask = torch.ones_like(rows, dtype=torch.bool)
        return Tokens(
            logprobs,
            old,
            self.advantages[rows],
            Sequences(mask, self.count, self.owner[rows]),
            take(self.importance_weights, rows),
        )

    def per_token(self, rows: Tensor, logprobs: Tensor, entropy: Tensor | None) -> TokenLosses:
        """Return the loss of each of some rows."""
        return token_losses(
            self.tokens(rows, logprobs),
            surrogate=self.surrogate,
            ref_logprobs=take(self.ref_logprobs, rows),
            kl_coef=self.kl_coef,
            kl=self.kl,
            entropy=entropy,
            entropy_coef=self.entropy_coef,
        )

    def loss(self, rows: Tensor, logprobs: Tensor, entropy: Tensor | None) -> Tensor:
        """Return the share of some rows in the loss."""
        return (self.weights[rows] * self.per_token(rows, logprobs, entropy).losses).sum()

    def differentiate(
        self, rows: Tensor, logprobs: Tensor, entropy: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the share of some rows, and its gradients by log-prob and by entropy."""
        with torch.enable_grad():
            logprobs = logprobs.detach().requires_grad_()
            if self.entropy_coef == 0 or entropy is None:
                loss = self.loss(rows, logprobs, None)
                (by_logprob,) = torch.autograd.grad(loss, logprobs)
                return loss.detach(), by_logprob, None
            entropy = entropy.detach().requires_grad_()
            loss = self.loss(rows, logprobs, entropy)
            by_logprob, by_entropy = torch.autograd.grad(loss, (logprobs, entropy))
            return loss.detach(), by_logprob, by_entropy

    def metrics(self, rows: Tensor, logprobs: Tensor, entropy: Tensor | None) -> dict[str, Tensor]:
        """Average over some rows what a trainer logs."""
        losses = self.per_token(rows, logprobs, entropy)
        ref_logprobs = take(self.ref_logprobs, rows)
        return token_means(self.tokens(rows, logprobs), losses, ref_logprobs, self.kl, entropy)


@dataclass(frozen=True)
class LinearPolicyPass:
    """One pass over the rows of a batch.

    Attributes:
        losses: What the rows' losses depend on.
        targets: Target of each row. Shape [N].
        transform: From products to logits.
        rows: Index of the rows that count and matter.
        others: Index of further rows whose log-probs the metrics want.
        with_entropy: Whether to take the entropy too.
        with_gradients: Whether to take the gradients.
        shard: Which slice of the vocabulary the head is; None: all of it.
    """

    losses: RowLosses
    targets: Tensor
    transform: LogitTransform
    rows: Tensor
    others: Tensor
    with_entropy: bool
    with_gradients: bool
    shard: VocabularyShard | None = None

    def run(
        self, hidden: Tensor, head: LinearHead, needed: list[bool]
    ) -> tuple[Tensor, RowStatistics, list[Tensor]]:
        """Return the loss, every row's scores, and the gradients needed."""
        like = self.losses.advantages
        scores = RowStatistics.zeros(like, like.dtype, entropy=self.with_entropy)
        loss = scores.logprobs.new_zeros(())
        gradients = HeadGradients(head, hidden, needed, len(self.rows))
        buffer = head.new_buffer(max(len(self.rows), len(self.others)))
        for rows in head.chunks(self.rows, self.losses.whole):
            some = hidden[rows]
            softmax = self._softmax(head, buffer, some, rows)
            scores.put_(rows, softmax.statistics)
            if any(needed):
                loss += self._add_gradients(gradients, rows, some, softmax)
            else:
                found = softmax.statistics
                loss += self.losses.loss(rows, found.logprobs, found.entropy)
        for rows in head.chunks(self.others):
            scores.put_(rows, self._softmax(head, buffer, hidden[rows], rows).statistics)
        return loss, scores, gradients.finish()

    def _softmax(
        self, head: LinearHead, buffer: Tensor, hidden: Tensor, rows: Tensor
    ) -> RowSoftmax:
        products = head.products_(buffer, hidden)
        return softmax_rows_(
            products,
            head.columns(self.targets[rows]),
            self.transform.take(rows),
            entropy=self.with_entropy,
            shard=head.shard,
        )

    def _add_gradients(
        self, gradients: HeadGradients, rows: Tensor, hidden: Tensor, softmax: RowSoftmax
    ) -> Tensor:
        """Add a chunk's gradients, of those rows alone whose gradient is not exactly zero."""
        found = softmax.statistics
        loss, by_logprob, by_entropy = self.losses.differentiate(
            rows, found.logprobs, found.entropy
        )
        active = active_rows(None, by_logprob, by_entropy)
        if len(active) < len(rows):
            rows, hidden, softmax = rows[active], hidden[active], softmax.keep_(active)
            by_logprob, by_entropy = by_logprob[active], take(by_entropy, active)
        grad = softmax.gradient_(by_logprob, by_entropy, dtype=gradients.operand_dtype)
        gradients.add(rows, hidden, grad)
        return loss


class LinearPolicyFunction(torch.autograd.Function):
    """Runs the pass in the forward; the backward multiplies by the upstream scalar."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, pass_: LinearPolicyPass
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return the loss, and the rows' log-probs and entropies without a graph."""
        ctx.needed = [needs and pass_.with_gradients for needs in ctx.needs_input_grad[:3]]
        head = LinearHead(weight, bias, pass_.transform, pass_.shard)
        loss, scores, gradients = pass_.run(hidden, head, ctx.needed)
        ctx.save_for_backward(*gradients)
        ctx.dtype = hidden.dtype
        ctx.mark_non_differentiable(scores.logprobs)
        if scores.entropy is not None:
            ctx.mark_non_differentiable(scores.entropy)
        return loss, scores.logprobs, scores.entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Multiply by the upstream scalar: in place, unless a second backward may follow."""
        may_follow = torch._C._autograd._get_current_graph_task_keep_graph()
        multiply = torch.mul if may_follow else Tensor.mul_
        gradients = iter(ctx.saved_tensors)
        scaled = [
            multiply(next(gradients), grad_loss).to(ctx.dtype) if need else None
            for need in ctx.needed
        ]
        return *scaled, None
