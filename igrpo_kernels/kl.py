"""Estimators of KL(policy || reference) from the sampled tokens, and ways to weight them.

With x = log pi_ref - log pi at a token drawn from pi (Schulman 2020, joschu.net/blog/kl-approx):
k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1. All three estimate the same number; their gradients differ,
and so trainers weight them differently: as they are, times the ratio, or times a weight that is 1
but carries the score function's gradient. Each is a value here, and `RatioWeighted(K3())` says
what TRL's `use_bias_correction_kl` does.
"""

from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from .surrogates.base import MAX_LOG_RATIO, Tokens


class KlEstimator(Protocol):
    """Maps tokens and reference log-probs to one estimate per token."""

    def __call__(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """Return the estimate of each token."""
        ...


@dataclass(frozen=True)
class K1:
    """The plain log-ratio: k1 = log pi - log pi_ref. Unbiased, may be negative.

    Its own gradient averages to zero on policy: give it to the reward, or weight it.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, ref = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, ref, torch.ones(1, 2), Sequences.of(new))
        >>> K1()(tokens, ref)
        tensor([[ 0.5000, -1.0000]])
    """

    def __call__(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """Return the estimate of each token."""
        return tokens.logprobs - ref_logprobs


@dataclass(frozen=True)
class K2:
    """Half the squared log-ratio: k2 = (log pi - log pi_ref)^2 / 2. Biased, right gradient.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, ref = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, ref, torch.ones(1, 2), Sequences.of(new))
        >>> K2()(tokens, ref)
        tensor([[0.1250, 0.5000]])
    """

    def __call__(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """Return the estimate of each token."""
        return (tokens.logprobs - ref_logprobs).square() / 2


@dataclass(frozen=True)
class K3:
    """The low-variance estimate: k3 = e^x - x - 1, x = log pi_ref - log pi. Never negative.

    GRPO (arXiv:2402.03300, eq. 4) and iGRPO (arXiv:2602.09000, eq. 5) use it as it is. x stops at
    20, as the ratios do: the estimate stays finite, and has no gradient beyond.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, ref = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, ref, torch.ones(1, 2), Sequences.of(new))
        >>> K3()(tokens, ref)
        tensor([[0.1065, 0.7183]])
    """

    def __call__(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """Return the estimate of each token."""
        x = (ref_logprobs - tokens.logprobs).clamp(max=MAX_LOG_RATIO)
        return x.expm1() - x


@dataclass(frozen=True)
class RatioWeighted:
    """An estimate times the ratio pi / pi_old, through which the gradient flows as well.

    Corrects for tokens drawn from the old policy; TRL's `use_bias_correction_kl` at token level.

    Attributes:
        estimate: The estimator that is weighted.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, ref = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, ref, torch.ones(1, 2), Sequences.of(new))
        >>> RatioWeighted(K3())(tokens, ref)
        tensor([[0.1756, 0.2642]])
    """

    estimate: KlEstimator = field(default_factory=K3)

    def __call__(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """Return the weighted estimate of each token."""
        return tokens.ratio * self.estimate(tokens, ref_logprobs)


@dataclass(frozen=True)
class ScoreWeighted:
    """An estimate times pi / sg(pi): the value unchanged, the score function's gradient added.

    Makes the gradient of the expected KL whole (arXiv:2506.09477); NeMo-RL's weighting.

    Attributes:
        estimate: The estimator that is weighted.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, ref = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, ref, torch.ones(1, 2), Sequences.of(new))
        >>> ScoreWeighted(K3())(tokens, ref)
        tensor([[0.1065, 0.7183]])
    """

    estimate: KlEstimator = field(default_factory=K3)

    def __call__(self, tokens: Tokens, ref_logprobs: Tensor) -> Tensor:
        """Return the weighted estimate of each token."""
        one = (tokens.logprobs - tokens.logprobs.detach()).exp()
        return one * self.estimate(tokens, ref_logprobs)
