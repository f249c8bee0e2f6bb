"""TRL's options about advantages as functions of `igrpo_algo.advantages`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from igrpo_kernels.checks import describe

from ...advantages.of_groups import sum_rewards
from ...advantages.presets import (
    trl_batch_scaled_advantages,
    trl_grpo_advantages,
    trl_normalize_then_sum_advantages,
    trl_unscaled_advantages,
)

if TYPE_CHECKING:
    from .config import IGRPOConfig

Advantage = Callable[[Tensor], Tensor]
"""From rewards [P, G], NaN where unscored, to advantages [P, G]."""

BY_SCALE: dict[str, Advantage] = {
    "group": trl_grpo_advantages,
    "batch": trl_batch_scaled_advantages,
    "none": trl_unscaled_advantages,
}
BY_ORDER = ("sum_then_normalize", "normalize_then_sum")


def check_advantage(args: "IGRPOConfig", advantage: Advantage | None) -> None:
    """Raise ValueError if an option would have no effect beside an `advantage`, or is unknown."""
    idle = args.changed("scale_rewards", "multi_objective_aggregation")
    if advantage is not None and idle:
        raise ValueError(f"{', '.join(idle)} would have no effect beside an advantage")
    if args.multi_objective_aggregation == "normalize_then_sum" and args.changed("scale_rewards"):
        raise ValueError(
            "scale_rewards would have no effect with multi_objective_aggregation="
            "'normalize_then_sum', which scales each reward by its group and their sum by the batch"
        )
    for name, known in (("scale_rewards", BY_SCALE), ("multi_objective_aggregation", BY_ORDER)):
        if getattr(args, name) not in known:
            raise ValueError(
                f"{name} must be one of {', '.join(known)}, got {getattr(args, name)!r}"
            )


def advantages_of(
    rewards_per_func: Tensor,
    group: int,
    weights: Tensor,
    args: "IGRPOConfig",
    advantage: Advantage | None = None,
) -> Tensor:
    """Turn the rewards of a stage into advantages.

    Args:
        rewards_per_func: Rewards of all ranks, NaN where a function had none. Shape [P * G, K].
        group: G.
        weights: Weight of each reward function. Shape [K].
        args: Where `advantage` is None, `scale_rewards` and `multi_objective_aggregation`.
        advantage: From the weighted sums [P, G] to advantages.

    Returns:
        Advantages, 0 where unscored. Shape [P * G], float32.

    Raises:
        ValueError: `advantage` returned another shape, or a value that is not finite.
    """
    rewards = rewards_per_func.view(-1, group, rewards_per_func.shape[1])
    weights = weights.to(rewards.device)
    if advantage is None and args.multi_objective_aggregation == "normalize_then_sum":
        return trl_normalize_then_sum_advantages(rewards, weights=weights).flatten()
    found = (advantage or BY_SCALE[args.scale_rewards])(sum_rewards(rewards, weights))
    if found.shape != rewards.shape[:2] or not torch.isfinite(found).all():
        raise ValueError(
            f"advantage must return finite values of shape [P, G] = {list(rewards.shape[:2])}, "
            f"got {describe(found)}"
        )
    return found.flatten().float()
