"""Arms against GRPO, paired by seed: differences with intervals, and what may be said of them."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.replication.models import PRETRAINED, SHIPPED
from igrpo_algo.cli.intervals import Interval, mean_interval

Record = Mapping[str, Any]
ByArm = Mapping[str, Mapping[int, Record]]
Value = Callable[[Record], float]
LEVEL = 0.03
"""Two arms are level if the whole interval of their difference lies within three points."""

SEEDS_NEEDED = 3
"""Fewer pairs give no verdict: two that happen to agree would make an interval of no width."""
GAIN_NEEDED = 0.05
"""A task on which GRPO itself gains less than this decides nothing."""


class Verdict(StrEnum):
    """What an interval says of an arm beside GRPO."""

    AHEAD = "ahead"
    LEVEL = "level"
    BEHIND = "behind"
    OPEN = "open"


def single_shot(record: Record) -> float:
    """Accuracy of one sampled answer at the end."""
    return record["final"]["sampled"]


def refined(record: Record) -> float:
    """Accuracy of draft-then-refine at the end, after one round."""
    return record["final"]["refined"][0]


def best_use(record: Record) -> float:
    """Accuracy of the better of the two: what a user would deploy."""
    return max(single_shot(record), refined(record))


def split(place: str) -> tuple[str, str]:
    """Give task and size of a folder of records.

    Examples:
        >>> split("chain-64x2"), split("words-2-smollm2")
        (('chain', '64x2'), ('words-2', 'smollm2'))
    """
    task, _, size = place.rpartition("-")
    return task, size


def first_rung(maps: Mapping[str, ByArm]) -> dict[str, ByArm]:
    """Keep one size of each task: of a ladder, the one on which most arms are planned."""
    return {place: arms for place, arms in maps.items() if split(place)[1] in (SHIPPED, PRETRAINED)}


def read_records(folder: Path) -> dict[str, dict[str, dict[int, Record]]]:
    """Read what is recorded: by task and size, by arm, by seed."""
    records: dict[str, dict[str, dict[int, Record]]] = defaultdict(lambda: defaultdict(dict))
    for path in sorted(folder.glob("*/*.json")):
        record = json.loads(path.read_bytes())
        records[path.parent.name][record["arm"]][record["seed"]] = record
    return {place: dict(arms) for place, arms in records.items()}


def finished(arms: ByArm, arm: str) -> dict[int, Record]:
    """Give the finished runs of an arm, by seed."""
    runs = arms.get(arm, {})
    return {seed: record for seed, record in runs.items() if record["status"] == "finished"}


def differences(arms: ByArm, ours: str, theirs: str, value: Value) -> dict[int, float]:
    """Compare two arms on each seed that both have finished."""
    mine, other = finished(arms, ours), finished(arms, theirs)
    return {seed: value(mine[seed]) - value(other[seed]) for seed in pairs(mine, other)}


def difference(arms: ByArm, ours: str, theirs: str, value: Value) -> Interval:
    """Give the mean difference, with Student's interval over seeds.

    It is right for few seeds if differences are nearly normal; `resampled` asks for no such thing.
    """
    return mean_interval([*differences(arms, ours, theirs, value).values()])


def change(small: ByArm, large: ByArm, ours: str, theirs: str, value: Value) -> Interval:
    """Give how much more an arm is ahead on the larger model, paired by seed.

    The same seed draws the same problems at every size.
    """
    low, high = (differences(arms, ours, theirs, value) for arms in (small, large))
    return mean_interval([high[seed] - low[seed] for seed in pairs(low, high)])


def resampled(arms: ByArm, ours: str, theirs: str, value: Value) -> Interval:
    """Give the mean difference, with the paired bootstrap's interval: too narrow for few seeds."""
    gaps = [*differences(arms, ours, theirs, value).values()]
    if len(gaps) < 2:
        return mean_interval(gaps)
    found = stats.bootstrap((gaps,), np.mean, method="percentile", rng=0).confidence_interval
    return Interval(float(np.mean(gaps)), float(found.low), float(found.high))


def verdict_on(arms: ByArm, ours: str, theirs: str, value: Value) -> Verdict:
    """Say what both intervals of a difference allow to say."""
    return judge(*(kind(arms, ours, theirs, value) for kind in (difference, resampled)))


def pairs(mine: Mapping[int, Any], other: Mapping[int, Any]) -> list[int]:
    """Name the seeds that both have."""
    return sorted(mine.keys() & other.keys())


def is_compared(arms: ByArm, arm: str, baseline: str) -> bool:
    """Say whether enough seeds of an arm and of what it is compared with have finished."""
    return len(pairs(finished(arms, arm), finished(arms, baseline))) >= SEEDS_NEEDED


def gain(arms: ByArm) -> float:
    """Give what GRPO added to single-shot accuracy, in the mean; NaN without runs."""
    runs = finished(arms, "grpo").values()
    gains = [single_shot(record) - record["curve"][0]["sampled"] for record in runs]
    return sum(gains) / len(gains) if gains else math.nan


def telling(maps: Mapping[str, ByArm]) -> dict[str, ByArm]:
    """Keep the tasks on which GRPO learns, so that being level with it means something."""
    return {
        place: arms
        for place, arms in maps.items()
        if is_compared(arms, "grpo", "grpo") and gain(arms) >= GAIN_NEEDED
    }


def judge(*gaps: Interval) -> Verdict:
    """Say what intervals of one difference allow to say: only what all of them allow.

    Examples:
        >>> [str(judge(Interval(m, m - 0.02, m + 0.02))) for m in (0.05, 0.0, -0.03, 0.015)]
        ['ahead', 'level', 'behind', 'open']
    """
    if all(gap.excludes_zero for gap in gaps):
        return Verdict.AHEAD if gaps[0].mean > 0 else Verdict.BEHIND
    level = all(gap.low >= -LEVEL and gap.high <= LEVEL for gap in gaps)
    return Verdict.LEVEL if level else Verdict.OPEN


def curve(record: Record, *names: str) -> list[tuple[float, ...]]:
    """Give some values of a run's held-out points, the end among them."""
    points = [*record["curve"], record["final"]]
    return [tuple(point[name] for name in names) for point in points]


def interpolate(points: Sequence[tuple[float, ...]], at: float) -> float:
    """Read a curve between its points; NaN outside of them.

    Examples:
        >>> interpolate([(0, 0.25), (10, 0.75)], 5), interpolate([(0, 0.25), (10, 0.75)], 11)
        (0.5, nan)
    """
    for (before, low), (after, high) in pairwise(points):
        if before <= at <= after and before < after:
            return low + (high - low) * (at - before) / (after - before)
    return math.nan


def difference_at_equal_cost(arms: ByArm, ours: str, theirs: str, cost: str) -> Interval:
    """Compare single-shot accuracy at the cost that both arms have reached, seed by seed.

    Args:
        arms: The records of a task.
        ours: An arm.
        theirs: What it is compared with.
        cost: "completions", "sampled_tokens", "trained_tokens", "seconds" or "cpu_seconds".
    """
    mine, other = finished(arms, ours), finished(arms, theirs)
    gaps: list[float] = []
    for seed in pairs(mine, other):
        common = min(run[seed]["final"][cost] for run in (mine, other))
        ends = [interpolate(curve(run[seed], cost, "sampled"), common) for run in (mine, other)]
        gaps.append(ends[0] - ends[1])
    return mean_interval(gaps)


def entropy_at(record: Record, accuracy: float) -> float:
    """Read the entropy of a run where its single-shot accuracy first passes a value."""
    first, *later = curve(record, "sampled", "entropy")
    rising = [first]
    for point in later:
        if point[0] > rising[-1][0]:
            rising.append(point)
    return interpolate(rising, accuracy)


def never_behind(maps: Mapping[str, ByArm], arm: str, baseline: str) -> bool:
    """Say whether an arm is behind nowhere, ahead somewhere, and measured on every task."""
    verdicts = [
        verdict_on(arms, arm, baseline, value)
        for arms in maps.values()
        for value in (single_shot, refined)
    ]
    measured = all(is_compared(arms, arm, baseline) for arms in maps.values())
    settled = not {Verdict.BEHIND, Verdict.OPEN} & {*verdicts}
    return measured and settled and Verdict.AHEAD in verdicts
