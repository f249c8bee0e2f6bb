"""Advantages relative to a group or to other baselines; `presets` has those of other trainers."""

from .baselines import best_over_runner_up, maxrl, opo, rloo, standardize_leave_one_out
from .of_groups import (
    center_by_group,
    center_by_group_scale_by_batch,
    gdpo,
    standardize_by_group,
    std_by_group,
    sum_rewards,
    whiten,
)

__all__ = [
    "best_over_runner_up",
    "center_by_group",
    "center_by_group_scale_by_batch",
    "gdpo",
    "maxrl",
    "opo",
    "rloo",
    "standardize_by_group",
    "standardize_leave_one_out",
    "std_by_group",
    "sum_rewards",
    "whiten",
]
