"""Surrogates that clip a ratio: per token (PPO, GRPO, DAPO) or per sequence (GSPO, GMPO)."""

from dataclasses import dataclass
from typing import ClassVar

from ..checks import check_number
from .base import Scope, Surrogate, TokenLosses, Tokens, clamp_by_advantage, exp_ratio


def _check_clip(low: float, high: float) -> None:
    check_number("low", low, at_least=0.0)
    check_number("high", high, at_least=0.0)


@dataclass(frozen=True)
class Clip(Surrogate):
    """The clipped ratio of PPO, GRPO and iGRPO, per token.

    l = -min(r A, clamp(r, 1 - low, 1 + high) A),  r = pi / pi_old
    and with `dual` = c, where A < 0:  l = min(l, -c A)

    `low == high` is GRPO (Shao et al. 2024, arXiv:2402.03300) and iGRPO's equation 5
    (arXiv:2602.09000); `high > low` is DAPO's clip-higher (arXiv:2503.14476, eq. 10). `dual` is
    dual-clip PPO (arXiv:1912.09729), which verl sets to 3; it is TRL's `delta` wherever that is at
    least 1 + high. At r = 1 (the policy that sampled) the gradient is -A.

    Attributes:
        low: How far below 1 the ratio may fall where A < 0. At most 1 has an effect.
        high: How far above 1 the ratio may rise where A > 0.
        dual: Upper bound of the ratio where A < 0, at least 1 + high. None: unbounded.

    Raises:
        ValueError: A bound is negative, or `dual` is inside the clip range.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> Clip(low=0.2, high=0.28)(tokens).losses
        tensor([[-1.2800,  0.8000]])
    """

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None

    def __post_init__(self) -> None:
        _check_clip(self.low, self.high)
        if self.dual is not None:
            check_number("dual", self.dual, at_least=1 + self.high)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        ratio, low, high = clamp_by_advantage(
            tokens.ratio, tokens.advantages, 1 - self.low, 1 + self.high, self.dual
        )
        return TokenLosses(ratio * -tokens.advantages, low, high)


@dataclass(frozen=True)
class SequenceClip(Surrogate):
    """GSPO: one clipped ratio per sequence, the geometric mean of its tokens' ratios.

    s = exp(mean_t log r_t);  l_t = -min(s A, clamp(s, 1 - low, 1 + high) A) for each token

    With `SequenceMean` this is GSPO (Zheng et al. 2025, arXiv:2507.18071, eq. 5 and 7); with
    `FixedLength(1)`, which sums over the tokens of a sequence, it is LUSPO (arXiv:2602.05261),
    whose bounds are 2e-3 and 2.5e-3. The gradient flows through s. The mean is over counted tokens.

    Attributes:
        low: How far below 1 the ratio may fall where A < 0. The paper's 3e-4 is the default.
        high: How far above 1 the ratio may rise where A > 0. The paper's 4e-4 is the default.

    Raises:
        ValueError: A bound is negative.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.ones(1, 1), Sequences.of(new))
        >>> SequenceClip()(tokens).losses
        tensor([[-0.7788]])
    """

    low: float = 3e-4
    high: float = 4e-4

    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        _check_clip(self.low, self.high)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        sequences = tokens.sequences
        ratio, low, high = clamp_by_advantage(
            sequences.spread(exp_ratio(sequences.mean(tokens.log_ratio))),
            tokens.advantages,
            1 - self.low,
            1 + self.high,
        )
        return TokenLosses(ratio * -tokens.advantages, low, high)


@dataclass(frozen=True)
class SequenceTokenClip(Surrogate):
    """GSPO-token: the value of the sequence's ratio, the gradient of each token's own.

    s_t = sg(s) r_t / sg(r_t);  l_t = -min(s_t A_t, clamp(s_t, 1 - low, 1 + high) A_t)

    sg stops the gradient and s is `SequenceClip`'s. Equal to it in value, and in gradient too where
    the tokens of a sequence share one advantage (arXiv:2507.18071, eq. 13 and 14; verl's "gspo").

    Attributes:
        low: How far below 1 the ratio may fall where A < 0.
        high: How far above 1 the ratio may rise where A > 0.

    Raises:
        ValueError: A bound is negative.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.ones(1, 1), Sequences.of(new))
        >>> SequenceTokenClip()(tokens).losses
        tensor([[-0.7788, -0.7788]])
    """

    low: float = 3e-4
    high: float = 4e-4

    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        _check_clip(self.low, self.high)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        sequences = tokens.sequences
        of_sequence = sequences.spread(sequences.mean(tokens.log_ratio)).detach()
        own_gradient = tokens.logprobs - tokens.logprobs.detach()
        ratio, low, high = clamp_by_advantage(
            exp_ratio(of_sequence + own_gradient),
            tokens.advantages,
            1 - self.low,
            1 + self.high,
        )
        return TokenLosses(ratio * -tokens.advantages, low, high)


@dataclass(frozen=True)
class Gmpo(Surrogate):
    """GMPO: the geometric mean of the tokens' ratios, each clipped in log space first.

    c_t = min(log r_t, high) where A > 0, max(log r_t, -low) where A < 0
    l_t = -A exp(mean_t c_t) for each token of the sequence

    Zhao et al. 2025, arXiv:2507.20673, eq. 4. Use it with `SequenceMean`. The bounds are in log
    space: the paper's range of ratios is (e^-0.4, e^0.4). Equal to verl's "geo_mean" and TRL's
    `GMPOTrainer`. Advantages are one per sequence.

    Attributes:
        low: How far below 0 the log-ratio may fall where A < 0.
        high: How far above 0 the log-ratio may rise where A > 0.

    Raises:
        ValueError: A bound is negative.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.ones(1, 1), Sequences.of(new))
        >>> Gmpo()(tokens).losses
        tensor([[-0.7408]])
    """

    low: float = 0.4
    high: float = 0.4

    scope: ClassVar[Scope] = "sequence"

    def __post_init__(self) -> None:
        _check_clip(self.low, self.high)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        sequences = tokens.sequences
        log_ratio, low, high = clamp_by_advantage(
            tokens.log_ratio, tokens.advantages, -self.low, self.high
        )
        ratio = exp_ratio(sequences.mean(log_ratio))
        return TokenLosses(sequences.spread(ratio) * -tokens.advantages, low, high)
