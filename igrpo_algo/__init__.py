"""iGRPO as pure functions (Hatamizadeh et al. 2026, arXiv:2602.09000).

Draw drafts, keep the best one, splice it into the prompt, train on the refinements. Each step is a
function here. Samplers live in `igrpo_algo.engines`, trainers in `igrpo_algo.trainers`, rewards in
`igrpo_algo.rewards`, and each is imported by name; this import loads nothing but torch.
"""

from igrpo_kernels.loss_from_logprobs import policy_loss

from .advantages.baselines import rloo
from .advantages.of_groups import center_by_group, standardize_by_group, whiten
from .batch import training_batch
from .drafts.budget import truncate_draft
from .drafts.rules import DraftRules, Fallback, Ties
from .drafts.select import select_best_draft, select_random_draft, select_worst_draft
from .drafts.splice import TextSplice, TokenSplice
from .drafts.text import DraftTemplate, splice_prompt
from .losses.igrpo import igrpo_loss
from .metrics import copy_rate, pass_at_k, stage_uplift, zero_variance_rate
from .rollouts.completions import Completion
from .rollouts.records import Rollouts
from .rollouts.sampling import Samples, sample_group
from .rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout
from .thinking import strip_thinking

__all__ = [
    "Completion",
    "DraftRules",
    "DraftTemplate",
    "Fallback",
    "Rollouts",
    "Samples",
    "TextSplice",
    "Ties",
    "TokenSplice",
    "center_by_group",
    "copy_rate",
    "igrpo_loss",
    "pass_at_k",
    "policy_loss",
    "rloo",
    "sample_group",
    "select_best_draft",
    "select_random_draft",
    "select_worst_draft",
    "splice_prompt",
    "stage_uplift",
    "standardize_by_group",
    "stream_two_stage_rollout",
    "strip_thinking",
    "training_batch",
    "truncate_draft",
    "two_stage_rollout",
    "whiten",
    "zero_variance_rate",
]
