"""The policy loss from log-probs: the terms of every token, averaged."""

from typing import NamedTuple

import torch
from torch import Tensor

from .aggregates import Aggregate
from .checks import check_device, check_floating, check_shape
from .kl import K3, KlEstimator
from .loss_terms import TokenInputs, TokenObjective, named_means
from .row_selection import working_dtype
from .sequences import Sequences
from .surrogates.base import Surrogate


class PolicyLoss(NamedTuple):
    """A loss and what to log about it.

    Attributes:
        loss: Scalar in float32 (float64 for float64 inputs); the gradient flows through it.
        metrics: Detached 0-d tensors, means over the counted tokens: `logprob` and `ratio`; where
            the surrogate clips `clip_fraction_low` and `clip_fraction_high`; where given `kl`,
            `entropy` and `importance_weight`.
        logprobs: From hidden states: the detached log-prob of each target, those of
            `linear_token_logprobs`; 0 on rows that were not computed. `all_metrics=True` computes
            every row that counts. Shape of `targets`.
        entropy: From hidden states: likewise, where it was asked for. Shape of `targets`.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    surrogate: Surrogate,
    aggregate: Aggregate,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KlEstimator = K3(),
    importance_weights: Tensor | None = None,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
) -> PolicyLoss:
    """Compute a policy-gradient loss from the log-probs of the sampled tokens.

    loss = sum_t weight_t * (w_t * surrogate_t + kl_coef * kl_t - entropy_coef * entropy_t)

    `surrogate` is one of the values of `igrpo_kernels.surrogates`, `aggregate` gives weight_t. The
    sum is over counted tokens; masked slots may hold anything, NaN and inf included, and get a
    gradient of exactly zero. A batch without a counted token gives a loss of zero that is still on
    the graph. bf16 and fp16 inputs are computed in float32. Nothing is gathered over ranks: give
    the aggregate the step's `denominator` instead.

    Args:
        logprobs: Log-probs of the sampled tokens under the policy. Shape [B, T], or [L] packed.
        advantages: One per sequence, [B] or [B, 1], or one per token; packed, where L = B, one per
            sequence. Treated as constants.
        mask: 1 (or True) where a token counts; None counts every token. Shape of `logprobs`.
        surrogate: The loss of a token, such as `Clip(0.2, 0.28)`.
        aggregate: How tokens are averaged, such as `SequenceMean()`.
        old_logprobs: Log-probs under the policy frozen for the ratio. None: the policy is the one
            that sampled, so the ratio is 1 and its gradient intact. Shape of `logprobs`.
        ref_logprobs: Log-probs under the reference of the KL term. Shape of `logprobs`. Given with
            `kl_coef=0` it enters the metrics only.
        kl_coef: Weight of the KL term, beta in the papers.
        kl: The estimator and its weighting, such as `RatioWeighted(K3())`.
        importance_weights: Correction for the sampler, and any mask on the surrogate that leaves
            the denominators alone. One per token or per sequence, as for `advantages`. Constants.
        entropy: Entropy of each token's distribution, in nats. Shape of `logprobs`. Given with
            `entropy_coef=0` it enters the metrics only.
        entropy_coef: Weight of the entropy bonus; below zero, of a penalty on entropy.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        The loss and its metrics.

    Raises:
        TypeError: An input has the wrong type or an integer dtype.
        ValueError: Shapes do not fit, `kl_coef` is negative, a coefficient is set without the input
            it weights, or a surrogate that folds the importance weights is given them per sequence.

    Examples:
        >>> from igrpo_kernels import Clip, TokenMean
        >>> logprobs = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], requires_grad=True)
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> out = policy_loss(
        ...     logprobs, torch.tensor([1.0, -1.0]), mask, surrogate=Clip(), aggregate=TokenMean()
        ... )
        >>> out.loss.backward()
        >>> logprobs.grad
        tensor([[-0.3333, -0.3333],
                [ 0.3333,  0.0000]])
    """
    objective = TokenObjective.of(surrogate, aggregate, kl, kl_coef, entropy_coef, ref_logprobs)
    if entropy_coef != 0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, got None")
    sequences = Sequences.of(check_floating("logprobs", logprobs), mask, cu_seqlens)
    dtype = working_dtype(logprobs.dtype)  # bf16 log-ratios do not add up
    inputs = TokenInputs.of(
        sequences,
        dtype,
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        per_token_weights=surrogate.folds_importance_weights,
    )
    if entropy is not None:
        check_shape("entropy", check_floating("entropy", entropy), logprobs.shape, "of logprobs")
        entropy = check_device("entropy", entropy, logprobs).to(dtype)
    return average(objective, aggregate, inputs, logprobs, entropy)


def average(
    objective: TokenObjective,
    aggregate: Aggregate,
    inputs: TokenInputs,
    logprobs: Tensor,
    entropy: Tensor | None,
) -> PolicyLoss:
    """Compute the loss from inputs that are checked."""
    sequences, dtype = inputs.sequences, working_dtype(logprobs.dtype)
    weights = aggregate.weights(sequences, dtype)
    if objective.has_kernel(logprobs):
        from ._triton.clip_terms import clipped_loss

        loss, names, sums = clipped_loss(logprobs, entropy, inputs, weights, objective)
        return PolicyLoss(loss, named_means(names, sums, sequences.mask.sum()))
    inputs = inputs.masked()
    entropy = None if entropy is None else sequences.select(entropy)
    tokens = inputs.tokens(sequences.select(logprobs.to(dtype)))
    terms = objective.terms(tokens, inputs.ref_logprobs, entropy)
    loss = sequences.select(weights * terms.losses).sum()
    with torch.no_grad():
        metrics = named_means(terms.logged, terms.sums(sequences), sequences.mask.sum())
    return PolicyLoss(loss, metrics)
