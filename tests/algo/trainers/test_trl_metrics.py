"""Counts of rows and the metrics made of them, worked out by hand."""

import math

import pytest
import torch
from tiny_qwen import third_party

from igrpo_algo.drafts.splice import DEFAULT_SPLICE, TextSplice
from igrpo_algo.trainers.trl.drafts import DraftChoice, Refined
from igrpo_algo.trainers.trl.metrics import count_rows, stage_metrics

pytestmark = third_party

NONE = torch.tensor([False, False])
CHOICE = DraftChoice(
    torch.tensor([1, -1]), torch.tensor([3.0, math.nan]), torch.tensor([True, False]), NONE, NONE
)

WORDS = {0: "<eos>", 1: "<think>", 2: "</think>"}


class Numbers:
    """A tokenizer to which a token says its own number, and 0 ends a text."""

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return " ".join(WORDS.get(token, str(token)) for token in ids if token)


def counted(
    refined: list[Refined], ids: list[list[int]], splice: TextSplice = DEFAULT_SPLICE
) -> torch.Tensor:
    return count_rows(refined, ids, splice, Numbers(), torch.device("cpu"))


def test_a_copy_is_of_the_draft_as_shown() -> None:
    cut_draft = Refined("q [5 6]", "5 6", [5, 6], 2)
    with_thinking = Refined("q [5 6]", "5 6", [1, 9, 2, 5, 6, 0], 2)
    tail = Refined("q [5 6]", " 5 6", [3, 4, 5, 6, 0], 2, 2)
    for shown in (cut_draft, with_thinking, tail):
        assert counted([shown] * 4, [[5, 6, 0], [1, 4, 2, 5, 6, 0], [5, 6], [5, 7, 0]])[2] == 3
    whole = TextSplice(strip=None)
    assert counted([cut_draft] * 2, [[1, 4, 2, 5, 6, 0], [5, 6, 0]], whole)[2] == 1


def test_plain_prompts_are_left_out_of_what_is_said_about_drafts() -> None:
    refined = [Refined("q [7 8]", "7 8", [7, 8], 2, 5)] * 2 + [Refined("p")] * 2
    counts = counted(refined, [[7, 8], [7], [7, 8], []])
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
    counts = counted([Refined("p")] * 2, [[1], [2]]).tolist()
    metrics = stage_metrics(torch.zeros(2, 2), torch.zeros(2, 2), CHOICE, counts)
    assert math.isnan(metrics["copied"])
    assert math.isnan(metrics["draft_length"])
    assert metrics["plain_prompts"] == 1.0
