"""Weights on the surrogate: corrections for a sampler that is not the policy, and masks.

An inference engine draws from a distribution a little off the trainer's. The ratio of the two
corrects for it, per token or per sequence, truncated (TIS) or masked (IcePop). Masks that keep
denominators as they are, for stale sequences or for tokens of low entropy, are weights of 0 and 1.
All of these compose by multiplication and enter a loss as its `importance_weights`. Weights per
sequence have shape [B]: beside weights per token write them `[:, None]`.

    weights = truncate_weights(token_importance_weights(old, sampler, mask), high=2.0)
    policy_loss(..., importance_weights=weights * high_entropy_mask(entropy, threshold))

Everything here is detached, in float32 (float64 for float64 inputs). Ratios stop at exp(20), as in
the losses.
"""

import torch
from torch import Tensor

from igrpo_kernels.checks import check_floating, check_number, check_rank, check_shape
from igrpo_kernels.sequences import Sequences
from igrpo_kernels.surrogates.base import exp_ratio


def _log_mismatch(
    old_logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Sequences]:
    """Log-ratio of trainer to sampler; 0 in masked slots and where the sampler gave NaN."""
    check_floating("old_logprobs", old_logprobs)
    check_floating("sampler_logprobs", sampler_logprobs)
    check_shape("sampler_logprobs", sampler_logprobs, old_logprobs.shape, "of old_logprobs")
    sequences = Sequences.of(old_logprobs, mask, cu_seqlens)
    difference = _in_float32(old_logprobs) - _in_float32(sampler_logprobs)
    difference = torch.where(sampler_logprobs.isnan(), 0.0, difference)
    return sequences.select(difference), sequences


def token_importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weight each token by the ratio of its probability for the trainer to that for the sampler.

    w_t = pi_old(o_t) / pi_sampler(o_t)

    A NaN of the sampler (a token it could not score) gives 1, as in TRL; so do masked slots.

    Args:
        old_logprobs: Log-probs under the trainer's policy at sampling time. Shape [B, T] or [L].
        sampler_logprobs: Log-probs under the distribution that drew the tokens. Same shape.
        mask: 1 (or True) where a token counts. Same shape.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        Weights, shape of `old_logprobs`, detached.

    Raises:
        TypeError: The log-probs are not floating-point tensors.
        ValueError: The shapes differ.

    Examples:
        >>> token_importance_weights(torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.0, -3.0]]))
        tensor([[1.0000, 2.7183]])
    """
    log_weights, _ = _log_mismatch(old_logprobs, sampler_logprobs, mask, cu_seqlens)
    return exp_ratio(log_weights)


def sequence_importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weight each sequence by the ratio of its probabilities.

    w = exp(sum_t log pi_old - log pi_sampler)

    The exact correction of a sequence-level expectation; its variance grows with the length.
    A NaN of the sampler adds 0 to the sum.

    Args:
        old_logprobs: Log-probs under the trainer's policy at sampling time. Shape [B, T] or [L].
        sampler_logprobs: Log-probs under the distribution that drew the tokens. Same shape.
        mask: 1 (or True) where a token counts. Same shape.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        Weights, shape [B], detached.

    Raises:
        TypeError: The log-probs are not floating-point tensors.
        ValueError: The shapes differ.

    Examples:
        >>> old, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.5]])
        >>> sequence_importance_weights(old, sampler)
        tensor([2.7183])
    """
    log_weights, sequences = _log_mismatch(old_logprobs, sampler_logprobs, mask, cu_seqlens)
    return exp_ratio(sequences.sum(log_weights))


def geometric_importance_weights(
    old_logprobs: Tensor,
    sampler_logprobs: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Weight each sequence by the geometric mean of its tokens' ratios.

    w = exp(mean_t (log pi_old - log pi_sampler))

    Comparable over lengths, but biased; NeMo-RL and OpenRLHF use it. The mean is over counted
    tokens, and the weight is 1 without any; a NaN of the sampler adds 0 to the sum.

    Args:
        old_logprobs: Log-probs under the trainer's policy at sampling time. Shape [B, T] or [L].
        sampler_logprobs: Log-probs under the distribution that drew the tokens. Same shape.
        mask: 1 (or True) where a token counts. Same shape.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        Weights, shape [B], detached.

    Raises:
        TypeError: The log-probs are not floating-point tensors.
        ValueError: The shapes differ.

    Examples:
        >>> old, sampler = torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.5, -1.5]])
        >>> geometric_importance_weights(old, sampler)
        tensor([1.6487])
    """
    log_weights, sequences = _log_mismatch(old_logprobs, sampler_logprobs, mask, cu_seqlens)
    return exp_ratio(sequences.mean(log_weights))


def truncate_weights(weights: Tensor, *, high: float, low: float = 0.0) -> Tensor:
    """Clamp weights to [low, high]: truncated importance sampling (TIS).

    Args:
        weights: Importance weights of any shape.
        high: Upper bound; 2 is common (TRL's default is 3).
        low: Lower bound.

    Returns:
        Weights of the same shape; NaN stays NaN.

    Raises:
        TypeError: `weights` is not a floating-point tensor.
        ValueError: The bounds are negative or crossed.

    Examples:
        >>> truncate_weights(torch.tensor([0.1, 1.0, 9.0]), high=2.0)
        tensor([0.1000, 1.0000, 2.0000])
    """
    return _check_weights(weights, low, high).clamp(low, high)


def mask_weights(weights: Tensor, *, high: float, low: float = 0.0) -> Tensor:
    """Set weights outside [low, high] to zero: IcePop's masked importance sampling.

    Both bounds belong to the interval, NaN does not. The reference values are 0.5 and 5
    (arXiv:2510.18855).

    Args:
        weights: Importance weights of any shape.
        high: Upper bound.
        low: Lower bound.

    Returns:
        Weights of the same shape.

    Raises:
        TypeError: `weights` is not a floating-point tensor.
        ValueError: The bounds are negative or crossed.

    Examples:
        >>> mask_weights(torch.tensor([0.1, 1.0, 9.0]), low=0.5, high=5.0)
        tensor([0., 1., 0.])
    """
    weights = _check_weights(weights, low, high)
    return torch.where((weights >= low) & (weights <= high), weights, 0.0)


def _check_weights(weights: Tensor, low: float, high: float) -> Tensor:
    """Check the bounds; detach the weights in float32, where a bound does not round to bf16's."""
    check_number("low", low, at_least=0.0)
    check_number("high", high, at_least=low)
    return _in_float32(check_floating("weights", weights))


def _in_float32(values: Tensor) -> Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def off_policy_sequence_mask(
    logprobs: Tensor,
    sampler_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    threshold: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Drop sequences of negative advantage from which the policy has moved too far.

    keep = A >= 0 or mean_t(log pi_sampler - log pi) <= threshold

    DeepSeek-V3.2 (arXiv:2512.02556, section 3.1); TRL's `off_policy_mask_threshold`, which suggests
    0.5. Denominators are left alone. The mean is over counted tokens; a NaN of the sampler adds 0.

    Args:
        logprobs: Log-probs under the policy. Shape [B, T] or [L].
        sampler_logprobs: Log-probs under the distribution that drew the tokens. Same shape.
        advantages: One per sequence. Shape [B].
        mask: 1 (or True) where a token counts. Shape of `logprobs`.
        threshold: Greatest mean log-ratio, in nats per token.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        1 to keep and 0 to drop, shape [B], detached.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: The shapes differ.

    Examples:
        >>> old, new = torch.tensor([[-1.0], [-1.0]]), torch.tensor([[-3.0], [-3.0]])
        >>> off_policy_sequence_mask(new, old, torch.tensor([1.0, -1.0]), threshold=0.5)
        tensor([1., 0.])
    """
    check_number("threshold", threshold)
    log_weights, sequences = _log_mismatch(logprobs, sampler_logprobs, mask, cu_seqlens)
    check_shape("advantages", check_floating("advantages", advantages), (sequences.count,), "[B]")
    drift = -sequences.mean(log_weights)
    return ((advantages >= 0) | (drift <= threshold)).to(log_weights.dtype)


def entropy_threshold(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    share: float,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Find the entropy that a `share` of the counted tokens reaches.

    threshold = quantile(entropy of the counted tokens, 1 - share), interpolated linearly

    Args:
        entropy: Entropy of each token's distribution, in nats. Shape [B, T] or [L]; gather it over
            ranks first for a global threshold.
        mask: 1 (or True) where a token counts. Same shape.
        share: Share of the tokens to keep, in (0, 1]; 0.2 in arXiv:2506.01939.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        The threshold, a 0-d tensor, detached; NaN if no token counts.

    Raises:
        TypeError: `entropy` is not a floating-point tensor.
        ValueError: `share` is not in (0, 1], or shapes differ.

    Examples:
        >>> entropy_threshold(torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]]), share=0.25)
        tensor(3.)
    """
    check_number("share", share, above=0.0, at_most=1.0)
    sequences = Sequences.of(check_floating("entropy", entropy), mask, cu_seqlens)
    counted = sequences.select(_in_float32(entropy), fill=float("inf")).flatten()
    count = sequences.mask.sum().double()
    if counted.numel() == 0:
        return counted.new_full((), float("nan"))
    ordered = counted.sort().values  # torch.quantile stops at 2^24 values
    position = (1 - share) * (count - 1).clamp(min=0)
    low, high = ordered[position.floor().long()], ordered[position.ceil().long()]
    threshold = low + (position - position.floor()).to(low.dtype) * (high - low)
    return torch.where(count > 0, threshold, float("nan"))


def high_entropy_mask(entropy: Tensor, threshold: Tensor | float) -> Tensor:
    """Keep the tokens whose entropy reaches the threshold: the forks of a chain of thought.

    keep = entropy >= threshold

    Wang et al. 2025, arXiv:2506.01939; TRL's `top_entropy_quantile` with `entropy_threshold`.
    Denominators are left alone.

    Args:
        entropy: Entropy of each token's distribution, in nats. Any shape.
        threshold: As `entropy_threshold` gives it.

    Returns:
        1 to keep and 0 to drop, shape of `entropy`, detached.

    Raises:
        TypeError: `entropy` is not a floating-point tensor.

    Examples:
        >>> high_entropy_mask(torch.tensor([[0.1, 0.9]]), 0.5)
        tensor([[0., 1.]])
    """
    entropy = _in_float32(check_floating("entropy", entropy))
    if isinstance(threshold, Tensor):
        check_rank("threshold", check_floating("threshold", threshold), 0, "[]")
    else:
        threshold = check_number("threshold", threshold)
    return (entropy >= threshold).to(entropy.dtype)
