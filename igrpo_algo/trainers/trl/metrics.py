"""What is logged about the two stages, from rewards and counts of all ranks."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...drafts.splice import TextSplice
from ...metrics import repeats_draft, stage_uplift, zero_variance_rate
from .drafts import DraftChoice, Refined


def count_rows(
    refined: Sequence[Refined],
    refinement_ids: Sequence[Sequence[int]],
    splice: TextSplice,
    tokenizer: Any,
    device: torch.device,
) -> Tensor:
    """Count what `stage_metrics` needs from each rank; the counts of ranks add up.

    `copy_rate` says when a refinement repeats its draft.

    Args:
        refined: The Stage-2 prompt of each row.
        refinement_ids: The token ids of each row's refinement.
        splice: What put the drafts into their prompts.
        tokenizer: What turns refinements into text.
        device: Where the counts go.

    Returns:
        Rows, rows with a draft, rows that repeat it, tokens of the drafts as they
        stand in prompts, and tokens cut off drafts. Shape [5], float32.
    """
    shown = [row for row in refined if row.draft is not None]
    copied = [
        repeats_draft(
            row.draft, str(tokenizer.decode(ids, skip_special_tokens=True)), strip=splice.strip
        )
        for row, ids in zip(refined, refinement_ids, strict=True)
        if row.draft is not None
    ]
    counts = [
        len(refined),
        len(shown),
        sum(copied),
        sum(row.length for row in shown),
        sum(row.cut for row in refined),
    ]
    return torch.tensor(counts, dtype=torch.float32, device=device)


def stage_metrics(
    draft_rewards: Tensor,
    refinement_rewards: Tensor,
    choice: DraftChoice,
    counts: Sequence[float],
) -> dict[str, float]:
    """Name the numbers to watch in a two-stage run.

    Args:
        draft_rewards: Training reward of each draft, NaN where unscored. Shape [P, N].
        refinement_rewards: Training reward of each refinement, likewise. Shape [P, G].
        choice: The chosen drafts.
        counts: The sum of `count_rows` over ranks.

    Returns:
        `draft_reward` and `best_draft_reward` (means; the latter of the selection score),
        `best_draft_right` (share of prompts), `uplift` (mean reward of Stage 2 less Stage 1),
        `draft_zero_std` and `refinement_zero_std` (shares of groups without variance), `copied`
        (share of refinements that repeat their draft), `draft_length` (tokens in the prompt),
        `draft_tokens_cut` and `plain_prompts` (mean and share, over all rows). NaN where nothing
        is left to average.
    """
    rows, shown, copied, tokens, cut = counts
    return {
        "draft_reward": draft_rewards.nanmean().item(),
        "best_draft_reward": choice.best.nanmean().item(),
        "best_draft_right": choice.right.float().mean().item(),
        "uplift": stage_uplift(draft_rewards, refinement_rewards).item(),
        "draft_zero_std": zero_variance_rate(draft_rewards).item(),
        "refinement_zero_std": zero_variance_rate(refinement_rewards).item(),
        "copied": copied / shown if shown else math.nan,
        "draft_length": tokens / shown if shown else math.nan,
        "draft_tokens_cut": cut / rows,
        "plain_prompts": 1 - shown / rows,
    }
