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
    """Set measured beside simulated: CPU time and its ratio to GRPO's, cached share; and errors."""
    rows: dict[str, list[dict[str, float]]] = {}
    for run in record["runs"]:
        work = real_engine.workload(run["seed"])
        base, simulated_base = run["variants"]["grpo"], predict("grpo", work, costs)
        for name, measured in run["variants"].items():
            simulated = predict(name, work, costs)
            ratio = measured["cpu_seconds"] / base["cpu_seconds"]
            simulated_ratio = simulated.seconds / simulated_base.seconds
            prompts = measured["stage_2_prompt_tokens"]
            row = {
                "cpu_seconds": measured["cpu_seconds"],
                "over_grpo": ratio,
                "wall_over_grpo": measured["wall_seconds"] / base["wall_seconds"],
                "steps_over_grpo": measured["steps"] / base["steps"],
                "simulated_steps_over_grpo": simulated.steps / simulated_base.steps,
                "error_of_steps": simulated.steps / measured["steps"] - 1,
                "tokens_over_grpo": measured["tokens"] / base["tokens"],
                "simulated_over_grpo": simulated_ratio,
                "error_of_seconds": simulated.seconds / measured["cpu_seconds"] - 1,
                "error_of_ratio": simulated_ratio / ratio - 1,
            }
            if prompts:
                row["stage_2_cached"] = measured["stage_2_cached_tokens"] / prompts
                row["simulated_stage_2_cached"] = simulated.cached
            rows.setdefault(name, []).append(row)
    return {
        name: {figure: summary(row[figure] for row in all_rows) for figure in all_rows[0]}
        for name, all_rows in rows.items()
    }
