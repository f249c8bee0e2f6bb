"""Counts of rows and the metrics made of them, worked out by hand."""

import math

import pytest
import torch
from tiny_qwen import third_party

from igrpo_algo.drafts.rules import DraftChoices
from igrpo_algo.thinking import strip_thinking
from igrpo_algo.trainers.trl.metrics import count_rows, stage_metrics
from igrpo_algo.trainers.trl.stages import Refined

pytestmark = third_party

NONE = torch.tensor([False, False])
CHOICES = DraftChoices(
    torch.tensor([1, -1]), torch.tensor([3.0, math.nan]), NONE, NONE, NONE, ~NONE.flip(0) & NONE
)
CPU = torch.device("cpu")


def test_a_copy_is_of_the_draft_as_shown() -> None:
    shown = Refined("q [5 6]", "5 6", 2)
    texts = ["5 6", "<think>4</think>5 6", " 5 6 ", "5 7"]
    assert count_rows([shown] * 4, texts, strip_thinking, CPU)[2] == 3
    assert count_rows([shown] * 4, texts, None, CPU)[2] == 2


def test_plain_prompts_are_left_out_of_what_is_said_about_drafts() -> None:
    refined = [Refined("q [7 8]", "7 8", 2, 5)] * 2 + [Refined("p")] * 2
    counts = count_rows(refined, ["7 8", "7", "7 8", ""], None, CPU)
    assert counts.tolist() == [4, 2, 1, 4, 10]
    metrics = stage_metrics(
        torch.tensor([[1.0, 3.0], [math.nan, math.nan]]),
        torch.tensor([[5.0, 2.0], [0.0, 0.0]]),
        CHOICES,
        counts.tolist(),
        threshold=3.0,
    )
    assert math.isnan(metrics.pop("right_after_wrong_draft"))
    assert metrics == pytest.approx(
        {
            "draft_reward": 2.0,
            "best_draft_reward": 3.0,
            "best_draft_right": 1.0,  # of the one prompt that has a scored draft
            "uplift": 1.5,
            "draft_zero_std": 0.0,
            "refinement_zero_std": 0.5,
            "right_after_right_draft": 0.5,
            "copied": 0.5,
            "draft_length": 2.0,
            "draft_tokens_cut": 2.5,
            "plain_prompts": 0.5,
        },
        rel=1e-6,
    )


def test_the_best_of_infinitely_bad_drafts_is_no_number() -> None:
    rewards = torch.tensor([[-math.inf, math.nan], [1.0, -math.inf]])
    metrics = stage_metrics(rewards, rewards, CHOICES, [4, 0, 0, 0, 0], threshold=3.0)
    assert metrics["best_draft_reward"] == 1.0


def test_without_a_draft_there_is_nothing_to_copy() -> None:
    counts = count_rows([Refined("p")] * 2, ["1", "2"], None, CPU).tolist()
    metrics = stage_metrics(torch.zeros(2, 2), torch.zeros(2, 2), CHOICES, counts, threshold=1.0)
    assert math.isnan(metrics["copied"])
    assert math.isnan(metrics["draft_length"])
    assert metrics["plain_prompts"] == 1.0


def test_a_draft_that_is_not_shown_is_not_followed() -> None:
    plain = CHOICES._replace(plain=torch.tensor([True, True]))
    metrics = stage_metrics(
        torch.ones(2, 2), torch.ones(2, 2), plain, [4.0, 0.0, 0.0, 0.0, 0.0], threshold=1.0
    )
    assert math.isnan(metrics["right_after_right_draft"])
