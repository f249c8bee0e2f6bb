"""The softmax by exponentials relative to one logit of the row, on a CPU: the twin of the kernels.

Of a row with logits z, target t and reference r (the target's logit, or the row's maximum):

    E_j = exp(z_j - r) for j != t,   others = sum_{j != t} E_j,   total = exp(z_t - r) + others
    logprob = (z_t - r) - log(total),   1 - p_t = others / total
    gradient of z = c E,   c = -(d loss / d logprob) / total,   E_t := -others

With r = z_t no maximum is looked for, total = 1 + others, and the sums over slices of the
vocabulary add up. What is stored, E, is the operand of the backward products as it stands.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .row_selection import nonzero, row_slices, take
from .row_softmax import LogitTransform, ProductGradient, TargetColumns
from .row_statistics import LOG_FLOOR, RowStatistics
from .vocabulary_shard import VocabularyShard


class SoftmaxRows(NamedTuple):
    """`RowSoftmax` on a CPU.

    Attributes:
        statistics: Log-prob, entropy, reference and total of each row, over all slices.
        targets: Where the targets stand.
        transform: Scale, cap and temperature of these rows.
        exponentials: E, in the caller's memory; anything at the targets. Shape [N, V].
    """

    statistics: RowStatistics
    targets: TargetColumns
    transform: LogitTransform
    exponentials: Tensor

    def keep_(self, rows: Tensor) -> "SoftmaxRows":
        """Move some rows, in ascending order, to the front of the memory; drop the others."""
        return SoftmaxRows(
            self.statistics.take(rows),
            self.targets.take(rows),
            self.transform.take(rows),
            _move_to_front(self.exponentials, rows),
        )

    def gradient_(
        self,
        by_logprob: Tensor | None,
        by_entropy: Tensor | None = None,
        *,
        dtype: torch.dtype,
        scales_hidden: bool = False,
    ) -> ProductGradient:
        """Return the gradient of those rows whose upstream gradient is not exactly zero.

        In the memory's own dtype only the targets are written; in a narrower one the factors are
        multiplied in while the matrix is rounded, in the front of the memory.
        """
        active = nonzero(by_logprob, by_entropy)
        if active.all():
            return self.gradient_of_all_(by_logprob, by_entropy, dtype=dtype)
        rows = active.nonzero().squeeze(1)
        kept = self.keep_(rows).gradient_of_all_(
            take(by_logprob, rows), take(by_entropy, rows), dtype=dtype
        )
        return ProductGradient(kept.matrix, kept.factors, rows)

    def gradient_of_all_(
        self, by_logprob: Tensor | None, by_entropy: Tensor | None, *, dtype: torch.dtype
    ) -> ProductGradient:
        """Return the gradient of all rows."""
        found, matrix = self.statistics, self.exponentials
        if by_logprob is None:
            by_logprob = torch.zeros_like(found.logprobs)
        weights = None
        at_target = found.logprobs.expm1().mul_(found.total)  # -others
        if by_entropy is None:
            factors = (by_logprob / found.total).mul_(-self.transform.scale)
        else:
            # by_logprob + by_entropy (log p + entropy), with log p = (z - r) - log total
            assert found.entropy is not None
            factors = -self.transform.scale / found.total
            log_p = found.logprobs.clamp(min=LOG_FLOOR)
            surprise = log_p.exp() * (log_p + found.entropy)
            at_target = by_logprob * at_target + by_entropy * found.total * surprise
            constant = by_logprob + by_entropy * (found.entropy - found.total.log())
            weights = by_entropy, constant
        if self.transform.softcap is not None:
            target_logits = found.reference + (found.logprobs + found.total.log())
            at_target = at_target * self.transform.slope(target_logits[:, None])[:, 0]
        narrow = None if dtype == matrix.dtype else _front(matrix, dtype)
        as_stored = weights is None and self.transform.softcap is None
        if as_stored:
            self.targets.write_(matrix, at_target)
            if narrow is None:
                return ProductGradient(matrix, factors)
        for some in row_slices(matrix):
            piece = take(matrix, some)
            if not as_stored:
                self._weigh_(piece, some, weights)
                self.targets.take(some).write_(piece, take(at_target, some))
            if narrow is not None:
                take(narrow, some).copy_(piece.mul_(take(factors, some)[:, None]).to(dtype))
        return ProductGradient(matrix, factors) if narrow is None else ProductGradient(narrow)

    def _weigh_(self, piece: Tensor, some: range, weights: tuple[Tensor, Tensor] | None) -> None:
        """Multiply by the entropy's weights and by the cap's slope, both functions of log E."""
        shifted = piece.log().clamp_(min=LOG_FLOOR)
        if self.transform.softcap is not None:
            logits = shifted + take(self.statistics.reference, some)[:, None]
            piece.mul_(self.transform.take(some).slope(logits))
        if weights is not None:
            of_log, constant = (take(part, some)[:, None] for part in weights)
            piece.mul_(shifted.mul_(of_log).add_(constant))


class RelativeSums(NamedTuple):
    """Sums over the columns but the target's. Shape [N].

    Attributes:
        others: sum_{j != t} exp(z_j - r).
        moment: sum_{j != t} exp(z_j - r) (z_j - r), where the entropy is wanted.
    """

    others: Tensor
    moment: Tensor | None

    def over(self, shard: VocabularyShard | None) -> "RelativeSums":
        """Add those of all slices of the vocabulary."""
        if shard is None:
            return self
        if self.moment is None:
            return RelativeSums(shard.add(self.others), None)
        return RelativeSums(*shard.add(torch.stack([self.others, self.moment])))


def exponentials(
    products: Tensor, transform: LogitTransform, reference: Tensor, out: Tensor | None = None
) -> Tensor:
    """Return exp(z - r) of all columns, the target's too, in `out` if that is given.

    Args:
        products: x @ W.T + b, or logits. Shape [N, V].
        transform: From products to logits.
        reference: r. Shape [N, 1].
        out: May be `products`.
    """
    logits = transform.apply(products, out)
    return torch.sub(logits, reference, out=out if logits is products else logits).exp_()


def relative_sums(
    products: Tensor,
    targets: TargetColumns,
    transform: LogitTransform,
    reference: Tensor,
    *,
    entropy: bool,
    out: Tensor | None = None,
) -> RelativeSums:
    """Add up exp(z - r) over the columns but the target's, which is left at 0 in `out`.

    Args:
        products: x @ W.T + b, or logits. Shape [N, V].
        targets: Where the targets stand.
        transform: From products to logits.
        reference: r. Shape [N, 1].
        entropy: Whether to take the moment too.
        out: Where the exponentials go, if they are wanted; may be `products`.
    """
    others, moments = [], []
    for some in row_slices(products):
        piece, at = transform.take(some), targets.take(some)
        memory = take(out, some)
        if entropy:
            shifted = piece.apply(take(products, some), memory) - take(reference, some)
            found = torch.exp(shifted.clamp_(min=LOG_FLOOR), out=memory)
        else:
            found = exponentials(take(products, some), piece, take(reference, some), memory)
        at.write_(found, 0.0)
        others.append(found.sum(-1))
        if entropy:
            moments.append(torch.linalg.vecdot(found, shifted))
    return RelativeSums(_joined(others), _joined(moments) if entropy else None)


def softmax_of_logits(
    logits: Tensor,
    targets: TargetColumns,
    *,
    entropy: bool,
    shard: VocabularyShard | None = None,
    out: Tensor | None = None,
) -> RowStatistics:
    """Take log-probs (and entropy) relative to the rows' maxima.

    For logits that come from outside, and for rows in which the target's logit would not do.
    """
    reference, target_logits = _row_maximum(logits), targets.read(logits)
    if shard is not None:
        reference, target_logits = shard.maximum(reference), shard.add(target_logits)
    sums = relative_sums(logits, targets, LogitTransform(), reference, entropy=entropy, out=out)
    sums = sums.over(shard)
    gap = (target_logits - reference).squeeze(1)
    return RowStatistics.of_sums(reference.squeeze(1), *sums, gap=gap)


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _row_maximum(logits: Tensor) -> Tensor:
    """Return each row's maximum; -inf where there is no column. Shape [N, 1]."""
    if logits.shape[1] == 0:
        return logits.new_full((logits.shape[0], 1), -torch.inf)
    return logits.amax(-1, keepdim=True)


def _front(values: Tensor, dtype: torch.dtype) -> Tensor:
    """View the front of contiguous memory as the same rows in a narrower dtype."""
    return values.view(dtype).view(-1)[: values.numel()].view(values.shape)


def _move_to_front(values: Tensor, rows: Tensor, block: int = 64) -> Tensor:
    """Compact rows in place: none moves down, so no block overwrites the source of a later one."""
    for start in range(0, len(rows), block):
        some = rows[start : start + block]
        values[start : start + len(some)] = values[some]
    return values[: len(rows)]
