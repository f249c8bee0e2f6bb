"""Surrogates that hold back the few tokens which drive entropy down: Clip-Cov and KL-Cov.

Cui et al. 2025, arXiv:2505.22617. The change of entropy follows the covariance of log-prob and
advantage, and a few tokens carry most of it. Means and shares are over the counted tokens of the
given batch, so micro-batches do not add up to one batch.
"""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number, describe
from .base import Scope, Surrogate, TokenLosses, Tokens
from .clipped import Clip


def _covariance(tokens: Tokens) -> Tensor:
    """(A - mean A) (log pi - mean log pi) of each token, over the counted tokens of the batch."""
    mask = tokens.sequences.mask
    count = mask.sum().clamp(min=1)
    logprobs, advantages = tokens.logprobs.detach(), tokens.sequences.select(tokens.advantages)
    return (advantages - advantages.sum() / count) * (logprobs - logprobs.sum() / count)


def _largest(scores: Tensor, eligible: Tensor, share: float, counted: Tensor) -> Tensor:
    """Mark the eligible tokens of greatest score: max(1, floor(share * counted tokens)) of them."""
    quota = (share * counted.sum()).floor().clamp(min=1)
    ranked = torch.where(eligible, scores, -torch.inf).flatten()
    rank = ranked.argsort(descending=True, stable=True).argsort()
    return (rank < quota).view_as(eligible) & eligible


@dataclass(frozen=True)
class ClipCov(Surrogate):
    """Clip-Cov: the clipped ratio, and no gradient for a random few of high covariance.

    l = Clip(low, high), but 0 for max(1, share * tokens) tokens drawn among those with
    min_covariance < cov < max_covariance that the ratio clip has not caught

    arXiv:2505.22617; verl's "clip_cov" and its defaults.

    Attributes:
        generator: Draws the tokens; on the device of the log-probs. torch.compile does not trace a
            generator, so this surrogate breaks its graph.
        low: As in `Clip`.
        high: As in `Clip`.
        share: Share of the counted tokens that lose their gradient.
        min_covariance: Only tokens of a covariance above this.
        max_covariance: Only tokens of a covariance below this.

    Raises:
        TypeError: `generator` is not a torch.Generator.
        ValueError: A bound is negative, or `share` not in (0, 1].

    Examples:
        >>> ClipCov(torch.Generator().manual_seed(0)).share
        0.0002
    """

    generator: torch.Generator = field(repr=False)
    low: float = 0.2
    high: float = 0.2
    share: float = 2e-4
    min_covariance: float = 1.0
    max_covariance: float = 5.0

    scope: ClassVar[Scope] = "batch"

    def __post_init__(self) -> None:
        if not isinstance(self.generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {describe(self.generator)}")
        check_number("share", self.share, above=0.0, at_most=1.0)
        check_number("min_covariance", self.min_covariance)
        check_number("max_covariance", self.max_covariance, above=self.min_covariance)
        Clip(self.low, self.high)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        losses, low, high = Clip(self.low, self.high)(tokens)
        assert low is not None
        assert high is not None
        covariance = _covariance(tokens)
        mask = tokens.sequences.mask
        eligible = (covariance > self.min_covariance) & (covariance < self.max_covariance)
        eligible = eligible & mask & ~low & ~high
        lottery = torch.rand(mask.shape, generator=self.generator, device=mask.device)
        held = _largest(lottery, eligible, self.share, mask)
        return TokenLosses(torch.where(held, 0.0, losses), low, high | held)


@dataclass(frozen=True)
class KlCov(Surrogate):
    """KL-Cov: the plain ratio, and a penalty on the few tokens of greatest covariance.

    l = -r A, plus coef * |log r| for the max(1, share * tokens) tokens of greatest covariance

    arXiv:2505.22617; verl's "kl_cov" and its defaults.

    Attributes:
        share: Share of the counted tokens that are penalized.
        coef: Weight of the penalty.

    Raises:
        ValueError: `share` is not in (0, 1], or `coef` is negative.

    Examples:
        >>> import torch
        >>> from igrpo_kernels.sequences import Sequences
        >>> new, old = torch.tensor([[-0.5, -2.0]]), torch.tensor([[-1.0, -1.0]])
        >>> tokens = Tokens(new, old, torch.tensor([[1.0, -1.0]]), Sequences.of(new))
        >>> KlCov(share=0.5)(tokens).losses
        tensor([[-1.5987,  0.3679]])
    """

    share: float = 2e-4
    coef: float = 0.1

    scope: ClassVar[Scope] = "batch"

    def __post_init__(self) -> None:
        check_number("share", self.share, above=0.0, at_most=1.0)
        check_number("coef", self.coef, at_least=0.0)

    def __call__(self, tokens: Tokens) -> TokenLosses:
        """Return the loss of each token."""
        mask = tokens.sequences.mask
        penalized = _largest(_covariance(tokens), mask, self.share, mask)
        penalty = torch.where(penalized, self.coef * tokens.log_ratio.abs(), 0.0)
        return TokenLosses(penalty - tokens.ratio * tokens.advantages)
