"""The loss of a token, composed in one place: surrogate, KL and entropy, and what they are given.

This is the only statement of the loss. `policy_loss` evaluates it on whole batches,
`linear_policy_loss` on the rows of each chunk, and every fused kernel is tested against it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from .aggregates import Aggregate
from .checks import check_device, check_floating, check_number, check_shape, describe
from .kl import K3, KlEstimator
from .row_selection import Rows
from .sequences import Sequences
from .surrogates.base import Scope, Surrogate, Tokens
from .surrogates.clipped import Clip


def check_parts(surrogate: object, aggregate: object, kl: object) -> None:
    """Refuse strings, and classes where an instance is wanted.

    Raises:
        TypeError: One of the three is not what a loss is composed of.
        ValueError: The surrogate's scope is unknown.
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


def constant(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast what is not differentiated."""
    return (values.detach() if values.requires_grad else values).to(dtype)


class TokenTerms(NamedTuple):
    """The loss of each token, and what a trainer logs about it; each broadcasts to the tokens.

    Attributes:
        losses: w * surrogate + kl_coef * kl - entropy_coef * entropy.
        logged: By the names of the metrics.
    """

    losses: Tensor
    logged: dict[str, Tensor]

    def sums(self, sequences: Sequences) -> Tensor:
        """Add up over the counted tokens what is logged. Shape [K]."""
        _, *values = torch.broadcast_tensors(sequences.mask, *self.logged.values())
        stacked = torch.stack(values)  # the flags among them become numbers
        return sequences.select(stacked).flatten(1).sum(1)


def named_means(names: Iterable[str], sums: Tensor, count: Tensor | int) -> dict[str, Tensor]:
    """Name the sums of all parts of a batch, divided by the number of its tokens."""
    count = count.clamp(min=1) if isinstance(count, Tensor) else max(1, count)
    return dict(zip(names, (sums / count).unbind(), strict=True))


@dataclass(frozen=True)
class TokenObjective:
    """What the loss of a token is made of.

    Attributes:
        surrogate: The surrogate.
        kl: The KL estimator.
        kl_coef: Its weight.
        entropy_coef: The entropy's weight.
    """

    surrogate: Surrogate
    kl: KlEstimator
    kl_coef: float
    entropy_coef: float

    @classmethod
    def of(
        cls,
        surrogate: Surrogate,
        aggregate: Aggregate,
        kl: KlEstimator,
        kl_coef: float,
        entropy_coef: float,
        ref_logprobs: Tensor | None,
    ) -> "TokenObjective":
        """Check the parts of a loss, and that the KL term has its reference."""
        check_parts(surrogate, aggregate, kl)
        check_number("kl_coef", kl_coef, at_least=0)
        check_number("entropy_coef", entropy_coef)
        if kl_coef != 0 and ref_logprobs is None:
            raise ValueError(f"kl_coef={kl_coef} needs ref_logprobs, got None")
        return cls(surrogate, kl, kl_coef, entropy_coef)

    def terms(
        self, tokens: Tokens, ref_logprobs: Tensor | None, entropy: Tensor | None
    ) -> TokenTerms:
        """Return the terms of each token.

        The importance weights w act on the surrogate alone, as in TRL; a surrogate that folds them
        into its own weight is not multiplied again.
        """
        losses, low, high = self.surrogate(tokens)
        weights = tokens.importance_weights
        if weights is not None and not self.surrogate.folds_importance_weights:
            losses = losses * weights
        kl = None
        if ref_logprobs is not None:
            # by name: before torch 2.13 the compiler hashes what is called, fields or not
            kl = self.kl.__call__(tokens, ref_logprobs)
        if self.kl_coef != 0 and kl is not None:
            losses = losses + self.kl_coef * kl
        if self.entropy_coef != 0 and entropy is not None:
            losses = losses - self.entropy_coef * entropy
        logged = {
            "logprob": tokens.logprobs,
            "ratio": tokens.ratio,
            "clip_fraction_low": low,
            "clip_fraction_high": high,
            "kl": kl,
            "entropy": entropy,
            "importance_weight": weights,
        }
        return TokenTerms(losses, {k: v for k, v in logged.items() if v is not None})

    def has_kernel(self, logprobs: Tensor) -> bool:
        """Whether one CUDA kernel runs it: `Clip` in fp32, with k3 or none.

        A compiler fuses the formulas itself, and is given those.
        """
        clips = type(self.surrogate) is Clip and type(self.kl) is K3 and self.entropy_coef == 0
        on_cuda = logprobs.is_cuda and logprobs.dtype != torch.float64
        return clips and on_cuda and not torch.compiler.is_compiling()

    @property
    def needs_every_row(self) -> bool:
        """Whether a token of zero advantage has a loss."""
        return self.kl_coef != 0 or self.entropy_coef != 0


@dataclass(frozen=True)
class TokenInputs:
    """What tokens are given besides their log-probs and entropies; none is differentiated.

    Attributes:
        sequences: Which tokens count, and which sequence each belongs to.
        advantages: In a shape that broadcasts to the tokens.
        old_logprobs: None: the log-probs themselves, detached.
        ref_logprobs: None without a reference.
        importance_weights: None without a correction.
    """

    sequences: Sequences
    advantages: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None

    @classmethod
    def of(
        cls,
        sequences: Sequences,
        dtype: torch.dtype,
        advantages: Tensor,
        *,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        importance_weights: Tensor | None = None,
        per_token_weights: bool = False,
        legend: str = "of logprobs",
    ) -> "TokenInputs":
        """Bring the inputs of a loss to one dtype, and to shapes that broadcast to the tokens.

        With `per_token_weights` the importance weights must be one per token. `legend` says whose
        shape the tokens have.

        Raises:
            TypeError: An input is not a floating-point tensor.
            ValueError: A shape or a device is not that of the tokens.
        """
        shape = sequences.mask.shape

        def per_token(name: str, values: Tensor | None) -> Tensor | None:
            if values is None:
                return None
            check_shape(name, check_floating(name, values), shape, legend)
            return constant(check_device(name, values, sequences.mask), dtype)

        def aligned(name: str, values: Tensor) -> Tensor:
            check_device(name, check_floating(name, values), sequences.mask)
            return sequences.align(name, constant(values, dtype))

        weights = importance_weights
        if weights is not None:
            align = per_token if per_token_weights else aligned
            weights = align("importance_weights", weights)
        return cls(
            sequences,
            aligned("advantages", advantages),
            per_token("old_logprobs", old_logprobs),
            per_token("ref_logprobs", ref_logprobs),
            weights,
        )

    def masked(self) -> "TokenInputs":
        """Put 0 in masked slots, and where a sequence has no token that counts."""
        sequences = self.sequences

        def select(values: Tensor | None) -> Tensor | None:
            return None if values is None else sequences.select_aligned(values)

        return TokenInputs(
            sequences,
            sequences.select_aligned(self.advantages),
            select(self.old_logprobs),
            select(self.ref_logprobs),
            select(self.importance_weights),
        )

    def tokens(self, logprobs: Tensor) -> Tokens:
        """Return the tokens as the surrogate sees them."""
        old = logprobs.detach() if self.old_logprobs is None else self.old_logprobs
        return Tokens(logprobs, old, self.advantages, self.sequences, self.importance_weights)

    def take(self, rows: Rows) -> "TokenInputs":
        """Select rows that count, by their index among all tokens; they become packed."""
        some = self.sequences.take(rows)
        owner = some.owners

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else self.sequences.pick(values, rows, owner)

        return TokenInputs(
            some,
            self.sequences.pick(self.advantages, rows, owner),
            pick(self.old_logprobs),
            pick(self.ref_logprobs),
            pick(self.importance_weights),
        )
