"""How the losses of tokens become one number: an aggregate is a weight for every token.

loss = sum over the counted tokens of weight * token loss

The weights depend on the mask and on counts alone, so a loss may be taken in chunks, micro-batches
or ranks and summed. Each aggregate divides by what this batch holds; give `denominator` to divide
by the count of the whole step (all micro-batches and ranks, times whatever the trainer multiplies
back), and the parts add up to the whole. A denominator of zero gives a loss of zero.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .checks import check_count, check_number
from .sequences import Sequences


class Aggregate(Protocol):
    """Maps the layout of a batch to one weight per token."""

    def weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """Return the weights, in a shape that broadcasts to the tokens."""
        ...


def _check_denominator(denominator: float | Tensor | None) -> None:
    if isinstance(denominator, Tensor):
        if denominator.is_complex():
            raise TypeError(f"denominator must be a real number, got {denominator.dtype}")
        if denominator.numel() != 1:
            raise ValueError(
                f"denominator must be a number or a tensor of one element, "
                f"got shape {list(denominator.shape)}"
            )
        on_cpu = denominator.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_cpu and not (denominator >= 0).all():
            raise ValueError(f"denominator must be >= 0, got {denominator.item()}")
    elif denominator is not None:
        number = check_number("denominator", denominator, at_least=0.0)
        if 0 < number < 2.0**-126:  # its reciprocal is infinite in float32
            raise ValueError(f"denominator must be 0 or >= {2.0**-126:.3g}, got {number}")


def _reciprocal(denominator: float | Tensor, like: Tensor) -> Tensor:
    """1 / denominator, and 0 where that is zero; a 0-d tensor, without a host sync."""
    if not isinstance(denominator, Tensor):
        return like.new_full((), 1 / denominator if denominator else 0.0)
    value = denominator.to(like.device, like.dtype).reshape(())
    return torch.where(value == 0, 0.0, value.reciprocal())


@dataclass(frozen=True)
class SequenceMean:
    """Average the tokens of each sequence, then the sequences: GRPO and iGRPO.

    w = 1 / (|o| * sequences)

    iGRPO equation 5 (arXiv:2602.09000), GRPO (arXiv:2402.03300, eq. 3); TRL's "grpo", verl's
    "seq-mean-token-mean". Sequences without a counted token add nothing and are counted, as TRL
    does; pass a `denominator` to leave them out.

    Attributes:
        denominator: Sequences to divide by; None: those of the batch.

    Raises:
        ValueError: `denominator` is negative or has more than one element.

    Examples:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> SequenceMean().weights(Sequences.of(mask.float(), mask), torch.float32)
        tensor([[0.2500],
                [0.5000]])
    """

    denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_denominator(self.denominator)

    def weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """Return the weights: shape [B, 1], or [L] when packed."""
        lengths = sequences.lengths.clamp(min=1).to(dtype)
        count = sequences.count if self.denominator is None else self.denominator
        return sequences.spread(_reciprocal(count, lengths) / lengths)


@dataclass(frozen=True)
class TokenMean:
    """Average all tokens alike: DAPO.

    w = 1 / tokens

    DAPO (arXiv:2503.14476, eq. 8); verl's "token-mean". TRL's "dapo" is this with its global count
    as `denominator`, TRL's "bnpo" this without one.

    Attributes:
        denominator: Tokens to divide by; None: the counted tokens of the batch.

    Raises:
        ValueError: `denominator` is negative or has more than one element.

    Examples:
        >>> mask = torch.tensor([[1, 1, 0], [1, 1, 0]])
        >>> TokenMean().weights(Sequences.of(mask.float(), mask), torch.float32)
        tensor(0.2500)
    """

    denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_denominator(self.denominator)

    def weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """Return the weight, one for all tokens: shape []."""
        if self.denominator is None:
            return sequences.mask.sum(dtype=dtype).clamp_(min=1).reciprocal_()
        return _reciprocal(self.denominator, sequences.mask.new_empty((), dtype=dtype))


@dataclass(frozen=True)
class FixedLength:
    """Sum the tokens and divide by a length that is the same for all: Dr. GRPO.

    w = 1 / (length * sequences)

    Dr. GRPO (arXiv:2503.20783), without the bias towards short answers; TRL's "dr_grpo" with
    `length` its max_completion_length, verl's "seq-mean-token-sum-norm". `FixedLength(1)` is
    "seq-mean-token-sum", and with `SequenceClip` LUSPO. It leaves advantages alone: Dr. GRPO also
    takes them from `center_by_group`.

    Attributes:
        length: The constant, in tokens.
        denominator: Sequences to divide by; None: those of the batch.

    Raises:
        TypeError: `length` is not an int.
        ValueError: `length` < 1, or `denominator` is negative or has more than one element.

    Examples:
        >>> mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        >>> FixedLength(10).weights(Sequences.of(mask.float(), mask), torch.float32)
        tensor(0.0500)
    """

    length: int
    denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        check_count("length", self.length)
        _check_denominator(self.denominator)

    def weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """Return the weight, one for all tokens: shape []."""
        like = sequences.mask.new_empty((), dtype=dtype)
        count = sequences.count if self.denominator is None else self.denominator
        return _reciprocal(count, like) / self.length


@dataclass(frozen=True)
class Sum:
    """Add up the tokens; for trainers that scale advantages beforehand, as SkyRL does.

    w = 1 / denominator

    Attributes:
        denominator: What to divide by; None: nothing.

    Raises:
        ValueError: `denominator` is negative or has more than one element.

    Examples:
        >>> mask = torch.ones(1, 2)
        >>> Sum().weights(Sequences.of(mask), torch.float32)
        tensor(1.)
    """

    denominator: float | Tensor | None = None

    def __post_init__(self) -> None:
        _check_denominator(self.denominator)

    def weights(self, sequences: Sequences, dtype: torch.dtype) -> Tensor:
        """Return the weight, one for all tokens: shape []."""
        like = sequences.mask.new_empty((), dtype=dtype)
        return _reciprocal(1.0 if self.denominator is None else self.denominator, like)
