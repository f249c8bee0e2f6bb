"""The variants on a simulated engine, over several seeds, as ratios to GRPO on the same lengths."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from igrpo_algo import Rollouts
from igrpo_algo.intervals import mean_confidence_interval

from .engine import Costs, SimulatedEngine, Workload
from .variants import GROUP, VARIANTS, reward, simulated_time
from .workloads import make_workload


class Run(NamedTuple):
    """What one rollout took: seconds, tokens, cached share of Stage 2's prompts; and its groups."""

    seconds: float
    tokens: int
    cached: float
    rollouts: Rollouts


@dataclass(frozen=True)
class Setting:
    """An engine and what it is asked for.

    Attributes:
        costs: Time of its work.
        slots: Most sequences that run at a time.
        waves: Completions per slot.
        mean: Mean length of a completion; questions have an eighth of it, the longest eight times.
        sigma: Spread of the logarithm of a length.
        shared: Share of its variance that belongs to the prompt.
        cache_waves: Completions per slot that the prefix cache keeps beyond those that run.
        queue: Completions asked of the engine beyond its slots.
        success: Probability that a completion is right.
    """

    costs: Costs
    slots: int = 256
    waves: int = 8
    mean: int = 1000
    sigma: float = 0.8
    shared: float = 0.0
    cache_waves: float = 4.0
    queue: int = GROUP
    success: float = 0.5

    def workload(self, seed: int) -> Workload:
        return make_workload(
            self.slots * self.waves // GROUP,
            seed=seed,
            success=self.success,
            question=self.mean // 8,
            mean=self.mean,
            most=8 * self.mean,
            sigma=self.sigma,
            shared=self.shared,
        )

    def simulate(self, name: str, seed: int) -> Run:
        cache = self.cache_waves * self.slots * self.mean
        return simulate(
            name, self.workload(seed), self.costs, self.slots, self.queue, cache_tokens=cache
        )


def simulate(
    name: str, workload: Workload, costs: Costs, slots: int, queue: int, **cache: Any
) -> Run:
    """Run a variant's own code in simulated time."""
    if name == "grpo":
        workload = replace(workload, num_drafts=0)
    engine = SimulatedEngine(costs, slots, workload, **cache)
    with simulated_time():
        rollouts = VARIANTS[name](engine, workload.prompts, reward, slots + queue)
    prompts, cached = engine.refined
    seconds = float(rollouts.times.max())
    return Run(seconds, engine.tokens, cached / prompts if prompts else math.nan, rollouts)


def over_grpo(setting: Setting, names: Iterable[str], seeds: int) -> dict[str, dict[str, Any]]:
    """Give each variant's wall time and tokens over GRPO's: mean, interval and all seeds."""
    ratios: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for seed in range(seeds):
        base = setting.simulate("grpo", seed)
        for name, rows in ratios.items():
            run = setting.simulate(name, seed)
            rows.append((run.seconds / base.seconds, run.tokens / base.tokens, run.cached))
    figures = ("wall_over_grpo", "tokens_over_grpo", "stage_2_cached")
    return {
        name: {figure: summary(values) for figure, values in zip(figures, zip(*rows, strict=True))}
        for name, rows in ratios.items()
    }


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Give mean, 95 % interval of the mean, and the values."""
    numbers = list(values)
    mean, low, high = mean_confidence_interval(torch.tensor(numbers, dtype=torch.float64)[:, None])
    return {"mean": float(mean), "low": float(low), "high": float(high), "values": numbers}
