"""Up a ladder of sizes: arms beside GRPO on models of several sizes."""

import math
from collections.abc import Mapping

from benchmarks.replication import compare, prose
from benchmarks.replication.arms import ARMS, LADDER, baseline_of
from benchmarks.replication.compare import ByArm, split
from benchmarks.replication.tables import (
    MEASURES,
    Maps,
    accuracy,
    beside_grpo,
    ordered,
    percent,
    points,
)
from benchmarks.speed_page import table

FOLLOWED = ("best", "both-best", "both-worst", "both-worst-6-2")
"""Arms that are drawn, and whose changes are told."""

Rungs = Mapping[str, Mapping[str, ByArm]]


def rungs_of(maps: Maps) -> dict[str, dict[str, ByArm]]:
    """Give the records by task and by size, smallest first, where GRPO learns at several sizes."""
    rungs: dict[str, dict[str, ByArm]] = {}
    for place, arms in ordered(compare.telling(maps)):
        task, size = split(place)
        rungs.setdefault(task, {})[size] = arms
    return {task: sizes for task, sizes in rungs.items() if len(sizes) > 1}


def section(maps: Maps, plot: str) -> list[str]:
    """Say what changes with the size of the model, where several sizes are recorded."""
    rungs = rungs_of(maps)
    if not rungs:
        return []
    return [
        "## Up a ladder of sizes",
        f"![The difference to GRPO against the size of the model]({plot})",
        prose.LADDER,
        changes(rungs),
    ]


def tables(maps: Maps) -> list[str]:
    """Put the sizes of each task side by side, where several are recorded."""
    rungs = rungs_of(maps)
    if not rungs:
        return []
    shown = (f"**{task}**\n\n{table(rows(sizes))}" for task, sizes in rungs.items())
    return ["## Up a ladder of sizes", prose.RUNGS, *shown]


def changes(rungs: Rungs) -> str:
    """Tabulate which differences to GRPO change from the smallest size to the largest."""
    shown, looked_at = [["form", "task and sizes", "measure", "change, points"]], 0
    for arm in FOLLOWED:
        for task, sizes in rungs.items():
            (low, small), *_, (high, large) = sizes.items()
            for measure, value in MEASURES.items():
                change = compare.change(small, large, arm, baseline_of(arm), value)
                looked_at += not math.isnan(change.low)
                if change.excludes_zero:
                    place = f"{task}, {low} to {high}"
                    shown.append([ARMS[arm].label, place, measure, points(change)])
    count = len(shown) - 1
    text = (
        f"From the smallest size to the largest, {count or 'none'} of {looked_at} differences "
        "changed by an interval that leaves zero out"
    )
    return f"{text}:\n\n{table(shown)}" if count else f"{text}."


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
