"""The variants on a simulated engine, over several seeds, as ratios to GRPO on the same lengths."""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from igrpo_algo import Rollouts
from igrpo_algo.cli.intervals import mean_interval

from .engine import Costs, SimulatedEngine, WholeGroups, Workload
from .variants import GROUP, VARIANTS, reward, simulated_time
from .workloads import make_workload


class Run(NamedTuple):
    """The cost of a rollout, the share of Stage 2's prompts that was cached, and the result."""

    seconds: float
    steps: float
    tokens: int
    cached: float
    rollouts: Rollouts


@dataclass(frozen=True)
class Setting:
    """An engine and its load.

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
        one_by_one: Whether the sampler hands out each completion as it is done.
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
    one_by_one: bool = True

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
        return simulate(
            name,
            self.workload(seed),
            self.costs,
            self.slots,
            self.queue,
            one_by_one=self.one_by_one,
            cache_tokens=self.cache_waves * self.slots * self.mean,
        )

    def over_grpo(self, names: Sequence[str], seed: int) -> dict[str, dict[str, float]]:
        """Give what each variant took, over GRPO on the same lengths."""
        base = self.simulate("grpo", seed)
        runs = {name: self.simulate(name, seed) for name in names}
        return {
            name: {
                "wall_over_grpo": run.seconds / base.seconds,
                "tokens_over_grpo": run.tokens / base.tokens,
                "stage_2_cached": run.cached,
            }
            for name, run in runs.items()
        }


def simulate(
    name: str,
    workload: Workload,
    costs: Costs,
    slots: int,
    queue: int,
    *,
    one_by_one: bool = True,
    **cache: Any,
) -> Run:
    """Run a variant's own code in simulated time."""
    if name == "grpo":
        workload = replace(workload, num_drafts=0)
    engine = SimulatedEngine(costs, slots, workload, **cache)
    sampler = engine if one_by_one else WholeGroups(engine)
    with simulated_time():
        rollouts = VARIANTS[name](sampler, workload.prompts, reward, slots + queue)
    prompts, cached = engine.refined
    seconds = float(rollouts.times.max())
    share = cached / prompts if prompts else math.nan
    return Run(seconds, engine.steps, engine.tokens, share, rollouts)


def over_seeds(
    setting: Setting, names: Sequence[str], seeds: int, pool: Executor
) -> dict[str, dict[str, Any]]:
    """Give mean, interval and every seed of each variant's figures."""
    runs = list(pool.map(setting.over_grpo, [names] * seeds, range(seeds)))
    return {
        name: {figure: summary(run[name][figure] for run in runs) for figure in runs[0][name]}
        for name in names
    }


def summary(values: Iterable[float]) -> dict[str, Any]:
    """Give mean, 95 % interval of the mean, and the values."""
    numbers = list(values)
    return {**mean_interval(numbers)._asdict(), "values": numbers}
