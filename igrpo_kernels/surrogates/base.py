"""What a surrogate is: a value that maps tokens to losses.

A surrogate is a frozen dataclass of its hyper-parameters, a subclass of `Surrogate`. Called with
`Tokens` it returns `TokenLosses`. The aggregate averages these, and `policy_loss` adds KL, entropy
and the correction for the sampler.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from ..sequences import Sequences

Scope = Literal["token", "sequence", "batch"]

MAX_LOG_RATIO = 20.0
"""Ratios are exp(min(log-ratio, 20)): 5e8 at most, so that no product with zero becomes NaN."""


@dataclass(frozen=True)
class Tokens:
    """What a surrogate sees: one value per token, shape [B, T] or [L], and 0 in masked slots.

    Advantages and weights that are one per sequence stand as [B, 1] in the padded layout.

    Attributes:
        logprobs: Log-probs under the policy that is trained. The gradient flows through these.
        old_logprobs: Log-probs under the policy that was frozen for the ratio. Detached.
        advantages: In a shape that broadcasts to the tokens. Detached.
        sequences: Which tokens count, and which sequence each belongs to.
        importance_weights: Correction for the sampler, or None. Detached.
        log_ratio: The difference of the log-probs.
        ratio: Its exponential, which stays finite.

    Examples:
        >>> import torch
        >>> new, old = torch.tensor([[-1.0, -0.5]]), torch.tensor([[-1.0, -1.5]])
        >>> Tokens(new, old, torch.ones(1, 2), Sequences.of(new)).ratio
        tensor([[1.0000, 2.7183]])
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    sequences: Sequences
    importance_weights: Tensor | None = None

    log_ratio: Tensor = field(init=False)
    ratio: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "log_ratio", self.logprobs - self.old_logprobs)
        object.__setattr__(self, "ratio", exp_ratio(self.log_ratio))


class TokenLosses(NamedTuple):
    """The loss of each token, and where the surrogate is flat.

    Attributes:
        losses: Shape of the tokens, or one that broadcasts to it.
        clipped_low: True where a negative advantage met the lower bound; None without one.
        clipped_high: True where a positive advantage met the upper bound; None without one.
    """

    losses: Tensor
    clipped_low: Tensor | None = None
    clipped_high: Tensor | None = None


class Surrogate(ABC):
    """Maps tokens to their losses; its class attributes say what a fused pass needs to know.

    Attributes:
        scope: What the loss of a token depends on: "token" for that token alone, "sequence" for the
            tokens of its sequence, else "batch". Within a token, or a sequence, losses must be zero
            where all advantages are.
        folds_importance_weights: Whether the surrogate's own weight holds the importance weights.

    Examples:
        >>> class Plain(Surrogate):
        ...     def __call__(self, tokens: Tokens) -> TokenLosses:
        ...         return TokenLosses(-tokens.ratio * tokens.advantages)
        >>> Plain().scope
        'token'
    """

    scope: ClassVar[Scope] = "token"
    folds_importance_weights: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""


def exp_ratio(log_ratio: Tensor) -> Tensor:
    """Turn a log-ratio into a ratio that stays finite: exp(min(log_ratio, 20))."""
    return log_ratio.clamp(max=MAX_LOG_RATIO).exp()


def either(condition: Tensor, yes: float, no: float, *, like: Tensor) -> Tensor:
    """Choose one of two numbers by a condition, in the dtype of `like` (where() knows float32)."""
    return like.new_full(condition.shape, no).masked_fill_(condition, yes)


class Clamped(NamedTuple):
    """A clamped quantity and where its bounds were met."""

    values: Tensor
    low: Tensor
    high: Tensor


def clamp_by_advantage(
    values: Tensor, advantages: Tensor, low: float, high: float, cap: float | None = None
) -> Clamped:
    """Clamp from above where A > 0 and from below elsewhere: PPO's min, written as a clamp.

    min(x A, clamp(x, low, high) A)  =  A * min(x, high)  where A > 0,
                                        A * max(x, low)   where A < 0,
    and for A < 0 also at most `cap`, the dual clip (Ye et al. 2020, arXiv:1912.09729).
    """
    negative = advantages < 0
    under, over = negative & (values < low), (advantages > 0) & (values > high)
    clamped = values.masked_fill(under, low).masked_fill(over, high)
    if cap is not None:
        clamped = clamped.masked_fill(negative & (values > cap), cap)
    return Clamped(clamped, under, over)
