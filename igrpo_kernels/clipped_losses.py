"""The clipped-ratio loss of each token, before any average."""

from torch import Tensor

from .checks import check_floating, check_number
from .kl import K3
from .loss_terms import TokenInputs, TokenObjective
from .row_selection import working_dtype
from .sequences import Sequences
from .surrogates import Clip


def clipped_policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Compute the clipped-ratio loss of each token.

    l = -min(r A, clamp(r, 1 - clip_low, 1 + clip_high) A),  r = exp(logprobs - old_logprobs)

    and at most -dual_clip * A where A < 0. Masked slots give exactly zero, whatever they hold, and
    get a gradient of exactly zero. This is `Clip` (see there for sources and conventions) for those
    who average by themselves; `policy_loss` averages too.

    Args:
        logprobs: Log-probs of the sampled tokens under the policy. Shape [B, T], or [L] packed.
        advantages: One per sequence, [B] or [B, 1], or one per token; packed, where L = B, one per
            sequence. Treated as constants.
        mask: 1 (or True) where a token counts. Shape of `logprobs`.
        old_logprobs: Log-probs under the policy frozen for the ratio; None: ratio 1, gradient
            intact. Shape of `logprobs`.
        clip_low: How far below 1 the ratio may fall where A < 0.
        clip_high: How far above 1 the ratio may rise where A > 0.
        dual_clip: Upper bound of the ratio where A < 0, at least 1 + clip_high.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].

    Returns:
        The losses in float32 (float64 for float64 inputs), shape of `logprobs`; gradient flows to
        `logprobs`.

    Raises:
        TypeError: An input is not a floating-point tensor.
        ValueError: Shapes do not fit, or a bound is negative.

    Examples:
        >>> import torch
        >>> old = torch.log(torch.tensor([[0.5, 0.5]]))
        >>> new = torch.log(torch.tensor([[0.9, 0.45]]))
        >>> clipped_policy_loss(new, torch.tensor([1.0]), old_logprobs=old)
        tensor([[-1.2000, -0.9000]])
    """
    check_number("clip_low", clip_low, at_least=0.0)
    check_number("clip_high", clip_high, at_least=0.0)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, at_least=1 + clip_high)
    sequences = Sequences.of(check_floating("logprobs", logprobs), mask, cu_seqlens)
    dtype = working_dtype(logprobs.dtype)
    inputs = TokenInputs.of(sequences, dtype, advantages, old_logprobs=old_logprobs)
    objective = TokenObjective(Clip(clip_low, clip_high, dual_clip), K3(), 0.0, 0.0)
    if objective.has_kernel(logprobs):
        from ._triton.clip_terms import ClippedLosses

        losses: Tensor = ClippedLosses.apply(logprobs, inputs, objective)
        return losses
    tokens = inputs.masked().tokens(sequences.select(logprobs.to(dtype)))
    return sequences.select(objective.surrogate(tokens).losses)
