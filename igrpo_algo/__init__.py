"""iGRPO as pure functions (Hatamizadeh et al. 2026, arXiv:2602.09000).

Draw drafts, keep the best one, splice it into the prompt, train on the refinements. Each step is a
function here. Samplers live in `igrpo_algo.engines`, trainers in `igrpo_algo.trainers`, rewards in
`igrpo_algo.rewards`, and each is imported by name; this import loads nothing but torch and einops.
"""

from igrpo_kernels import (
    K1,
    K2,
    K3,
    Cispo,
    Clip,
    FixedLength,
    PolicyLoss,
    RatioWeighted,
    Reinforce,
    Sapo,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
    policy_loss,
)

from .advantages import (
    center_by_group,
    center_by_group_scale_by_batch,
    standardize_apart,
    standardize_by_group,
    sum_rewards,
    whiten,
)
from .baselines import (
    best_over_runner_up,
    center_and_divide_by_mean,
    center_by_weighted_mean,
    leave_one_out,
    standardize_leave_one_out,
)
from .completions import Completion
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
from .drafts import (
    BestDraft,
    random_ties,
    select_best_draft,
    select_random_draft,
    select_worst_draft,
    shortest_first,
    truncate_draft,
)
from .lengths import drop_truncated, overlong_penalty
from .losses import igrpo_loss
from .metrics import (
    copied_share,
    draft_success_share,
    near_copied_share,
    pass_at_k,
    stage_uplift,
    zero_variance_share,
)
from .progress import RolloutProgress, show_live
from .prompts import CONCATENATION, DEFAULT_TEMPLATE, DraftTemplate, splice_prompt, strip_thinking
from .rollouts import Rollouts
from .sampling import Sampler, Samples, sample_group
from .shared_prompt import SharedPromptRow, pack_shared_prompt
from .single_flight import SingleFlight
from .splicing import TextSplice, TokenSplice
from .timeline import plot_rollout_timeline
from .two_stage import Fallback, stream_two_stage_rollout, two_stage_rollout

__all__ = [
    "CONCATENATION",
    "DEFAULT_TEMPLATE",
    "K1",
    "K2",
    "K3",
    "BestDraft",
    "Cispo",
    "Clip",
    "Completion",
    "DraftTemplate",
    "Fallback",
    "FixedLength",
    "PolicyLoss",
    "RatioWeighted",
    "Reinforce",
    "RolloutProgress",
    "Rollouts",
    "Sampler",
    "Samples",
    "Sapo",
    "SequenceClip",
    "SequenceMean",
    "SharedPromptRow",
    "SingleFlight",
    "Sum",
    "TextSplice",
    "TokenMean",
    "TokenSplice",
    "best_over_runner_up",
    "center_and_divide_by_mean",
    "center_by_group",
    "center_by_group_scale_by_batch",
    "center_by_weighted_mean",
    "copied_share",
    "draft_success_share",
    "drop_truncated",
    "entropy_threshold",
    "geometric_importance_weights",
    "high_entropy_mask",
    "igrpo_loss",
    "leave_one_out",
    "mask_weights",
    "near_copied_share",
    "off_policy_sequence_mask",
    "overlong_penalty",
    "pack_shared_prompt",
    "pass_at_k",
    "plot_rollout_timeline",
    "policy_loss",
    "random_ties",
    "sample_group",
    "select_best_draft",
    "select_random_draft",
    "select_worst_draft",
    "sequence_importance_weights",
    "shortest_first",
    "show_live",
    "splice_prompt",
    "stage_uplift",
    "standardize_apart",
    "standardize_by_group",
    "standardize_leave_one_out",
    "stream_two_stage_rollout",
    "strip_thinking",
    "sum_rewards",
    "token_importance_weights",
    "truncate_draft",
    "truncate_weights",
    "two_stage_rollout",
    "whiten",
    "zero_variance_share",
]
