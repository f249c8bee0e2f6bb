"""`docs/method/replication.md`: the map, written from the records."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from benchmarks.replication import compare, prose
from benchmarks.replication.arms import ARMS, MAIN, PLANNED, Arm, baseline_of
from benchmarks.replication.compare import ByArm, difference, split
from benchmarks.replication.models import SHIPPED
from benchmarks.replication.plot import draw
from benchmarks.replication.tables import (
    Maps,
    costs,
    diagnostics,
    first_warnings,
    ladder,
    more,
    ordered,
    percent,
    points,
    section,
)
from benchmarks.replication.tasks import TASKS
from benchmarks.speed_page import table
from igrpo_algo.cli.intervals import Interval
from igrpo_algo.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/method/replication.md"
PLOT = ROOT / "docs/images/replication.png"


def write_page(folder: Path, page: Path = PAGE, plot: Path = PLOT) -> None:
    """Write the page and its plot from the records of a folder."""
    maps = compare.read_records(folder)
    draw(maps, plot)
    write_whole(page, build_page(maps).encode())


def build_page(maps: Maps) -> str:
    """Give the whole page."""
    parts = [
        prose.HEAD,
        takeaway(maps),
        f"![Single-shot and draft-then-refine accuracy less GRPO's](../images/{PLOT.name})",
        prose.ADVICE.format(first=first_warnings(maps)),
        "## What it rests on",
        basis(maps),
        "## Where iGRPO is ahead, level, behind",
        prose.MAP,
        *(section(place, arms) for place, arms in ordered(maps)),
        *ladder(maps),
        "## At equal tokens and equal time",
        prose.COSTS,
        *(f"**{place}**\n\n{table(costs(arms))}" for place, arms in ordered(maps)),
        "## What the diagnostics said beforehand",
        prose.DIAGNOSTICS,
        *(f"**{place}**\n\n{table(diagnostics(arms))}" for place, arms in ordered(maps)),
        "## Rounds, pass@k, length and entropy",
        prose.MORE,
        *(f"**{place}**\n\n{table(more(arms))}" for place, arms in ordered(maps)),
        prose.REAL_MODEL,
        prose.PAPER,
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def takeaway(maps: Maps) -> str:
    """Say first what to take away, from the numbers."""
    recorded, maps = maps, compare.telling(compare.first_rung(maps))
    others = [arm for arm in ARMS if ARMS[arm].num_drafts]
    good = [arm for arm in others if compare.never_behind(maps, arm, baseline_of(arm))]
    if good:
        names = ", ".join(f"*{ARMS[arm].label}*" for arm in good)
        return f"**Never behind GRPO on these tasks, and ahead somewhere: {names}.**"
    worst = worst_gaps(maps)
    if not recorded:
        return "**Nothing has been measured yet.**"
    if not worst:
        return f"**No form has {compare.SEEDS_NEEDED} seeds on every task yet.**"
    best = max(worst, key=worst.__getitem__)
    which = (
        f"Of the {len(worst)} forms with {compare.SEEDS_NEEDED} seeds on every task, the closest, "
        "by its worst mean difference, is"
        if len(worst) > 1
        else f"The only form with {compare.SEEDS_NEEDED} seeds on every task yet is"
    )
    return (
        "**No form of iGRPO was shown to be never behind GRPO here, and ahead somewhere**, "
        f"so no preset is recommended by these numbers. {which} *{ARMS[best].label}*; "
        f"in points: {gaps_in_words(maps, best)}."
    )


def worst_gaps(maps: Maps) -> dict[str, float]:
    """Give the worst mean difference to GRPO of each arm that was measured on every task."""
    return {
        arm: min(gap.mean for gap in gaps_of(maps, arm).values())
        for arm in ARMS
        if ARMS[arm].num_drafts and len(gaps_of(maps, arm)) == 2 * len(maps) > 0
    }


def gaps_of(maps: Maps, arm: str) -> dict[tuple[str, str], Interval]:
    """Give an arm's differences to its GRPO by place and measure, where both were run."""
    measures = {"single-shot": compare.single_shot, "draft-then-refine": compare.refined}
    return {
        (place, name): difference(arms, arm, baseline_of(arm), value)
        for place, arms in ordered(maps)
        if compare.is_compared(arms, arm, baseline_of(arm))
        for name, value in measures.items()
    }


def gaps_in_words(maps: Maps, arm: str) -> str:
    """Write an arm's differences in a sentence."""
    return "; ".join(
        f"{place} {name} {points(gap)}" for (place, name), gap in gaps_of(maps, arm).items()
    )


def basis(maps: Maps) -> str:
    """Say how many runs of how many the page rests on, and what became of the others."""
    rows = [["task and size", "base, single-shot", "finished", "diverged", "died", "not run"]]
    places = dict.fromkeys([*(f"{task}-{SHIPPED}" for task in TASKS), *maps])
    planned = prose.SEEDS * sum(len(plan_of(place)) for place in places)
    for place, arms in ordered(maps):
        statuses = [record["status"] for runs in arms.values() for record in runs.values()]
        counts = [statuses.count(status) for status in ("finished", "diverged", "died")]
        base = base_accuracy(arms)
        mark = "" if 0 < base < 1 else " (nothing can be learned from this)"
        missing = sum(
            seed not in arms.get(arm, {}) for arm in plan_of(place) for seed in range(prose.SEEDS)
        )
        rows.append([place, f"{percent(base)}{mark}", *map(str, [*counts, missing])])
    total = sum(int(row[2]) for row in rows[1:])
    text = prose.BASIS.format(total=total, planned=planned, arms=len(PLANNED))
    if {split(place)[1] for place in maps} <= {SHIPPED}:
        text += prose.NO_LADDER
    return f"{text} {machines(maps)}\n\n{table(rows)}{failures(maps)}"


def plan_of(place: str) -> Mapping[str, Arm]:
    """Give the arms that are planned: all at the shipped size, the main ones at others."""
    return PLANNED if split(place)[1] == SHIPPED else MAIN


def machines(maps: Maps) -> str:
    """Say what the runs were made on, and how many on each."""
    made = Counter(
        f"{record['machine']['device']} ({record['machine']['threads']} thread), torch "
        f"{record['machine']['torch']}, {record['machine']['sampler']}"
        for arms in maps.values()
        for runs in arms.values()
        for record in runs.values()
    )
    return "Made on: " + "; ".join(f"{name}: {count} runs" for name, count in made.items()) + "."


def failures(maps: Maps) -> str:
    """List the runs that did not finish, each with its reason."""
    lines = [
        f"- {place}, {arm}, seed {seed}: {record['status']} ({record['error']})"
        for place, arms in ordered(maps)
        for arm, runs in arms.items()
        for seed, record in runs.items()
        if record["status"] != "finished"
    ]
    return "\n" + "\n".join(lines) if lines else ""


def base_accuracy(arms: ByArm) -> float:
    """Give the accuracy before training: it is the same for all runs of a task and size."""
    points = [r["curve"][0] for runs in arms.values() for r in runs.values() if r["curve"]]
    return points[0]["sampled"] if points else math.nan
