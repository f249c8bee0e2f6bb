"""Up a ladder of sizes: arms beside GRPO on models of several sizes."""

import math
from collections.abc import Mapping, Sequence

from benchmarks.replication import compare, prose
from benchmarks.replication.arms import ARMS, LADDER, baseline_of
from benchmarks.replication.compare import ByArm, Verdict, split
from benchmarks.replication.tables import (
    MEASURES,
    Maps,
    accuracy,
    beside_grpo,
    ordered,
    percent,
    points,
)
from benchmarks.replication.tasks import ALL_TASKS
from benchmarks.speed_page import table

FOLLOWED = ("best", "both-best", "both-worst", "both-worst-6-2")
"""Arms that are drawn, and told of in words."""

Rungs = Mapping[str, Mapping[str, ByArm]]


def rungs_of(maps: Maps) -> dict[str, dict[str, ByArm]]:
    """Give the records by task and by size, smallest first, where GRPO learns at several sizes."""
    rungs: dict[str, dict[str, ByArm]] = {}
    for place, arms in ordered(compare.telling(maps)):
        task, size = split(place)
        rungs.setdefault(task, {})[size] = arms
    return {task: sizes for task, sizes in rungs.items() if len(sizes) > 1}


def section(maps: Maps, plot: str) -> list[str]:
    """Put the sizes of each task side by side, where several are recorded."""
    rungs = rungs_of(maps)
    if not rungs:
        return []
    return [
        "## Up a ladder of sizes",
        standing(rungs),
        changes(rungs),
        f"![The difference to GRPO against the size of the model]({plot})",
        prose.LADDER,
        *(f"**{task}**\n\n{table(rows(sizes))}" for task, sizes in rungs.items()),
    ]


def standing(rungs: Rungs) -> str:
    """Say, for each measure, on how many models the followed arms are behind GRPO, and ahead."""
    models = sum(map(len, rungs.values()))
    return f"Against GRPO of the same size, on {models} models. " + " ".join(
        f"**{name.capitalize()}**: {'; '.join(told)}."
        for name, value in MEASURES.items()
        if (told := [
            f"*{ARMS[arm].label}* {tally(found)}"
            for arm in FOLLOWED
            if (found := verdicts(rungs, arm, value))
        ])
    )  # fmt: skip


def verdicts(rungs: Rungs, arm: str, value: compare.Value) -> list[Verdict]:
    """Give an arm's verdicts on all sizes of all tasks on which it can be compared."""
    return [
        compare.verdict_on(arms, arm, baseline_of(arm), value)
        for sizes in rungs.values()
        for arms in sizes.values()
        if compare.is_compared(arms, arm, baseline_of(arm))
    ]


def tally(found: Sequence[Verdict]) -> str:
    """Say on how many models an arm is behind, and ahead.

    Examples:
        >>> tally([Verdict.BEHIND] * 4), tally([Verdict.OPEN, Verdict.LEVEL])
        ('behind on all 4', 'neither behind nor ahead on any of 2')
        >>> tally([Verdict.BEHIND, Verdict.OPEN, Verdict.AHEAD])
        'behind on 1 and ahead on 1 of 3'
    """
    counts = {verdict: found.count(verdict) for verdict in (Verdict.BEHIND, Verdict.AHEAD)}
    for verdict, count in counts.items():
        if count == len(found):
            return f"{verdict} on all {count}"
    told = [f"{verdict} on {count}" for verdict, count in counts.items() if count]
    return f"{' and '.join(told) or 'neither behind nor ahead on any'} of {len(found)}"


def changes(rungs: Rungs) -> str:
    """Say which differences to GRPO change from the smallest size to the largest.

    Weights that were there already had a warm-up of their own: a change from them is marked.
    """
    shown, looked_at = [], 0
    for arm in FOLLOWED:
        for task, sizes in rungs.items():
            (low, small), *_, (high, large) = sizes.items()
            for name, value in MEASURES.items():
                change = compare.change(small, large, arm, baseline_of(arm), value)
                looked_at += not math.isnan(change.low)
                if change.excludes_zero:
                    own = ", with another warm-up" if ALL_TASKS[task].weights else ""
                    what = f"*{ARMS[arm].label}* on {task} from {low} to {high}{own}, {name}"
                    shown.append(f"{what} {points(change)}")
    return (
        f"From the smallest size to the largest, {len(shown) or 'none'} of these {looked_at} "
        f"differences changed, by an interval that leaves zero out{': ' if shown else ''}"
        f"{'; '.join(shown)}."
    )


def rows(sizes: Mapping[str, ByArm]) -> list[list[str]]:
    """Tabulate a task: accuracy in the rows of GRPO, differences to it in all others."""
    found = [["arm", *(f"{name}, {size}" for name in MEASURES for size in sizes)]]
    for arm in [arm for arm in LADDER if any(compare.finished(a, arm) for a in sizes.values())]:
        row = [ARMS[arm].label]
        for value in MEASURES.values():
            for arms in sizes.values():
                if arm == baseline_of(arm) or not compare.finished(arms, arm):
                    row.append(percent(accuracy(arms, arm, value)))
                else:
                    gap, _, verdict = beside_grpo(arms, arm, value)
                    row.append(f"{gap} {verdict}".strip())
        found.append(row)
    return found
