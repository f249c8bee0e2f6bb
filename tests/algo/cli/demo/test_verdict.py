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
    {"arm": "igrpo", "step": 9, "zero_variance": 0.75, "copied_drafts": None},
    {"arm": "igrpo", "step": 10, "zero_variance": 0.75, "copied_drafts": 0.5},
]


def result(seed: int, right: list[int], refined: float = 0.25) -> dict:
    return {
        "seed": seed,
        "right": right,
        "accuracy": sum(right) / 8,
        "refined_accuracy": refined,
        "cpu_seconds": 10.0,
    }


def verdict(grpo: list[list[int]], igrpo: list[list[int]]) -> str:
    results = {
        "grpo": [result(seed, right) for seed, right in enumerate(grpo)],
        "igrpo": [result(seed, right) for seed, right in enumerate(igrpo)],
    }
    return write_verdict(summarize(PLAN, results, ROWS))


def test_difference_is_paired_by_seed() -> None:
    ours, theirs = [[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], [[0.5, 0.0], [1.0, 0.5], [0.0, -0.5]]
    assert difference(ours, theirs) == (0.25, 0.25, 0.25)


def test_difference_with_one_seed_is_paired_by_problem() -> None:
    ours, theirs = [[1.0, 0.5, 0.0]], [[0.5, 0.0, -0.5]]
    assert difference(ours, theirs) == (0.5, 0.5, 0.5)


def test_a_win() -> None:
    text = verdict([[0, 1, 0, 0], [1, 0, 0, 0]], [[2, 2, 2, 1], [2, 2, 1, 2]])
    assert "iGRPO, 4 + 4 did better than GRPO here: +75.0 points" in text


def test_a_loss() -> None:
    text = verdict([[2, 2, 2, 1], [2, 2, 1, 2]], [[0, 1, 0, 0], [1, 0, 0, 0]])
    assert "iGRPO, 4 + 4 did worse than GRPO here: -75.0 points" in text
    assert "better" not in text


def test_a_tie_within_noise() -> None:
    text = verdict([[2, 2, 0, 0], [2, 2, 2, 2]], [[2, 2, 2, 2], [2, 2, 0, 0]])
    # Differences +0.5 and -0.5: mean 0, half width 12.706 * 0.7071 / sqrt(2).
    assert (
        "iGRPO, 4 + 4 and GRPO cannot be told apart here: "
        "+0.0 points, 95 % interval -635.3 to +635.3 (over 2 seeds)." in text
    )
    assert "better" not in text
    assert "worse" not in text


def test_one_seed_says_that_others_may_differ() -> None:
    text = verdict([[0, 0, 1, 1]], [[2, 2, 2, 2]])
    assert "did better than GRPO here: +75.0 points" in text
    assert "over problems; other seeds may differ" in text


def test_the_numbers_behind_it_are_in_the_text() -> None:
    text = verdict([[2, 2, 2, 1], [2, 2, 1, 2]], [[0, 1, 0, 0], [1, 1, 0, 0]])
    first, grpo, grpo_late, igrpo, igrpo_late, _ = text.splitlines()
    assert first == (
        "Single-shot accuracy on 4 held-out problems after 1,280 completions per run, 2 seeds; "
        "12.5 % before training."
    )
    assert grpo == "  GRPO, 8: 87.5 % (seeds 87.5 to 87.5); draft, then refine: 25.0 %"
    assert igrpo.startswith("  iGRPO, 4 + 4: 18.8 % (seeds 12.5 to 25.0)")
    assert grpo_late == "    last fifth of training: 60.0 % of groups without variance"
    assert igrpo_late == (
        "    last fifth of training: 75.0 % of groups without variance, "
        "50.0 % of refinements copy their draft"
    )


def test_the_summary_counts_what_was_spent() -> None:
    results = {"grpo": [result(0, [1, 1, 1, 1])], "igrpo": [result(0, [2, 1, 1, 1])]}
    summary = summarize(PLAN, results, ROWS)
    assert summary["base_accuracy"] == 0.125
    assert summary["arms"]["grpo"]["completions"] == summary["arms"]["igrpo"]["completions"] == 1280
    assert summary["arms"]["igrpo"]["accuracy"] == {"mean": 0.625, "by_seed": [0.625]}
    assert summary["difference_to_grpo"]["igrpo"]["mean"] == pytest.approx(0.125)
