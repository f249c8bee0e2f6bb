"""The policy loss from log-probs: surrogate, KL, entropy and aggregate composed in one place.

This is the only statement of the loss. `linear_policy_loss` runs `token_losses` on the rows of each
chunk, and every fused kernel is tested against it.
"""

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .aggregates import Aggregate
from .checks import check_floating, check_number, check_shape, describe
from .kl import K3, KlEstimator
from .sequences import Sequences
from .surrogates.base import Scope, Surrogate, TokenLosses, Tokens


class PolicyLoss(NamedTuple):
    """A loss and what to log about it.

    Attributes:
        loss: Scalar in float32 (float64 for float64 inputs); the gradient flows through it.
        metrics: Detached 0-d tensors, means over the counted tokens: `logprob` and `ratio`; where
            the surrogate clips `clip_fraction_low` and `clip_fraction_high`; where given `kl`,
            `entropy` and `importance_weight`.
        logprobs: From hidden states: the detached log-prob of each target, 0 on rows that were not
            computed. Shape of `targets`.
        entropy: From hidden states: likewise, where it was computed.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    logprobs: Tensor | None = None
    entropy: Tensor | None = None


def _at_least_float32(name: str, values: Tensor) -> Tensor:
    """Upcast half precision: a sum of bf16 log-ratios is no loss."""
    check_floating(name, values)
    return values if values.dtype == torch.float64 else values.float()


def check_parts(surrogate: object, aggregate: object, kl: object) -> None:
    """Refuse strings, and classes where an instance is wanted.

    Raises:
        TypeError: One of the three is not what a loss is composed of.
        ValueError: The surrogate's scope is none.
    """
    for name, value, attribute, example in (
        ("surrogate", surrogate, "scope", "Clip()"),
        ("aggregate", aggregate, "weights", "SequenceMean()"),
        ("kl", kl, "__call__", "K3()"),
    ):
        if isinstance(value, type) or not hasattr(value, attribute):
            raise TypeError(f"{name} must be a value such as {example}, got {describe(value)}")
    scope = getattr(surrogate, "scope", None)
    if scope not in get_args(Scope):
        raise ValueError(f"surrogate.scope must be one of {get_args(Scope)}, got {scope!r}")


def prepare_tokens(
    logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    *,
    old_logprobs: Tensor | None = None,
    importance_weights: Tensor | None = None,
    per_token_weights: bool = False,
) -> Tokens:
    """Bring the inputs of a loss to one layout and dtype, masked slots without effect.

    With `per_token_weights` the importance weights must be one per token.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: A shape does not fit that of `logprobs`.
    """
    logprobs = sequences.select(_at_least_float32("logprobs", logprobs))
    dtype = logprobs.dtype
    if old_logprobs is None:
        old_logprobs = logprobs.detach()
    else:
        check_floating("old_logprobs", old_logprobs)
        check_shape("old_logprobs", old_logprobs, logprobs.shape, "of logprobs")
        old_logprobs = sequences.select(old_logprobs.detach().to(dtype))
    check_floating("advantages", advantages)
    advantages = sequences.broadcast("advantages", advantages.detach().to(dtype))
    if importance_weights is not None:
        check_floating("importance_weights", importance_weights)
        if per_token_weights:
            check_shape("importance_weights", importance_weights, logprobs.shape, "of logprobs")
        weights = importance_weights.detach().to(dtype)
        importance_weights = sequences.broadcast("importance_weights", weights)
    return Tokens(logprobs, old_logprobs, advantages, sequences, importance_weights)


def token_losses(
    tokens: Tokens,
    *,
    surrogate: Surrogate,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KlEstimator = K3(),
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
) -> TokenLosses:
    """Return the loss of each token before it is averaged.

    w * surrogate + kl_coef * kl - entropy_coef * entropy

    The importance weights w act on the surrogate alone, as in TRL; a surrogate that folds them
    into its own weight is not multiplied again.
    """
    losses, low, high = surrogate(tokens)
    if tokens.importance_weights is not None and not surrogate.folds_importance_weights:
        losses = losses * tokens.importance_weights
    if kl_coef != 0.0 and ref_logprobs is not None:
        losses = losses + kl_coef * kl(tokens, ref_logprobs)
    if entropy_coef != 0.0 and entropy is not None:
        losses = losses - entropy_coef * entropy
    return TokenLosses(losses, low, high)


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
        advantages: One per sequence, [B] or [B, 1], or one per token. Treated as constants.
        mask: 1 (or True) where a token counts; None counts every token. Shape of `logprobs`.
        surrogate: What a token's loss is, such as `Clip(0.2, 0.28)`.
        aggregate: How tokens are averaged, such as `SequenceMean()`.
        old_logprobs: Log-probs under the policy frozen for the ratio. None: the policy is the one
            that sampled, so the ratio is 1 and its gradient intact. Shape of `logprobs`.
        ref_logprobs: Log-probs under the reference of the KL term. Shape of `logprobs`. Given with
            `kl_coef=0` it enters the metrics only.
        kl_coef: Weight of the KL term, beta in the papers.
        kl: The estimator and its weighting, such as `RatioWeighted(K3())`.
        importance_weights: Correction for the sampler, and any mask on the surrogate that leaves
            the denominators alone. One per token or per sequence. Treated as constants.
        entropy: Entropy of each token's distribution, in nats. Shape of `logprobs`. Given with
            `entropy_coef=0` it enters the metrics only.
        entropy_coef: Weight of the entropy bonus.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        The loss and its metrics.

    Raises:
        TypeError: An input has the wrong type or an integer dtype.
        ValueError: Shapes do not fit, a coefficient is set without the input it weights, or a
            surrogate that folds the importance weights is given them per sequence.

    Example:
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
    check_parts(surrogate, aggregate, kl)
    check_number("kl_coef", kl_coef)
    check_number("entropy_coef", entropy_coef)
    if kl_coef != 0.0 and ref_logprobs is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, got None")
    if entropy_coef != 0.0 and entropy is None:
        raise ValueError(f"entropy_coef={entropy_coef} needs entropy, got None")
    check_floating("logprobs", logprobs)
    sequences = Sequences.of(logprobs, mask, cu_seqlens)
    tokens = prepare_tokens(
        logprobs,
        advantages,
        sequences,
        old_logprobs=old_logprobs,
        importance_weights=importance_weights,
        per_token_weights=surrogate.folds_importance_weights,
    )
    dtype = tokens.logprobs.dtype
    if ref_logprobs is not None:
        check_shape(
            "ref_logprobs",
            check_floating("ref_logprobs", ref_logprobs),
            logprobs.shape,
            "of logprobs",
        )
        ref_logprobs = sequences.select(ref_logprobs.detach().to(dtype))
    if entropy is not None:
        check_shape("entropy", check_floating("entropy", entropy), logprobs.shape, "of logprobs")
        entropy = sequences.select(entropy.to(dtype))
    per_token = token_losses(
        tokens,
        surrogate=surrogate,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        kl=kl,
        entropy=entropy,
        entropy_coef=entropy_coef,
    )
    weights = aggregate.weights(sequences, dtype)
    loss = sequences.select(weights * per_token.losses).sum()
    with torch.no_grad():
        metrics = token_means(tokens, per_token, ref_logprobs, kl, entropy)
    return PolicyLoss(loss, metrics)


def token_means(
    tokens: Tokens,
    per_token: TokenLosses,
    ref_logprobs: Tensor | None,
    kl: KlEstimator,
    entropy: Tensor | None,
) -> dict[str, Tensor]:
    """Average over the counted tokens what a trainer logs."""
    values: dict[str, Tensor | None] = {
        "logprob": tokens.logprobs,
        "ratio": tokens.ratio,
        "clip_fraction_low": per_token.clipped_low,
        "clip_fraction_high": per_token.clipped_high,
        "kl": None if ref_logprobs is None else kl(tokens, ref_logprobs),
        "entropy": entropy,
        "importance_weight": tokens.importance_weights,
    }
    count = tokens.sequences.mask.sum().clamp(min=1).to(tokens.logprobs.dtype)
    return {
        name: (tokens.sequences.select(value, fill=0).sum() / count).detach()
        for name, value in values.items()
        if value is not None
    }
