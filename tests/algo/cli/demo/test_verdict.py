"""The demo's verdict says what the numbers say, whichever way they go."""

import pytest

from igrpo_algo.cli.demo.runs import DemoConfig
from igrpo_algo.cli.demo.verdict import difference, summarize, write_verdict

PLAN = DemoConfig(steps=10, prompts_per_step=16, held_out=4, final_samples=2)


ROWS = [
    {"arm": "grpo", "step": 0, "accuracy": 0.125},
    {"arm": "grpo", "step": 8, "zero_variance": 0.9},
    {"arm": "grpo", "step": 9, "zero_variance": 0.5},
    {"arm": "grpo", "step": 10, "zero_variance": 0.7},
    {"arm": "grpo", "step": 10, "accuracy": 0.8},
    {"arm": "igrpo", "step": 0, "accuracy": 0.125},
    {"arm": "igrpo", "step": 9, "zero_variance": 0.75, "copy_rate": None},
    {"arm": "igrpo", "step": 10, "zero_variance": 0.75, "copy_rate": 0.5},
    {"arm": "both-worst", "step": 9, "zero_variance": 0.5, "copy_rate": 0.25},
]


def result(seed: int, right: list[int], refined: list[int]) -> dict:
    return {
        "seed": seed,
        "right": right,
        "refined_right": refined,
        "accuracy": sum(right) / 8,
        "refined_accuracy": sum(refined) / 8,
        "cpu_seconds": 10.0,
    }


NONE = [[0, 0, 0, 0], [0, 0, 0, 0]]
LOW, HIGH = [[0, 1, 0, 0], [1, 0, 0, 0]], [[2, 2, 2, 1], [2, 2, 1, 2]]
EVEN = [[1, 0, 1, 0], [1, 1, 0, 0]]
Counts = list[list[int]]


def summary_of(**arms: tuple[Counts, Counts]) -> dict:
    """Summarize arms, each given as its right answers by seed and problem, and refinements."""
    results = {
        arm.replace("_", "-"): [
            result(seed, *pair) for seed, pair in enumerate(zip(*counts, strict=True))
        ]
        for arm, counts in arms.items()
    }
    return summarize(PLAN, results, ROWS)


def first_line(**arms: tuple[Counts, Counts]) -> str:
    return write_verdict(summary_of(**arms)).splitlines()[0]


def test_difference_is_paired_by_seed() -> None:
    ours, theirs = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[0.5, 0.0], [1.0, 0.5], [0.0, -0.5]]
    assert difference(ours, theirs) == (0.25, 0.25, 0.25)


def test_difference_with_one_seed_is_paired_by_problem() -> None:
    ours, theirs = [[1.0, 0.5, 0.0]], [[0.5, 0.0, -0.5]]
    assert difference(ours, theirs) == (0.5, 0.5, 0.5)


def test_the_first_sentence_names_the_arm_that_is_ahead() -> None:
    assert first_line(grpo=(LOW, LOW), igrpo=(HIGH, HIGH)) == (
        "Here, train with iGRPO of the paper."
    )
    assert first_line(grpo=(HIGH, LOW), igrpo=(LOW, LOW), both_worst=(LOW, HIGH)) == (
        "Here, train with GRPO for single-shot answers, and with iGRPO on both stages with "
        "the worst draft where the model drafts and then refines."
    )


def test_the_first_sentence_names_the_arm_that_is_furthest_ahead() -> None:
    assert first_line(grpo=(NONE, NONE), igrpo=(LOW, HIGH), both_worst=(HIGH, LOW)) == (
        "Here, train with iGRPO on both stages with the worst draft for single-shot answers, "
        "and with iGRPO of the paper where the model drafts and then refines."
    )


@pytest.mark.parametrize("other", [(LOW, LOW), (HIGH, HIGH)])
def test_the_first_sentence_names_grpo_unless_another_is_ahead(
    other: tuple[Counts, Counts],
) -> None:
    assert first_line(grpo=(HIGH, HIGH), igrpo=other) == "Here, train with GRPO."


def test_a_difference_within_noise_is_open() -> None:
    noisy = ([[2, 2, 0, 0], [2, 2, 2, 2]], EVEN), ([[2, 2, 2, 2], [2, 2, 0, 0]], EVEN)
    text = write_verdict(summary_of(grpo=noisy[0], igrpo=noisy[1]))
    # Differences +0.5 and -0.5: mean 0, half width 12.706 * 0.7071 / sqrt(2).
    assert "single-shot +0.0 points (-635.3 to +635.3): open" in text
    assert "Difference to GRPO, with the 95 % interval over seeds:" in text
    assert text.startswith("Here, train with GRPO.")


def test_one_seed_says_that_others_may_differ() -> None:
    one = summary_of(grpo=([[0, 0, 1, 1]], [[1, 1, 1, 1]]), igrpo=([[2, 2, 2, 2]], [[1, 1, 1, 1]]))
    text = write_verdict(one)
    assert "single-shot +75.0 points" in text
    assert "over problems; other seeds may differ" in text


def test_the_numbers_behind_it_are_in_the_text() -> None:
    text = write_verdict(summary_of(grpo=(HIGH, LOW), igrpo=([[0, 1, 0, 0], [1, 1, 0, 0]], LOW)))
    _, _, first, grpo, grpo_late, igrpo, igrpo_late, _, gaps = text.splitlines()
    assert first == (
        "Accuracy on 4 held-out problems after 1,280 completions per run, 2 seeds; "
        "12.5 % before training."
    )
    assert grpo == (
        "  GRPO: single-shot 87.5 % (seeds 87.5 to 87.5); "
        "draft, then refine 12.5 % (seeds 12.5 to 12.5)"
    )
    assert igrpo.startswith("  iGRPO of the paper: single-shot 18.8 % (seeds 12.5 to 25.0)")
    assert grpo_late == "    last fifth of training: 60.0 % of groups without variance"
    assert igrpo_late == (
        "    last fifth of training: 75.0 % of groups without variance, "
        "50.0 % of refinements copy their draft"
    )
    assert gaps == (
        "  iGRPO of the paper: single-shot -68.8 points (-148.2 to +10.7): open; "
        "draft, then refine +0.0 points (+0.0 to +0.0): open"
    )


def test_the_summary_counts_what_was_spent() -> None:
    summary = summary_of(
        grpo=([[1, 1, 1, 1]], [[0, 0, 0, 1]]), igrpo=([[2, 1, 1, 1]], [[1, 1, 1, 1]])
    )
    assert summary["base_accuracy"] == 0.125
    assert summary["arms"]["grpo"]["completions"] == summary["arms"]["igrpo"]["completions"] == 1280
    assert summary["arms"]["igrpo"]["accuracy"] == {"mean": 0.625, "by_seed": [0.625]}
    gaps = summary["difference_to_grpo"]["igrpo"]
    assert gaps["accuracy"]["mean"] == pytest.approx(0.125)
    assert gaps["refined_accuracy"]["mean"] == pytest.approx(0.375)
