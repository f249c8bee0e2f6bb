"""What the finished runs say, in numbers and in words, whichever way it goes."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..intervals import Interval, mean_interval
from .runs import ARMS, DemoConfig


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Difference of two arms' accuracy, paired by seed, or by problem where there is one seed.

    Args:
        ours: Share of right answers to each held-out problem, one list per seed.
        theirs: The same of the other arm; seeds and problems in the same order.
    """
    if len(ours) == 1:
        ours, theirs = ([[value] for value in values] for (values,) in (ours, theirs))
    pairs = zip(map(fmean, ours), map(fmean, theirs), strict=True)
    return mean_interval([mine - other for mine, other in pairs])


def summarize(
    config: DemoConfig,
    results: Mapping[str, Sequence[Mapping[str, Any]]],
    rows: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Collect the numbers behind the verdict.

    Args:
        config: The settings of all runs.
        results: The finished runs of each arm, ordered by seed.
        rows: The metrics of these runs.
    """
    arms = {}
    for arm, runs in results.items():
        arms[arm] = {
            "label": ARMS[arm].label,
            "completions": config.steps * config.prompts_per_step * ARMS[arm].completions,
            "accuracy": _spread([run["accuracy"] for run in runs]),
            "refined_accuracy": _spread([run["refined_accuracy"] for run in runs]),
            "late_zero_variance": late_mean(config, rows, arm, "zero_variance"),
            "late_copied_drafts": late_mean(config, rows, arm, "copied_drafts"),
            "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        }
    differences = {
        arm: difference(
            [_shares(run, config) for run in runs],
            [_shares(run, config) for run in results["grpo"]],
        )._asdict()
        for arm, runs in results.items()
        if arm != "grpo"
    }
    return {
        "seeds": [run["seed"] for run in next(iter(results.values()))],
        "held_out": config.held_out,
        "answers_per_problem": config.final_samples,
        "base_accuracy": next(row["accuracy"] for row in rows if row["step"] == 0),
        "arms": arms,
        "difference_to_grpo": differences,
    }


def late_mean(
    config: DemoConfig, rows: Sequence[Mapping[str, Any]], arm: str, metric: str
) -> float | None:
    """Mean of a training metric over the last fifth of the steps, or None where it has no rows."""
    late = [
        row[metric]
        for row in rows
        if row["arm"] == arm and row["step"] > 0.8 * config.steps and row.get(metric) is not None
    ]
    return fmean(late) if late else None


def _shares(run: Mapping[str, Any], config: DemoConfig) -> list[float]:
    return [right / config.final_samples for right in run["right"]]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "by_seed": list(values)}


def write_verdict(summary: Mapping[str, Any]) -> str:
    """Say in plain words what the numbers show."""
    seeds = len(summary["seeds"])
    completions = next(iter(summary["arms"].values()))["completions"]
    lines = [
        f"Single-shot accuracy on {summary['held_out']:,} held-out problems after {completions:,} "
        f"completions per run, {_count(seeds, 'seed')}; {_percent(summary['base_accuracy'])} "
        "before training."
    ]
    for arm in summary["arms"].values():
        lines.append(
            f"  {arm['label']}: {_percent(arm['accuracy']['mean'])}"
            f"{_range(arm['accuracy']['by_seed'])}; draft, then refine: "
            f"{_percent(arm['refined_accuracy']['mean'])}"
        )
        lines.append(f"    {_late(arm)}")
    for name, interval in summary["difference_to_grpo"].items():
        label = summary["arms"][name]["label"]
        lines.append(_judge(label, Interval(**interval), seeds))
    return "\n".join(lines)


def _judge(label: str, gap: Interval, seeds: int) -> str:
    numbers = (
        f"{100 * gap.mean:+.1f} points, 95 % interval {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
    )
    basis = f"over {seeds} seeds" if seeds > 1 else "over problems; other seeds may differ"
    if not gap.excludes_zero:
        return f"{label} and GRPO cannot be told apart here: {numbers} ({basis})."
    word = "better" if gap.mean > 0 else "worse"
    return f"{label} did {word} than GRPO here: {numbers} ({basis})."


def _late(arm: Mapping[str, Any]) -> str:
    text = (
        f"last fifth of training: {_percent(arm['late_zero_variance'])} of groups without variance"
    )
    if arm["late_copied_drafts"] is None:
        return text
    return f"{text}, {_percent(arm['late_copied_drafts'])} of refinements copy their draft"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _range(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    return f" (seeds {100 * min(values):.1f} to {100 * max(values):.1f})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
