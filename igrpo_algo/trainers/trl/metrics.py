"""What is logged about the two stages, from rewards and counts of all ranks."""

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...drafts.rules import DraftChoices
from ...metrics import (
    accuracy_after_draft,
    draft_success_rate,
    repeats_draft,
    stage_uplift,
    zero_variance_rate,
)
from .stages import Refined


def count_rows(
    refined: Sequence[Refined],
    texts: Sequence[str],
    strip: Callable[[str], str] | None,
    device: torch.device,
) -> Tensor:
    """Count what `stage_metrics` needs from each rank; the counts of ranks add up.

    `copy_rate` says when a refinement repeats its draft.

    Args:
        refined: The Stage-2 prompt of each row.
        texts: The refinement of each row, without special tokens.
        strip: What takes the thinking out of drafts, or None.
        device: Where the counts go.

    Returns:
        Rows, rows with a draft, rows that repeat it, tokens of the drafts as they stand in
        prompts, and tokens cut off drafts. Shape [5], float32.
    """
    shown = [(row, text) for row, text in zip(refined, texts, strict=True) if row.draft]
    counts = [
        len(refined),
        len(shown),
        sum(repeats_draft(row.draft, text, strip=strip) for row, text in shown),
        sum(row.length for row, _ in shown),
        sum(row.cut for row in refined),
    ]
    return torch.tensor(counts, dtype=torch.float32, device=device)


def stage_metrics(
    draft_rewards: Tensor,
    refinement_rewards: Tensor,
    choices: DraftChoices,
    counts: Sequence[float],
    *,
    threshold: float,
) -> dict[str, Any]:
    """Name the numbers to watch in a two-stage run.

    Args:
        draft_rewards: Training reward of each draft, NaN where unscored. Shape [P, N].
        refinement_rewards: Training reward of each refinement, likewise. Shape [P, G].
        choices: The chosen drafts.
        counts: The sum of `count_rows` over ranks.
        threshold: The reward from which a completion counts as right.

    Returns:
        `draft_reward` and `best_draft_reward` (means), `best_draft_right` (share of prompts),
        `uplift` (mean reward of Stage 2 less Stage 1), `draft_zero_std` and `refinement_zero_std`
        (shares of groups without variance), `right_after_right_draft` and
        `right_after_wrong_draft` (shares of refinements), `copied` (share of refinements that
        repeat their draft), `draft_length` (tokens in the prompt), `draft_tokens_cut` and
        `plain_prompts` (mean and share, over all rows). NaN where nothing is left to average.
    """
    rows, shown, copied, tokens, cut = counts
    of_shown = choices.reward.masked_fill(choices.plain, torch.nan)
    after_right, after_wrong = accuracy_after_draft(
        refinement_rewards, of_shown, threshold=threshold
    )
    best = draft_rewards.masked_fill(draft_rewards.isnan(), -torch.inf).amax(-1)
    metrics = {
        "draft_reward": draft_rewards.nanmean(),
        "best_draft_reward": best.where(~best.isinf(), torch.nan).nanmean(),
        "best_draft_right": draft_success_rate(draft_rewards, threshold=threshold),
        "uplift": stage_uplift(draft_rewards, refinement_rewards),
        "draft_zero_std": zero_variance_rate(draft_rewards),
        "refinement_zero_std": zero_variance_rate(refinement_rewards),
        "right_after_right_draft": after_right,
        "right_after_wrong_draft": after_wrong,
    }
    return {name: value.item() for name, value in metrics.items()} | {
        "copied": copied / shown if shown else math.nan,
        "draft_length": tokens / shown if shown else math.nan,
        "draft_tokens_cut": cut / rows,
        "plain_prompts": 1 - shown / rows,
    }


def mean_over_rounds(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average the metrics of a batch's rounds, NaN left out; NaN where there is nothing else.

    Examples:
        >>> mean_over_rounds([{"copied": 0.5, "uplift": 1.0}, {"copied": math.nan, "uplift": 0.0}])
        {'copied': 0.5, 'uplift': 0.5}
    """
    known = {name: [r[name] for r in rounds if not math.isnan(r[name])] for name in rounds[0]}
    return {name: fmean(values) if values else math.nan for name, values in known.items()}
