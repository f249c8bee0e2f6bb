"""The loss of iGRPO, corrections for another sampler, and completions that are too long."""

from .corrections import (
    entropy_threshold,
    geometric_importance_weights,
    high_entropy_mask,
    mask_weights,
    off_policy_sequence_mask,
    sequence_importance_weights,
    token_importance_weights,
    truncate_weights,
)
from .igrpo import igrpo_loss
from .overlong import mask_truncated_completions, overlong_penalty

__all__ = [
    "entropy_threshold",
    "geometric_importance_weights",
    "high_entropy_mask",
    "igrpo_loss",
    "mask_truncated_completions",
    "mask_weights",
    "off_policy_sequence_mask",
    "overlong_penalty",
    "sequence_importance_weights",
    "token_importance_weights",
    "truncate_weights",
]
