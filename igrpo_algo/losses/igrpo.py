"""The loss of the paper, in one call."""

from torch import Tensor

from igrpo_kernels import Clip, SequenceMean
from igrpo_kernels.checks import check_number
from igrpo_kernels.loss_from_logprobs import policy_loss


def igrpo_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl_coef: float = 0.0,
    cu_seqlens: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """Compute the iGRPO loss of a batch of refinements.

    loss = -(1/B) sum_j (1/|o_j|) sum_t [min(r A, clamp(r, 1 - low, 1 + high) A) - c KL]
    r = pi(o_jt | q', o_j<t) / pi_old(same),  KL = rho - log rho - 1,  rho = pi_ref / pi,
    low = clip_low,  high = clip_high,  c = kl_coef

    Hatamizadeh et al. 2026, arXiv:2602.09000, eq. 5 with the sign flipped. Every log-prob is taken
    under q', the prompt with the best draft spliced in. The paper does not state its clip bound;
    0.2 is the default of every framework. It is `policy_loss` with `Clip`,
    `SequenceMean` and the plain k3 estimate. Sequences without a counted token count in B. Masked
    slots may hold anything, NaN and inf included.

    Args:
        logprobs: Log-probs of the refinements' tokens under the policy. Shape [B, T], or [L].
        advantages: One per refinement, [B] or [B, 1], or one per token. Treated as constants.
        mask: 1 (or True) where a token counts; None counts every token. Shape of `logprobs`.
        old_logprobs: Log-probs under the policy that drew the refinements; None: the policy itself,
            so r = 1 with its gradient intact. Shape of `logprobs`.
        ref_logprobs: Log-probs under the reference. Shape of `logprobs`.
        clip_low: How far below 1 the ratio may fall where A < 0.
        clip_high: How far above 1 the ratio may rise where A > 0.
        kl_coef: Weight of the KL term, beta in the paper (0 in its main runs).
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].
        denominator: Divides in place of B: the sequences of the whole step, so that micro-batches
            and ranks add up.

    Returns:
        The loss, a scalar in float32 (float64 for float64 inputs).

    Raises:
        TypeError: An input has the wrong type or an integer dtype.
        ValueError: Shapes do not fit, a bound is negative, `kl_coef` is set without
            `ref_logprobs`, or `ref_logprobs` is given without `kl_coef`.

    Examples:
        >>> import torch
        >>> logprobs = torch.tensor([[-0.1, -0.7], [-2.3, -1.2]], requires_grad=True)
        >>> mask = torch.tensor([[1, 1], [1, 0]])
        >>> igrpo_loss(logprobs, torch.tensor([0.5, -0.5]), mask).backward()
        >>> logprobs.grad
        tensor([[-0.1250, -0.1250],
                [ 0.2500,  0.0000]])
    """
    check_number("clip_low", clip_low, at_least=0.0)
    check_number("clip_high", clip_high, at_least=0.0)
    if check_number("kl_coef", kl_coef, at_least=0.0) == 0.0 and ref_logprobs is not None:
        raise ValueError("ref_logprobs has no effect with kl_coef=0.0")
    return policy_loss(
        logprobs,
        advantages,
        mask,
        surrogate=Clip(clip_low, clip_high),
        aggregate=SequenceMean(denominator),
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        kl_coef=kl_coef,
        cu_seqlens=cu_seqlens,
    ).loss
