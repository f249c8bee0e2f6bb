"""What to do about completions that are too long: penalize them softly, or leave them out."""

import torch
from torch import Tensor

from igrpo_kernels.checks import check_count, check_integral, check_shape, check_tensor
from igrpo_kernels.sequences import Sequences


def overlong_penalty(lengths: Tensor, *, max_length: int, buffer: int) -> Tensor:
    """Penalize completions that come close to the limit: DAPO's soft overlong punishment.

    0                                       where length <= max_length - buffer
    (max_length - buffer - length) / buffer where it is inside the buffer
    -1                                      where length > max_length

    Add it to the rewards. DAPO, arXiv:2503.14476, eq. 13 (its values: 20,480 and 4,096);
    TRL's `get_soft_overlong_punishment`. With a buffer of 0 only the hard limit is left.

    Args:
        lengths: Tokens of each completion. Any shape, integers.
        max_length: Longest completion without the full penalty.
        buffer: Width of the ramp below it, at most `max_length`.

    Returns:
        Penalties in float32, shape of `lengths`.

    Raises:
        TypeError: `lengths` is not an integer tensor.
        ValueError: `max_length` is below 1, or `buffer` is negative or exceeds it.

    Examples:
        >>> overlong_penalty(torch.tensor([80, 90, 101]), max_length=100, buffer=20)
        tensor([ 0.0000, -0.5000, -1.0000])
    """
    lengths = check_integral("lengths", lengths).long()  # a byte would wrap around
    check_count("max_length", max_length)
    if check_count("buffer", buffer, at_least=0) > max_length:
        raise ValueError(f"buffer must be <= max_length = {max_length}, got {buffer}")
    ramp = (max_length - buffer - lengths).float() / max(buffer, 1)
    return ramp.clamp(-1.0, 0.0)


def mask_truncated_completions(
    mask: Tensor, truncated: Tensor, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """Leave completions that hit the length limit out of the loss: DAPO's overlong filtering.

    Their tokens stop counting, in denominators of tokens too; `SequenceMean` and `FixedLength`
    still count the sequences, as TRL's `mask_truncated_completions` does.

    Args:
        mask: 1 (or True) where a token counts. Shape [B, T], or [L] packed.
        truncated: True where the completion has no end-of-sequence token. Shape [B].
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        The mask in its own dtype and shape.

    Raises:
        TypeError: An input is not a tensor.
        ValueError: The shapes do not fit.

    Examples:
        >>> mask_truncated_completions(torch.tensor([[1, 1], [1, 0]]), torch.tensor([True, False]))
        tensor([[0, 0],
                [1, 0]])
    """
    sequences = Sequences.of(check_tensor("mask", mask), mask, cu_seqlens, name="mask")
    check_shape("truncated", check_tensor("truncated", truncated), (sequences.count,), "[B]")
    return torch.where(sequences.spread(truncated.bool()), torch.zeros_like(mask), mask)
