"""The policy loss from hidden states: `policy_loss` of `linear_token_logprobs`, in one pass."""

import torch
from torch import Tensor

from .aggregates import Aggregate
from .compiled_loss import can_carry, carry
from .fused_loss import FusedLoss, RowLosses
from .head_arguments import HeadBatch
from .kl import K3, KlEstimator
from .logprobs_from_hidden import score
from .loss_from_logprobs import PolicyLoss, average
from .loss_terms import TokenInputs, TokenObjective
from .sequences import Sequences
from .surrogates.base import Surrogate
from .vocabulary_shard import VocabularyShard


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    mask: Tensor | None = None,
    *,
    surrogate: Surrogate,
    aggregate: Aggregate,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl: KlEstimator = K3(),
    entropy_coef: float = 0.0,
    importance_weights: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    shard: VocabularyShard | None = None,
    chunk_bytes: int | None = None,
    skip_zero_rows: bool = True,
    cu_seqlens: Tensor | None = None,
    return_entropy: bool = False,
    all_metrics: bool = False,
) -> PolicyLoss:
    """Compute the policy loss from hidden states, with its gradients in the same pass.

    policy_loss(linear_token_logprobs(hidden, weight, targets, ...), advantages, mask, ...)

    defines it, in value and gradient. Here each chunk of rows goes through the head once: from
    exponentials relative to the target's logit to log-probs, loss and the gradients of hidden,
    weight and bias, which the backward multiplies by the upstream scalar. Surrogates over sequences
    (GSPO, GMPO, VESPO) get whole sequences. The definition's two passes run where a sequence is
    larger than a chunk and for surrogates over the batch (Clip-Cov, KL-Cov).

    Under torch.compile the pass is one op, without a graph break. The numbers of surrogate and KL,
    coefficients, softcap and logit_scale are baked into the graph: another value compiles again,
    where another temperature, or a denominator given as a tensor, does not. There the two passes
    also run for surrogates and estimators that are not this package's, and for those over sequences
    unless T rows of fp32 logits (packed: L) fit a chunk. Multiplying by the upstream scalar takes a
    pass over the gradients.

    Rows without a gradient cost nothing: masked ones; those of zero advantage or zero importance
    weight (for a surrogate over sequences, whole sequences of them), unless KL or entropy has a
    coefficient; and on a CPU, after their logits, those whose gradient comes out as exactly zero,
    such as clipped ones. Log-probs and all sums are in fp32 from half-precision inputs too. Masked
    slots may hold anything, NaN and inf included. Without a counted token the loss is zero and
    still on the graph. The same call gives the same bits. Once differentiable.

    Args:
        hidden: Last hidden state of the position that predicts each target. Shape [B, T, H], or
            [L, H] packed.
        weight: The head's weight; where it needs no gradient, none is computed. With `shard`, this
            rank's rows of it. Shape [V, H].
        targets: Index of each sampled token. Shape [B, T], or [L] packed.
        advantages: One per sequence, [B] or [B, 1], or one per token; packed, where L = B, one per
            sequence. Treated as constants.
        mask: 1 (or True) where a token counts; None counts every token. Shape of `targets`.
        surrogate: The loss of a token, such as `Clip(0.2, 0.28)`.
        aggregate: How tokens are averaged, such as `SequenceMean()`.
        old_logprobs: Log-probs under the policy frozen for the ratio. None: the policy is the one
            that sampled, so the ratio is 1 and its gradient intact. Shape of `targets`.
        ref_logprobs: Log-probs under the reference of the KL term. Shape of `targets`. Given with
            `kl_coef=0` it enters the metrics only.
        kl_coef: Weight of the KL term, beta in the papers.
        kl: The estimator and its weighting, such as `RatioWeighted(K3())`.
        entropy_coef: Weight of the entropy bonus; below zero, of a penalty on entropy.
        importance_weights: Correction for the sampler. One per token or per sequence, as for
            `advantages`. Constants.
        temperature: Divides the logits: a number, or one per token. Treated as a constant.
        bias: The head's bias; with `shard`, this rank's part of it. Shape [V].
        softcap: Bound on the logits before the temperature (Gemma 2).
        logit_scale: Factor on the products before the cap (Cohere, Granite).
        shard: Which slice of the vocabulary `weight` is, of those that the ranks of a process group
            hold. Same results on every rank; see `VocabularyShard`.
        chunk_bytes: Bytes of logits, or of their exponentials, held at a time, at least one row's.
            None: 256 MiB on a CPU; on CUDA four times the weight's, 1.25 GiB at least and 2.5 at
            most.
        skip_zero_rows: Find rows that cannot have a gradient first, and leave them out. On a GPU
            the host waits for that; with False and no mask it never waits (CUDA graphs), unless a
            surrogate over sequences takes several chunks.
        cu_seqlens: Packed only: offsets of the sequences. Shape [B + 1].
        return_entropy: Put the entropy into the metrics also where `entropy_coef` is zero.
        all_metrics: Average the metrics over all counted tokens, which costs a forward of the rows
            left out; False: over the rows computed.

    Returns:
        The loss in fp32 (fp64 for fp64 inputs), a scalar whose gradient flows to hidden, weight and
        bias; the metrics of `policy_loss`; and log-probs and entropy of the rows computed.

    Raises:
        TypeError: A dtype is wrong, hidden, weight and bias differ in it, or `shard` is not
            a VocabularyShard.
        ValueError: Shapes do not fit, a number is out of range, `kl_coef` is negative or set
            without `ref_logprobs`, a target is outside the whole vocabulary on a row that counts (a
            device assertion for CUDA tensors), `weight` is not the slice that `shard` describes, or
            the ranks differ in the rows that count.

    Examples:
        >>> from igrpo_kernels import Clip, SequenceMean
        >>> hidden = torch.eye(3).view(1, 3, 3).requires_grad_()
        >>> targets = torch.tensor([[0, 1, 1]])
        >>> mask = torch.tensor([[1, 1, 0]])
        >>> out = linear_policy_loss(
        ...     hidden, torch.eye(2, 3), targets, torch.tensor([1.0]), mask,
        ...     surrogate=Clip(), aggregate=SequenceMean(),
        ... )
        >>> out.loss.backward()
        >>> hidden.grad
        tensor([[[-0.1345,  0.1345,  0.0000],
                 [ 0.1345, -0.1345,  0.0000],
                 [ 0.0000,  0.0000,  0.0000]]])
    """
    objective = TokenObjective.of(surrogate, aggregate, kl, kl_coef, entropy_coef, ref_logprobs)
    wants_entropy = return_entropy or entropy_coef != 0
    options = temperature, softcap, logit_scale, shard, chunk_bytes
    batch = HeadBatch.of(hidden, weight, bias, targets, mask, *options)
    inputs = TokenInputs.of(
        Sequences.of(batch.targets, batch.mask, cu_seqlens, name="targets"),
        batch.dtype,
        advantages,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        importance_weights=importance_weights,
        per_token_weights=surrogate.folds_importance_weights,
        legend="of targets",
    )
    if surrogate.scope != "batch":
        losses = RowLosses(objective, inputs, aggregate.weights(inputs.sequences, batch.dtype))
        how = wants_entropy, all_metrics, skip_zero_rows
        if not torch.compiler.is_compiling():
            fused = FusedLoss.of(batch, losses, *how)
            if fused.holds_sequences:
                return fused.loss(batch.hidden)
        elif can_carry(objective, batch.head, longest=targets.shape[-1]):
            return carry(batch, losses, *how)
    logprobs, entropy = score(batch, entropy=wants_entropy, skip_zero_rows=skip_zero_rows)
    result = average(objective, aggregate, inputs, logprobs, entropy)
    found = None if entropy is None else entropy.detach()
    return result._replace(logprobs=logprobs.detach(), entropy=found)
