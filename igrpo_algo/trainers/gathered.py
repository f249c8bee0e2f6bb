"""What ms-swift and Unsloth have in common: rewards of all ranks, and logs as in TRL."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..drafts.rules import DraftChoices, DraftRules
from ..metrics import stage_uplift, zero_variance_rate
from ..seeds import derive_seed


def choose_drafts(
    rules: DraftRules, rewards: Tensor, lengths_here: Sequence[int], seed: int, *step: int
) -> DraftChoices:
    """Choose a draft for each prompt, the same on every rank.

    Args:
        rules: How a draft is chosen.
        rewards: Of the drafts of all ranks. Shape [P, N].
        lengths_here: Tokens of each draft on this rank.
        seed: For random ties, random drafts and dropout.
        step: What tells this batch from the others.

    Returns:
        The choices, over the prompts of all ranks.
    """
    return rules.choose(
        rewards.cpu(),
        lengths=torch.tensor(gather_object(list(lengths_here))).view(rewards.shape),
        seeds=[derive_seed(seed, *step, prompt) for prompt in range(len(rewards))],
    )


def log_stages(metrics: dict[str, list[Any]], drafts: Tensor, refinements: Tensor) -> None:
    """Add how both stages did to a trainer's metrics.

    Args:
        metrics: Where the trainer keeps the values of each name.
        drafts: Rewards. Shape [P, N].
        refinements: Rewards. Shape [P, G].
    """
    metrics["igrpo/draft_reward"].append(drafts.nanmean().item())
    metrics["igrpo/uplift"].append(stage_uplift(drafts, refinements).item())
    metrics["igrpo/refinement_zero_std"].append(zero_variance_rate(refinements).item())
