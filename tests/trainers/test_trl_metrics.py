"""Counts of rows and the metrics made of them, worked out by hand."""

import math

import pytest
import torch
from tiny_qwen import third_party

from igrpo_algo.trainers.trl_drafts import DraftChoice, Refined
from igrpo_algo.trainers.trl_metrics import count_rows, stage_metrics

pytestmark = third_party

NONE = torch.tensor([False, False])
CHOICE = DraftChoice(
    torch.tensor([1, -1]), torch.tensor([3.0, math.nan]), torch.tensor([True, False]), NONE, NONE
)


def test_plain_prompts_are_left_out_of_what_is_said_about_drafts() -> None:
    refined = [Refined("q [d]", "d", [7, 8], 2, 5)] * 2 + [Refined("p")] * 2
    counts = count_rows(refined, [[7, 8], [7], [7, 8], []], torch.device("cpu"))
    assert counts.tolist() == [4, 2, 1, 4, 10]
    metrics = stage_metrics(
        torch.tensor([[1.0, 3.0], [math.nan, math.nan]]),
        torch.tensor([[5.0, 5.0], [0.0, 1.0]]),
        CHOICE,
        counts.tolist(),
    )
    assert metrics == pytest.approx(
        {
            "draft_reward": 2.0,
            "best_draft_reward": 3.0,
            "best_draft_right": 0.5,
            "uplift": 3.0,
            "draft_zero_std": 0.0,
            "refinement_zero_std": 0.5,
            "copied": 0.5,
            "draft_length": 2.0,
            "draft_tokens_cut": 2.5,
            "plain_prompts": 0.5,
        },
        rel=1e-6,
    )


def test_without_a_draft_there_is_nothing_to_copy() -> None:
    counts = count_rows([Refined("p")] * 2, [[1], [2]], torch.device("cpu")).tolist()
    metrics = stage_metrics(torch.zeros(2, 2), torch.zeros(2, 2), CHOICE, counts)
    assert math.isnan(metrics["copied"])
    assert math.isnan(metrics["draft_length"])
    assert metrics["plain_prompts"] == 1.0
