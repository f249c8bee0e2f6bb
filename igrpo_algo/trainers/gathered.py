"""What ms-swift and Unsloth have in common: a batch whose groups straddle ranks, TRL's logs."""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from ..drafts.rules import DraftRules
from ..metrics import stage_uplift, zero_variance_rate
from ..rollouts.completions import Completion
from ..seeds import derive_seed
from .draft_layout import DraftLayout


def share_drafts(
    rules: DraftRules,
    rewards: Tensor,
    here: Sequence[Completion],
    layout: DraftLayout,
    seed: int,
    *step: int,
) -> dict[int, Completion]:
    """Choose a draft for each prompt, and bring it to every rank.

    Args:
        rules: How a draft is chosen.
        rewards: Of the drafts of all ranks. Shape [P, N].
        here: The drafts of this rank.
        layout: Whose they are.
        seed: For random ties, random drafts and dropout.
        step: What tells this batch from the others.

    Returns:
        The draft of each prompt of all ranks, none where it stays plain; the same on every rank.
    """
    lengths = gather_object([len(draft.token_ids) for draft in here])
    choices = rules.choose(
        rewards.cpu(),
        lengths=torch.tensor(lengths).view(rewards.shape),
        seeds=[derive_seed(seed, *step, prompt) for prompt in range(len(rewards))],
    )
    chosen = [(prompt, here[place]) for prompt, place in layout.chosen_here(choices).items()]
    return dict(gather_object(chosen))


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
