"""The result of the finished runs, in numbers and in words."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ..intervals import Interval, mean_interval
from .runs import ARMS, DemoConfig

COUNTS = {"accuracy": "right", "refined_accuracy": "refined_right"}
"""Metrics of a result, and where it counts the right answers to each problem."""
PLACES = {"accuracy": "single-shot", "refined_accuracy": "draft, then refine"}


def difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> Interval:
    """Difference of two arms' accuracies, paired by seed, or by problem where there is one seed.

    Args:
        ours: Rate of right answers to each held-out problem, one list per seed.
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
        results: The finished runs of each arm, ordered by seed; GRPO's among them.
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
            "late_copy_rate": late_mean(config, rows, arm, "copy_rate"),
            "cpu_seconds": sum(run["cpu_seconds"] for run in runs),
        }
    differences = {
        arm: {
            metric: difference(
                [_rates(run[right], config) for run in runs],
                [_rates(run[right], config) for run in results["grpo"]],
            )._asdict()
            for metric, right in COUNTS.items()
        }
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


def _rates(right: Sequence[int], config: DemoConfig) -> list[float]:
    return [count / config.final_samples for count in right]


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": fmean(values), "by_seed": list(values)}


def standing(gap: Mapping[str, float]) -> str:
    """Say whether an interval of differences is above zero, below it, or open: on both sides.

    Examples:
        >>> standing({"mean": 0.02, "low": -0.01, "high": 0.05})
        'open'
    """
    if not Interval(**gap).excludes_zero:
        return "open"
    return "ahead" if gap["mean"] > 0 else "behind"


def takeaway(summary: Mapping[str, Any]) -> str:
    """Say in one sentence what to train with: GRPO, unless a form of iGRPO is ahead of it."""
    single_shot, refined = (_choose(summary, metric) for metric in COUNTS)
    if single_shot == refined:
        return f"Here, train with {single_shot}."
    return (
        f"Here, train with {single_shot} for single-shot answers, "
        f"and with {refined} where the model drafts and then refines."
    )


def _choose(summary: Mapping[str, Any], metric: str) -> str:
    gaps = {arm: by_metric[metric] for arm, by_metric in summary["difference_to_grpo"].items()}
    ahead = [arm for arm, gap in gaps.items() if standing(gap) == "ahead"]
    arm = max(ahead, key=lambda arm: gaps[arm]["mean"], default="grpo")
    label: str = summary["arms"][arm]["label"]
    return label


def write_verdict(summary: Mapping[str, Any]) -> str:
    """Say in plain words what the numbers show, what to train with first."""
    seeds = len(summary["seeds"])
    completions = next(iter(summary["arms"].values()))["completions"]
    lines = [
        takeaway(summary),
        "",
        f"Accuracy on {summary['held_out']:,} held-out problems after {completions:,} completions "
        f"per run, {_count(seeds, 'seed')}; {_percent(summary['base_accuracy'])} before training.",
    ]
    for arm in summary["arms"].values():
        lines.append(
            f"  {arm['label']}: single-shot {_percent(arm['accuracy']['mean'])}"
            f"{_range(arm['accuracy']['by_seed'])}; draft, then refine "
            f"{_percent(arm['refined_accuracy']['mean'])}{_range(arm['refined_accuracy']['by_seed'])}"
        )
        lines.append(f"    {_late(arm)}")
    basis = "over seeds" if seeds > 1 else "over problems; other seeds may differ"
    lines.append(f"Difference to GRPO, with the 95 % interval {basis}:")
    for name, gaps in summary["difference_to_grpo"].items():
        told = "; ".join(f"{PLACES[metric]} {_points(gap)}" for metric, gap in gaps.items())
        lines.append(f"  {summary['arms'][name]['label']}: {told}")
    return "\n".join(lines)


def _points(gap: Mapping[str, float]) -> str:
    mean, low, high = (f"{100 * gap[key]:+.1f}" for key in ("mean", "low", "high"))
    return f"{mean} points ({low} to {high}): {standing(gap)}"


def _late(arm: Mapping[str, Any]) -> str:
    text = (
        f"last fifth of training: {_percent(arm['late_zero_variance'])} of groups without variance"
    )
    if arm["late_copy_rate"] is None:
        return text
    return f"{text}, {_percent(arm['late_copy_rate'])} of refinements copy their draft"


def _percent(rate: float) -> str:
    return f"{100 * rate:.1f} %"


def _range(values: Sequence[float]) -> str:
    if len(values) < 2:
        return ""
    return f" (seeds {100 * min(values):.1f} to {100 * max(values):.1f})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
