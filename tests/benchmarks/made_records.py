"""Records of made-up runs, to compare and to write pages of."""

from typing import Any


def record(sampled: float, refined: float, **fields: Any) -> dict[str, Any]:
    """A finished run that rose from .2 in a line, at 10 completions per CPU second."""

    def point(step: int, share: float) -> dict[str, Any]:
        return {
            "step": step,
            "completions": 100.0 * step,
            "sampled_tokens": 600.0 * step,
            "trained_tokens": 300.0 * step,
            "seconds": 20.0 * step,
            "cpu_seconds": 10.0 * step,
            "sampled": 0.2 + share * (sampled - 0.2),
            "refined": [0.2 + share * (refined - 0.2)],
            "entropy": 1.0 - share / 2,
        }

    end = {
        "refined": [refined, refined + 0.01],
        "greedy": sampled,
        "pass_at_k": {"1": sampled, "4": 0.9},
        "after_right": 0.95,
        "after_wrong": 0.12,
        "copy_rate": 0.5,
        "length": 6.0,
    }
    step = {
        "step": 5,
        "reward": 0.3,
        "copy_rate": 0.4,
        "zero_variance": 0.6,
        "draft_zero_variance": 0.3,
        "uplift": 0.05,
    }
    made = {
        "status": "finished",
        "machine": {"device": "x86_64", "threads": 1, "torch": "2.13", "sampler": "Made"},
        "curve": [point(0, 0.0), point(5, 0.5)],
        "steps": [step],
        "warnings": [],
        "final": point(10, 1.0) | end,
    }
    return made | fields


def by_arm(**arms: list[tuple[float, float]]) -> dict[str, dict[int, Any]]:
    """Records by arm and seed, from pairs of single-shot and refined accuracy."""
    return {
        arm.replace("_", "-"): {seed: record(*pair) for seed, pair in enumerate(pairs)}
        for arm, pairs in arms.items()
    }
