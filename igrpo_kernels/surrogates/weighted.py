"""Surrogates that weight the gradient of every log-prob: REINFORCE and related ones."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number
from .base import MAX_LOG_RATIO, Scope, Surrogate, TokenLosses, Tokens, either


@dataclass(frozen=True)
class Reinforce(Surrogate):
    """REINFORCE and GPG: the log-prob times the advantage, without a ratio.

    l = -A log pi

    Williams 1992; GPG (arXiv:2504.02546) differs in its advantages only. The old log-probs enter
    the metrics, not the loss.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> Reinforce()(tokens).losses
        tensor([[ 0.5000, -2.0000]])
    """

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        return TokenLosses(-tokens.advantages * tokens.logprobs)


@dataclass(frozen=True)
class Cispo(Surrogate):
    """CISPO: the ratio is clipped as a weight, so that no token loses its gradient.

    l = -sg(clamp(r, min_ratio, max_ratio)) A log pi

    MiniMax-M1 (arXiv:2506.13585, eq. 4 and 5). The bounds are absolute: `Cispo(max_ratio=5.0)` is
    ScaleRL's (arXiv:2510.13786) and TRL's with epsilon_high=5; the two-sided relative form of verl,
    NeMo-RL and slime is `Cispo.relative(low, high)`. TRL falls back to a cap of 0.2, which scales
    every on-policy token by 0.2: here the cap has no default and must be at least 1.

    Attributes:
        max_ratio: Upper bound of the weight, at least 1.
        min_ratio: Lower bound of the weight, at most 1.

    Raises:
        ValueError: The bounds do not enclose 1, or `min_ratio` is negative.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> Cispo(max_ratio=1.28)(tokens).losses
        tensor([[ 0.6400, -0.7358]])
        >>> Cispo.relative(0.5, 1.0)
        Cispo(max_ratio=2.0, min_ratio=0.5)
    """

    max_ratio: float
    min_ratio: float = 0.0

    def __post_init__(self) -> None:
        check_number("max_ratio", self.max_ratio, at_least=1.0)
        check_number("min_ratio", self.min_ratio, at_least=0.0, at_most=1.0)

    @classmethod
    def relative(cls, low: float, high: float) -> "Cispo":
        """Bounds around 1: [1 - low, 1 + high]."""
        return cls(max_ratio=1 + high, min_ratio=1 - low)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        ratio = tokens.ratio.detach()
        weight = ratio.clamp(self.min_ratio, self.max_ratio)
        losses = -weight * tokens.advantages * tokens.logprobs
        return TokenLosses(losses, ratio < self.min_ratio, ratio > self.max_ratio)


@dataclass(frozen=True)
class Sapo(Surrogate):
    """SAPO: a soft gate in place of the clip; its temperature depends on the advantage's sign.

    l = -(4 / tau) sigmoid(tau (r - 1)) A,  tau = tau_positive where A > 0, else tau_negative

    Gao et al. 2025, arXiv:2511.20347, eq. 6. At r = 1 the gradient is -A.

    Attributes:
        tau_positive: Temperature where A > 0.
        tau_negative: Temperature elsewhere; larger decays faster.

    Raises:
        ValueError: A temperature is not above zero.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> Sapo()(tokens).losses
        tensor([[-2.6269,  1.2949]])
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        check_number("tau_positive", self.tau_positive, above=0.0)
        check_number("tau_negative", self.tau_negative, above=0.0)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        positive = tokens.advantages > 0
        tau = either(positive, self.tau_positive, self.tau_negative, like=tokens.logprobs)
        gate = torch.sigmoid(tau * (tokens.ratio - 1)) * (4 / tau)
        return TokenLosses(-gate * tokens.advantages)


@dataclass(frozen=True)
class Vespo(Surrogate):
    """VESPO: one smooth weight per sequence, a Gamma density in the ratio of whole sequences.

    W = exp(sum_t log r_t + sum_t log w_t),  phi = e^lambda W^k e^(-lambda W)
    l = -sg(phi) A log pi,  (k, lambda) by the advantage's sign (A >= 0 is positive)

    arXiv:2602.10693. w are the importance weights, which are folded into W and not multiplied
    again. As TRL 1.16: each token's log-ratio is clamped to +-20, log w and log W to
    [log 1e-8, 20]. phi(1) = 1. So a weight of 0 does not mask a token: it lowers W for the whole
    sequence. `policy_loss` takes importance weights for it per token only.

    Attributes:
        k_positive: Power of W where A >= 0.
        lambda_positive: Rate where A >= 0.
        k_negative: Power of W where A < 0.
        lambda_negative: Rate where A < 0.

    Raises:
        ValueError: A power is negative or a rate is not above zero.

    Examples:
        >>> Vespo().k_negative
        3.0
    """

    k_positive: float = 2.0
    lambda_positive: float = 3.0
    k_negative: float = 3.0
    lambda_negative: float = 2.0

    scope: ClassVar[Scope] = "sequence"
    folds_importance_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("k_positive", "k_negative"):
            check_number(name, getattr(self, name), at_least=0.0)
        for name in ("lambda_positive", "lambda_negative"):
            check_number(name, getattr(self, name), above=0.0)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        floor = math.log(1e-8)
        log_w = tokens.log_ratio.detach().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        if tokens.importance_weights is not None:
            log_w = log_w + tokens.importance_weights.log().clamp(floor, MAX_LOG_RATIO)
        log_w = tokens.sequences.sum(log_w).clamp(floor, MAX_LOG_RATIO)
        log_w = tokens.sequences.spread(log_w)
        positive = tokens.advantages >= 0
        k = either(positive, self.k_positive, self.k_negative, like=log_w)
        rate = either(positive, self.lambda_positive, self.lambda_negative, like=log_w)
        phi = (rate + k * log_w - rate * log_w.exp()).exp()
        return TokenLosses(-phi * tokens.advantages * tokens.logprobs)


def _outside_trust_region(
    divergence: Tensor, rising: Tensor, advantages: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Mark the tokens outside of it that their advantage pushes further out."""
    too_low = (advantages <= 0) & ~rising & (divergence > low)
    too_high = (advantages > 0) & rising & (divergence > high)
    return too_low, too_high


@dataclass(frozen=True)
class DppoTv(Surrogate):
    """DPPO with the binary total variation: a trust region in probability, not in the ratio.

    l = -sg(min(r, max_ratio)) A log pi,  but 0 where pi - pi_old > high and A > 0,
                                                  or pi_old - pi > low and A <= 0

    arXiv:2602.04879; verl's "dppo_tv". A rare token may change its ratio a lot, a likely one only
    little.

    Attributes:
        low: Greatest fall of a token's probability where A <= 0.
        high: Greatest rise of a token's probability where A > 0.
        max_ratio: Truncation of the weight. The paper advises a large one.

    Raises:
        ValueError: A bound is negative or `max_ratio` below 1.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> DppoTv(high=0.3)(tokens).losses
        tensor([[0.8244, -0.0000]])
    """

    low: float = 0.2
    high: float = 0.2
    max_ratio: float = 20.0

    def __post_init__(self) -> None:
        check_number("low", self.low, at_least=0.0)
        check_number("high", self.high, at_least=0.0)
        check_number("max_ratio", self.max_ratio, at_least=1.0)

    def divergence(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        """Return |pi - pi_old|, the total variation of "this token" against "any other"."""
        return (logprobs.exp() - old_logprobs.exp()).abs()

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        logprobs, old = tokens.logprobs.detach(), tokens.old_logprobs
        too_low, too_high = _outside_trust_region(
            self.divergence(logprobs, old), logprobs > old, tokens.advantages, self.low, self.high
        )
        weight = tokens.ratio.detach().clamp(max=self.max_ratio)
        weight = torch.where(too_low | too_high, 0.0, weight)
        return TokenLosses(-weight * tokens.advantages * tokens.logprobs, too_low, too_high)


@dataclass(frozen=True)
class DppoKl(DppoTv):
    """DPPO with the binary KL divergence in place of the total variation.

    KL = pi_old log(pi_old / pi) + (1 - pi_old) log((1 - pi_old) / (1 - pi))

    arXiv:2602.04879; verl's "dppo_kl", with its 1e-8 inside the second logarithm.

    Attributes:
        low: Greatest divergence of a falling token where A <= 0.
        high: Greatest divergence of a rising token where A > 0.
        max_ratio: Truncation of the weight.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> DppoKl(low=0.05, high=0.2)(tokens).losses
        tensor([[0.8244, -0.0000]])
    """

    def divergence(self, logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
        """Return the KL of "this token" against "any other", from pi_old to pi."""
        p, q = logprobs.exp(), old_logprobs.exp()
        return q * (old_logprobs - logprobs) + (1 - q) * ((1 - q + 1e-8) / (1 - p + 1e-8)).log()
