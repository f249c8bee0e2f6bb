"""From a real engine's timings to the simulation's costs, and how far the simulation is off."""

from dataclasses import replace
from statistics import fmean, median
from typing import Any

from . import real_engine
from .engine import Costs
from .simulation import simulate, summary
from .variants import GROUP


def fit_costs(record: dict[str, Any]) -> Costs:
    """Take the median of the repeats; what GRPO took beyond its steps is a cost per request.

    That remainder (queues, threads, scoring) comes from runs on lengths of their own, which are
    used for nothing else.
    """
    fits = [run["costs"] for run in record["runs"]]
    steps = tuple(median(column) for column in zip(*(fit["steps"] for fit in fits), strict=True))
    prefill = median(fit["prefill"] for fit in fits)
    costs = Costs(tuple(fits[0]["batches"]), steps, prefill)
    work = real_engine.workload(real_engine.CALIBRATION)
    rest = median(record["calibration_seconds"]) - predict("grpo", work, costs).seconds
    return replace(costs, request=max(0.0, rest) / (len(work.lengths) * GROUP))


def predict(name: str, workload: Any, costs: Costs) -> Any:
    """Simulate the real engine."""
    slots, block = real_engine.SLOTS, real_engine.BLOCK
    return simulate(name, workload, costs, slots, GROUP, block=block)


def as_line(costs: Costs) -> Costs:
    """Fit a straight line to the steps, for batches that the real engine cannot hold."""
    xs, ys = costs.batches, costs.steps
    x, y = fmean(xs), fmean(ys)
    slope = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )
    return replace(costs, batches=(0, 1), steps=(y - slope * x, y - slope * x + slope))


def compare(record: dict[str, Any], costs: Costs) -> dict[str, Any]:
    """Set measured beside predicted: seconds, ratio to GRPO, cached share; and the errors."""
    rows: dict[str, list[tuple[float, ...]]] = {}
    for run in record["runs"]:
        work = real_engine.workload(run["seed"])
        base = run["variants"]["grpo"]["seconds"]
        predicted_base = predict("grpo", work, costs).seconds
        for name, measured in run["variants"].items():
            predicted = predict(name, work, costs)
            prompts, cached = (measured[f"stage_2_{kind}_tokens"] for kind in ("prompt", "cached"))
            ratio, predicted_ratio = measured["seconds"] / base, predicted.seconds / predicted_base
            rows.setdefault(name, []).append(
                (
                    measured["seconds"], ratio, predicted_ratio,
                    predicted.seconds / measured["seconds"] - 1,
                    predicted_ratio / ratio - 1,
                    cached / prompts if prompts else float("nan"), predicted.cached,
                )
            )  # fmt: skip
    figures = (
        "seconds", "wall_over_grpo", "predicted_wall_over_grpo", "error_of_seconds",
        "error_of_ratio", "stage_2_cached", "predicted_stage_2_cached",
    )  # fmt: skip
    return {
        name: {f: summary(v) for f, v in zip(figures, zip(*values, strict=True), strict=True)}
        for name, values in rows.items()
    }
