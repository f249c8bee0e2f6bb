"""Arms against GRPO, paired by seed: differences with intervals, and what may be said of them."""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from igrpo_algo.cli.intervals import Interval, mean_interval

Record = Mapping[str, Any]
ByArm = Mapping[str, Mapping[int, Record]]
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


def difference(arms: ByArm, ours: str, theirs: str, value: Callable[[Record], float]) -> Interval:
    """Compare two arms over the seeds that both have finished: Student's interval of the mean.

    With five seeds a bootstrap over seeds is too narrow; Student's t is not, if differences are
    nearly normal.
    """
    mine, other = finished(arms, ours), finished(arms, theirs)
    return mean_interval([value(mine[seed]) - value(other[seed]) for seed in pairs(mine, other)])


def pairs(mine: Mapping[int, Record], other: Mapping[int, Record]) -> list[int]:
    """Name the seeds that both have."""
    return sorted(mine.keys() & other.keys())


def is_compared(arms: ByArm, arm: str, baseline: str) -> bool:
    """Say whether enough seeds of an arm and of what it is compared with have finished."""
    return len(pairs(finished(arms, arm), finished(arms, baseline))) >= SEEDS_NEEDED


def gain(arms: ByArm, arm: str = "grpo") -> float:
    """Give what training added to single-shot accuracy, in the mean; NaN without runs."""
    runs = finished(arms, arm).values()
    gains = [single_shot(record) - record["curve"][0]["sampled"] for record in runs]
    return sum(gains) / len(gains) if gains else math.nan


def telling(maps: Mapping[str, ByArm]) -> dict[str, ByArm]:
    """Keep the tasks on which GRPO learns, so that being level with it means something."""
    return {
        place: arms
        for place, arms in maps.items()
        if is_compared(arms, "grpo", "grpo") and gain(arms) >= GAIN_NEEDED
    }


def judge(gap: Interval) -> Verdict:
    """Say what an interval allows to say.

    Examples:
        >>> [str(judge(Interval(m, m - 0.02, m + 0.02))) for m in (0.05, 0.0, -0.03, 0.015)]
        ['ahead', 'level', 'behind', 'open']
    """
    if gap.excludes_zero:
        return Verdict.AHEAD if gap.mean > 0 else Verdict.BEHIND
    return Verdict.LEVEL if gap.low >= -LEVEL and gap.high <= LEVEL else Verdict.OPEN


def curve(record: Record, axis: str, value: str) -> list[tuple[float, float]]:
    """Give a run's held-out points (cost, value), the end among them."""
    points = [*record["curve"], record["final"]]
    return [(point[axis], _first(point[value])) for point in points]


def _first(value: float | Sequence[float]) -> float:
    return value[0] if isinstance(value, list) else value


def interpolate(points: Sequence[tuple[float, float]], at: float) -> float:
    """Read a curve between its points; NaN outside of them.

    Examples:
        >>> interpolate([(0, 0.25), (10, 0.75)], 5), interpolate([(0, 0.25), (10, 0.75)], 11)
        (0.5, nan)
    """
    for (before, low), (after, high) in pairwise(points):
        if before <= at <= after and before < after:
            return low + (high - low) * (at - before) / (after - before)
    return math.nan


def difference_at_equal_cost(
    arms: ByArm, ours: str, theirs: str, axis: str, value: str = "sampled"
) -> Interval:
    """Compare two arms at the cost that both have reached, seed by seed.

    Args:
        arms: The records of a task.
        ours: An arm.
        theirs: What it is compared with.
        axis: "completions", "sampled_tokens", "trained_tokens", "seconds" or "cpu_seconds".
        value: "sampled" or "refined".
    """
    mine, other = finished(arms, ours), finished(arms, theirs)
    gaps = []
    for seed in pairs(mine, other):
        cost = min(run[seed]["final"][axis] for run in (mine, other))
        ends = [interpolate(curve(run[seed], axis, value), cost) for run in (mine, other)]
        gaps.append(ends[0] - ends[1])
    return mean_interval(gaps)


def entropy_at(record: Record, accuracy: float) -> float:
    """Read the entropy of a run where its single-shot accuracy first passes a value."""
    points = [(_first(p["sampled"]), p["entropy"]) for p in [*record["curve"], record["final"]]]
    rising = [points[0]]
    for point in points[1:]:
        if point[0] > rising[-1][0]:
            rising.append(point)
    return interpolate(rising, accuracy)


def never_behind(maps: Mapping[str, ByArm], arm: str, baseline: str) -> bool:
    """Say whether an arm is behind nowhere, ahead somewhere, and measured on every task."""
    verdicts = [
        judge(difference(arms, arm, baseline, value))
        for arms in maps.values()
        for value in (single_shot, refined)
    ]
    measured = all(is_compared(arms, arm, baseline) for arms in maps.values())
    settled = not {Verdict.BEHIND, Verdict.OPEN} & {*verdicts}
    return measured and settled and Verdict.AHEAD in verdicts
