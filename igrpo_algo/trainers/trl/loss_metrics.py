"""Metrics of the loss under TRL's names, from the log-probs that the loss computed."""

from typing import NamedTuple

import torch
from torch import Tensor
from trl import GRPOTrainer

from igrpo_kernels import Cispo
from igrpo_kernels.kl import KlEstimator
from igrpo_kernels.surrogates import Surrogate, Vespo
from igrpo_kernels.surrogates.base import Tokens

from .loss_rows import LossRows


class Share(NamedTuple):
    """One rank's part of a mean: `total / size` once both are summed over ranks."""

    total: Tensor
    size: Tensor


class LossMetrics(NamedTuple):
    """One rank's part of the metrics.

    Attributes:
        means: Parts of means.
        lowest: What the least over ranks is logged of.
        highest: What the greatest over ranks is logged of.
    """

    means: dict[str, Share]
    lowest: dict[str, Tensor]
    highest: dict[str, Tensor]


@torch.no_grad()
def loss_metrics(
    rows: LossRows,
    all_rows: LossRows,
    logprobs: Tensor,
    entropy: Tensor,
    *,
    surrogate: Surrogate,
    kl: KlEstimator,
    skipping: bool,
) -> LossMetrics:
    """Measure the refinements of a micro-batch.

    A completion of zero advantage is clipped nowhere, so clip ratios are exact whether it was
    computed or not. Where such completions are left out, the other means are over the rest, and
    their names say so: `entropy/nonzero_advantage`. The policy is most certain where all rewards
    of a group are equal, so a mean without them under TRL's name would be another number.

    Args:
        rows: The B refinements that are measured: those that were not left out.
        all_rows: Those too that were, whose advantage is zero.
        logprobs: Log-probs of `rows`. Shape [B, T].
        entropy: Their entropy. Shape [B, T].
        surrogate: What clips.
        kl: The estimator of the KL that is logged where there is a reference.
        skipping: Whether this run leaves out completions of zero advantage.

    Returns:
        This rank's part of `entropy`, `ratio`, `kl` (with a reference); of `clip_ratio/low_mean`,
        `high_mean`, `region_mean`, `low_min` and `high_max` where the surrogate clips; of
        `cispo_clip_ratio` or `vespo/phi_seq_mean` in their place.
    """
    sequences = rows.sequences
    old = logprobs if rows.old_logprobs is None else rows.old_logprobs
    tokens = Tokens(
        sequences.select(logprobs.float()),
        sequences.select(old.float()),
        rows.advantages[:, None],
        sequences,
        rows.importance_weights,
    )

    def mean(values: Tensor, *, over: LossRows = rows) -> Share:
        if values.shape[1] == 1:  # one value per sequence, as TRL averages them
            return Share(values.sum(), values.new_tensor(len(over.mask)))
        return Share(sequences.select(values).sum(), over.mask.sum())

    means = {"entropy": mean(entropy.float()), "ratio": mean(tokens.ratio)}
    if rows.ref_logprobs is not None:
        means["kl"] = mean(kl(tokens, sequences.select(rows.ref_logprobs.float())))
    if isinstance(surrogate, Vespo):
        means["vespo/phi_seq_mean"] = mean(_weight_of_vespo(surrogate, tokens))
    if skipping:
        means = {f"{name}/nonzero_advantage": share for name, share in means.items()}
    _, low, high = surrogate(tokens)
    if high is None or low is None:
        return LossMetrics(means, {}, {})
    if isinstance(surrogate, Cispo):
        capped = (high & (tokens.advantages > 0)).float()
        return LossMetrics(means | {"cispo_clip_ratio": mean(capped, over=all_rows)}, {}, {})
    low, high = low.float(), high.float()
    sides = {"low_mean": low, "high_mean": high, "region_mean": low + high}
    means |= {f"clip_ratio/{name}": mean(side, over=all_rows) for name, side in sides.items()}
    left_out = len(all_rows.mask) > len(rows.mask)
    return LossMetrics(
        means,
        {"clip_ratio/low_min": _per_sequence(rows, low, left_out=left_out)},
        {"clip_ratio/high_max": _per_sequence(rows, high, left_out=left_out)},
    )


def _per_sequence(rows: LossRows, clipped: Tensor, *, left_out: bool) -> Tensor:
    """Average each sequence; NaN without a token, 0 for those left out. Shape [B or B + 1]."""
    if clipped.shape[1] > 1:
        clipped = ((clipped * rows.mask).sum(1) / rows.mask.sum(1))[:, None]
    return torch.cat([clipped[:, 0], clipped.new_zeros(int(left_out))])


def _weight_of_vespo(surrogate: Vespo, tokens: Tokens) -> Tensor:
    """Return phi, which the surrogate keeps to itself, as TRL computes it. Shape [B, 1]."""
    weight: Tensor = GRPOTrainer.get_gamma_weights(
        tokens.advantages,
        tokens.log_ratio,
        tokens.sequences.mask,
        tokens.importance_weights,
        surrogate.k_positive,
        surrogate.lambda_positive,
        surrogate.k_negative,
        surrogate.lambda_negative,
    )
    return weight
