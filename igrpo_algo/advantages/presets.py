"""The advantages of other trainers, by name: each function equals the one that its name says.

They agree to 1e-6 on scored, finite rewards. Three departures, kept on purpose: NaN (unscored) is
always left out, where only TRL leaves it out itself; groups of equal rewards get exactly 0, where
the peers' rounding can leave noise of up to 1e-2 (std 7e-9 over an eps of 1e-6 or 1e-9); and what
divides by the group's mean (`skyrl_maxrl_advantages`) refuses negative rewards.

All take `rewards` and `groups` as `advantages.center_by_group` does, return float32 or float64 of
the same shape, detached, and raise what the functions they call raise. `lengths` is the number of
trained tokens of each sample, in the shape of `rewards`: peers that standardize over tokens weigh
each sample by it. They return one advantage per token; here it is one per sample, which every token
of the sample shares. Rewards of K kinds are [P, G, K] or [B, K].

Read from TRL 1.16.0; verl 0.9.0 (verl-project/verl 483b8a0, `core_algos.py`); OpenRLHF 0.11
(OpenRLHF/OpenRLHF 3c3be62, `experience_maker.py`); NeMo-RL of August 2026 (NVIDIA-NeMo/RL 7ea279a,
`advantage_estimator.py`); and SkyRL (NovaSky-AI/SkyRL a956457, `ppo_utils.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from igrpo_kernels.checks import check_shape

from .baselines import (
    best_over_runner_up,
    maxrl,
    opo,
    rloo,
    standardize_leave_one_out,
)
from .moments import GroupedRewards, to_scores, weighted_moments
from .of_groups import (
    center_by_group,
    center_by_group_scale_by_batch,
    check_several,
    gdpo,
    standardize_by_group,
    std_by_group,
    sum_rewards,
    whiten,
)

GroupIds = int | Tensor | None
RewardWeights = Sequence[float] | Tensor | None


def trl_grpo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """TRL's default: `scale_rewards="group"`, `multi_objective_aggregation="sum_then_normalize"`.

    ddof 1, eps 1e-4, group of one 0. Several rewards go through `sum_rewards` first.

    Examples:
        >>> trl_grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[ 1.4997, -0.4999, -0.4999, -0.4999]])
    """
    return standardize_by_group(rewards, groups, ddof=1, eps=1e-4)


def trl_batch_scaled_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """TRL with `scale_rewards="batch"`: group mean, deviation of all processes' rewards.

    ddof 1, eps 1e-4, group of one 0.
    """
    return center_by_group_scale_by_batch(rewards, groups, ddof=1, eps=1e-4)


def trl_unscaled_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """TRL with `scale_rewards="none"`, as Dr. GRPO wants it. Group of one 0."""
    return center_by_group(rewards, groups)


def trl_normalize_then_sum_advantages(
    rewards: Tensor, groups: GroupIds = None, weights: RewardWeights = None
) -> Tensor:
    """TRL with `multi_objective_aggregation="normalize_then_sum"` (GDPO), for K rewards.

    By group and reward, then over the batch: ddof 1 and eps 1e-4 both times.
    """
    total = gdpo(rewards, groups, weights=weights, ddof=1, eps=1e-4)
    scored = ~sum_rewards(rewards).isnan()
    return whiten(total, scored, ddof=1, eps=1e-4)


def trl_rloo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """TRL's `RLOOTrainer`, of rewards that hold its KL term, `normalize_advantages=False`.

    Group of one 0.
    """
    return rloo(rewards, groups)


def verl_grpo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """Verl's "grpo", `norm_adv_by_std_in_grpo=True`.

    ddof 1, eps 1e-6. A group of one gets its reward, r / (1 + 1e-6).

    Examples:
        >>> verl_grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[ 1.5000, -0.5000, -0.5000, -0.5000]])
    """
    standardized = standardize_by_group(rewards, groups, ddof=1, eps=1e-6)
    return _lone_kept(standardized, to_scores("rewards", rewards) / (1 + 1e-6), groups)


def verl_dr_grpo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """Verl's "grpo" with `norm_adv_by_std_in_grpo=False`. A group of one gets its reward."""
    return _lone_kept(center_by_group(rewards, groups), rewards, groups)


def verl_rloo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """Verl's "rloo". A group of one gets its reward (0 in "rloo_vectorized")."""
    return _lone_kept(rloo(rewards, groups), rewards, groups)


def verl_opo_advantages(rewards: Tensor, lengths: Tensor, groups: GroupIds = None) -> Tensor:
    """Verl's "opo": the baseline is weighted by length. A group of one gets its reward."""
    return _lone_kept(opo(rewards, _token_weights(lengths, rewards), groups), rewards, groups)


def verl_grpo_passk_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """Verl's "grpo_passk", `norm_adv_by_std_in_grpo=True`: the best gets its lead, in deviations.

    ddof 1, eps 1e-6. A group of one gets 0, where verl raises.

    Examples:
        >>> verl_grpo_passk_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[2.0000, 0.0000, 0.0000, 0.0000]])
    """
    return best_over_runner_up(rewards, groups) / (std_by_group(rewards, groups, ddof=1) + 1e-6)


def verl_gpg_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """Verl's "gpg": group mean, times B over the number of rewards that are not 0.

    A group of one gets its reward, times the same.
    """
    scores = to_scores("rewards", rewards)
    factor = (~scores.isnan()).sum() / scores.nan_to_num(0.0).count_nonzero().clamp(min=1)
    return verl_dr_grpo_advantages(scores, groups) * factor


def verl_gdpo_advantages(
    rewards: Tensor, lengths: Tensor, groups: GroupIds = None, weights: RewardWeights = None
) -> Tensor:
    """Verl's "gdpo", for K rewards: "grpo" of each, weighted and summed, then over all tokens.

    By group: ddof 1, eps 1e-6, a group of one keeps its reward. Over tokens: ddof 1, 1e-8 added to
    the variance.
    """
    scores, _ = check_several(rewards, weights)
    parts = [verl_grpo_advantages(r, groups) for r in scores.unbind(-1)]
    total = sum_rewards(torch.stack(parts, -1), weights)
    return _verl_whiten(total, lengths, sum_rewards(scores))


def verl_reinforce_plus_plus_advantages(rewards: Tensor, lengths: Tensor) -> Tensor:
    """Verl's "reinforce_plus_plus" with gamma 1: no groups, standardized over all tokens.

    ddof 1, 1e-8 added to the variance.
    """
    scores = to_scores("rewards", rewards)
    return _verl_whiten(scores, lengths, scores)


def verl_reinforce_plus_plus_baseline_advantages(
    rewards: Tensor, lengths: Tensor, groups: GroupIds = None
) -> Tensor:
    """Verl's "reinforce_plus_plus_baseline": group mean, then standardized over all tokens.

    A group of one enters with its reward. ddof 1, 1e-8 added to the variance.
    """
    return _verl_whiten(verl_dr_grpo_advantages(rewards, groups), lengths, rewards)


def openrlhf_group_norm_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """OpenRLHF's "group_norm": ddof 1, eps 1e-9. Group of one 0, where OpenRLHF gives NaN."""
    return standardize_by_group(rewards, groups, ddof=1, eps=1e-9)


def openrlhf_dr_grpo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """OpenRLHF's "dr_grpo": minus the group's mean. Group of one 0."""
    return center_by_group(rewards, groups)


def openrlhf_rloo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """OpenRLHF's "rloo". Group of one 0, where OpenRLHF divides by zero."""
    return rloo(rewards, groups)


def openrlhf_reinforce_baseline_advantages(
    rewards: Tensor, lengths: Tensor, groups: GroupIds = None
) -> Tensor:
    """OpenRLHF's "reinforce_baseline", its KL in the loss: group mean, then over all tokens.

    ddof 0, variance at least 1e-8. Group of one 0 before the second step.
    """
    return _floored_whiten(center_by_group(rewards, groups), lengths, rewards)


def nemo_rl_grpo_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """NeMo-RL's default: mean and deviation of the others, undivided where that deviation is 0.

    ddof 1, eps 1e-6, group of one 0. With `use_leave_one_out_baseline=False` NeMo-RL is
    `standardize_by_group(ddof=1, eps=1e-6)`.

    Examples:
        >>> nemo_rl_grpo_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
        tensor([[ 1.0000, -0.5773, -0.5773, -0.5773]])
    """
    return standardize_leave_one_out(rewards, groups, ddof=1, eps=1e-6)


def nemo_rl_gdpo_advantages(
    rewards: Tensor, groups: GroupIds = None, weights: RewardWeights = None
) -> Tensor:
    """NeMo-RL's "gdpo", for K rewards: its default of each, weighted and summed, then over samples.

    Over samples: ddof 1, eps 0.
    """
    scores, _ = check_several(rewards, weights)
    parts = [nemo_rl_grpo_advantages(r, groups) for r in scores.unbind(-1)]
    total = sum_rewards(torch.stack(parts, -1), weights)
    return whiten(total, ~sum_rewards(scores).isnan(), ddof=1, eps=0.0)


def nemo_rl_reinforce_plus_plus_advantages(
    rewards: Tensor, lengths: Tensor, groups: GroupIds = None
) -> Tensor:
    """NeMo-RL's "reinforce_plus_plus", `minus_baseline=True`, no KL: group mean, then tokens.

    ddof 0, variance at least 1e-8. Group of one 0 before the second step.
    """
    return _floored_whiten(center_by_group(rewards, groups), lengths, rewards)


def skyrl_maxrl_advantages(rewards: Tensor, groups: GroupIds = None) -> Tensor:
    """SkyRL's "maxrl": over the group's mean, eps 1e-6. A group of one gets its reward."""
    return _lone_kept(maxrl(rewards, groups, eps=1e-6), rewards, groups)


def _lone_kept(advantages: Tensor, rewards: Tensor, groups: GroupIds) -> Tensor:
    """Replace the advantage of a group's only scored reward, 0, by that of `rewards`."""
    grouped = GroupedRewards.of(rewards, groups)
    kept = torch.where(grouped.count == 1, grouped.rewards, 0.0)
    return advantages + grouped.restore(kept)


def _verl_whiten(values: Tensor, lengths: Tensor, rewards: Tensor) -> Tensor:
    centered, variance = weighted_moments(values, _token_weights(lengths, rewards), ddof=1)
    return centered * (variance + 1e-8).rsqrt()


def _floored_whiten(values: Tensor, lengths: Tensor, rewards: Tensor) -> Tensor:
    centered, variance = weighted_moments(values, _token_weights(lengths, rewards), ddof=0)
    return centered * variance.clamp(min=1e-8).rsqrt()


def _token_weights(lengths: Tensor, rewards: Tensor) -> Tensor:
    """Weight each sample by its tokens, and by 0 where its reward is unscored."""
    scores = to_scores("rewards", rewards)
    weights = check_shape("lengths", to_scores("lengths", lengths), scores.shape, "of rewards")
    return weights.to(scores.dtype).where(~scores.isnan(), 0.0)
