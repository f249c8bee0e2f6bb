"""Kernels for group-relative RL: tensors in, tensors out.

Log-probs of sampled tokens from logits or straight from hidden states, and the policy losses on top
of them, as plain torch for CPU tensors and as Triton kernels for CUDA tensors. Depends on torch
alone (and on triton where there is one), imports nothing else of this project, and works under
another name when the folder is copied into another package. What most users type is here; further
surrogates are in `surrogates`, ways to weight a KL in `kl`.
"""

from .aggregates import FixedLength, SequenceMean, Sum, TokenMean
from .clipped_losses import clipped_policy_loss
from .kl import K1, K2, K3, RatioWeighted
from .logprobs_from_hidden import linear_token_logprobs
from .logprobs_from_logits import token_logprobs
from .loss_from_hidden import linear_policy_loss
from .surrogates import Cispo, Clip, Reinforce, Sapo, SequenceClip
from .vocabulary_shard import VocabularyShard

__all__ = [
    "K1",
    "K2",
    "K3",
    "Cispo",
    "Clip",
    "FixedLength",
    "RatioWeighted",
    "Reinforce",
    "Sapo",
    "SequenceClip",
    "SequenceMean",
    "Sum",
    "TokenMean",
    "VocabularyShard",
    "clipped_policy_loss",
    "linear_policy_loss",
    "linear_token_logprobs",
    "token_logprobs",
]
