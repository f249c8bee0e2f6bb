"""`docs/method/replication.md`: the map, written from the records."""

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.replication import again, compare, ladder, prose
from benchmarks.replication.arms import ARMS, SEEDS, baseline_of, planned
from benchmarks.replication.compare import ByArm, Verdict, difference, split, verdict_on
from benchmarks.replication.models import PRETRAINED, SHIPPED, SIZES, count_weights
from benchmarks.replication.plot import draw, draw_ladder
from benchmarks.replication.tables import (
    MEASURES,
    Maps,
    costs,
    diagnostics,
    first_warnings,
    forgotten,
    more,
    ordered,
    percent,
    points,
    section,
)
from benchmarks.replication.tasks import ALL_TASKS, TASKS
from benchmarks.speed_page import table
from igrpo_algo.cli.intervals import Interval
from igrpo_algo.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/method/replication.md"
IMAGES = ROOT / "docs/images"
PLOT, LADDER_PLOT = "replication.png", "replication-ladder.png"


def write_page(folder: Path, page: Path = PAGE, images: Path = IMAGES) -> None:
    """Write the page and its plots from the records of a folder."""
    everything = compare.read_records(folder)
    maps = again.planned_seeds(everything)
    draw(maps, images / PLOT)
    if rungs := ladder.rungs_of(maps):
        draw_ladder(rungs, images / LADDER_PLOT)
    write_whole(page, build_page(everything).encode())


def build_page(everything: Maps) -> str:
    """Give the whole page."""
    maps = again.planned_seeds(everything)
    parts = [
        prose.HEAD.format(weights=weights_of(maps)),
        takeaway(maps),
        f"![Single-shot and draft-then-refine accuracy less GRPO's](../images/{PLOT})",
        prose.ADVICE.format(first=first_warnings(maps), forgotten=forgotten(maps)),
        "## What it rests on",
        basis(maps),
        "## Where iGRPO is ahead, level, behind",
        prose.MAP,
        *(section(place, arms) for place, arms in ordered(maps)),
        *ladder.section(maps, f"../images/{LADDER_PLOT}"),
        *again.section(everything),
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
    """Say first what to take away, from the numbers: every size of every task counts."""
    recorded, maps = maps, compare.telling(maps)
    run_on = {arm: places_of(maps, arm) for arm in ARMS if ARMS[arm].num_drafts}
    good = [arm for arm in run_on if compare.never_behind(run_on[arm], arm, baseline_of(arm))]
    maps = {place: maps[place] for place in maps if any(place in each for each in run_on.values())}
    everywhere = [arm for arm in run_on if maps and len(run_on[arm]) == len(maps)]
    if not recorded:
        return "**Nothing has been measured yet.**"
    if not everywhere:
        return f"**No form has {compare.SEEDS_NEEDED} seeds on every task and size yet.**"
    if best := [arm for arm in everywhere if arm in good]:
        return f"**Never behind GRPO {on(maps)}, and ahead somewhere: {labels(best)}.**"
    others = len([arm for arm in run_on if run_on[arm]]) - len(everywhere)
    return (
        f"**No form of iGRPO was shown to be never behind GRPO {on(maps)}, and ahead somewhere**, "
        f"so no preset is recommended by these numbers. {closest(maps, everywhere)} "
        + partly(good, others)
    ).strip()


def places_of(maps: Maps, arm: str) -> dict[str, ByArm]:
    """Keep the tasks and sizes on which an arm can be compared."""
    compared = ((place, compare.is_compared(maps[place], arm, baseline_of(arm))) for place in maps)
    return {place: maps[place] for place, is_compared in compared if is_compared}


def closest(maps: Maps, arms: Sequence[str]) -> str:
    """Name the arm, of those measured everywhere, whose worst mean difference is the smallest."""
    best = max(arms, key=lambda arm: min(gap.mean for gap, _ in gaps_of(maps, arm).values()))
    which = (
        f"Of the {len(arms)} forms with {compare.SEEDS_NEEDED} seeds on all of them, the closest, "
        "by its worst mean difference, is"
        if len(arms) > 1
        else f"The only form with {compare.SEEDS_NEEDED} seeds on all of them is"
    )
    return f"{which} *{ARMS[best].label}*: {gaps_in_words(maps, best)} (in points)."


def partly(good: Sequence[str], others: int) -> str:
    """Say what became of the forms that were not run everywhere."""
    if not others:
        return ""
    if not good:
        return f"The same is true of the {others} other forms, on the models that they were run on."
    return f"Of the {others} other forms, {labels(good)} was never behind on those it was run on."


def on(maps: Maps) -> str:
    """Say on how much a verdict rests.

    Examples:
        >>> on({"chain-64x2": {}, "chain-128x3": {}, "signs-64x2": {}})
        'on these tasks (2, with 3 models)'
    """
    return f"on these tasks ({len({split(place)[0] for place in maps})}, with {len(maps)} models)"


def labels(arms: Sequence[str]) -> str:
    """Name arms in a sentence."""
    return ", ".join(f"*{ARMS[arm].label}*" for arm in arms)


def gaps_of(maps: Maps, arm: str) -> dict[str, tuple[Interval, Verdict]]:
    """Give an arm's differences to its GRPO, and the verdicts, by model and measure."""
    return {
        f"{place} {name}": (
            difference(arms, arm, baseline_of(arm), value),
            verdict_on(arms, arm, baseline_of(arm), value),
        )
        for place, arms in ordered(places_of(maps, arm))
        for name, value in MEASURES.items()
    }


def gaps_in_words(maps: Maps, arm: str) -> str:
    """Write in a sentence where an arm is behind, and where ahead."""
    gaps = gaps_of(maps, arm)
    told = {
        verdict: [f"{where} {points(gap)}" for where, (gap, its) in gaps.items() if its is verdict]
        for verdict in (Verdict.BEHIND, Verdict.AHEAD)
    }
    text = "; ".join(f"{verdict} at {', '.join(where)}" for verdict, where in told.items() if where)
    others = len(gaps) - sum(map(len, told.values()))
    return f"{text}{'; ' if text else ''}level or open at {others} of {len(gaps)}"


def basis(maps: Maps) -> str:
    """Say how many runs of how many the page rests on, and what became of the others."""
    counted = ("finished", "diverged", "died")
    rows = [["task and size", "base, single-shot", "arms planned", *counted, "not run"]]
    total = in_plan = 0
    for place, arms in ordered({f"{task}-{SHIPPED}": {} for task in TASKS} | {**maps}):
        plan = planned(*split(place))
        statuses = [record["status"] for runs in arms.values() for record in runs.values()]
        base = base_accuracy(arms)
        mark = " (nothing can be learned from this)" if base in (0, 1) else ""
        missing = sum(seed not in arms.get(arm, {}) for arm in plan for seed in range(SEEDS))
        ends = map(str, [len(plan), *map(statuses.count, counted), missing])
        rows.append([place, percent(base) + mark, *ends])
        total, in_plan = total + statuses.count("finished"), in_plan + SEEDS * len(plan)
    text = prose.BASIS.format(total=total, planned=in_plan, seeds=SEEDS, larger=not_measured(maps))
    return f"{text} {machines(maps)}\n\n{table(rows)}{failures(maps)}"


def not_measured(maps: Maps) -> str:
    """Name the larger models that no run was made with."""
    missing = {
        size: [task for task in TASKS if f"{task}-{size}" not in maps]
        for size in SIZES
        if size != SHIPPED
    }
    named = [f"{size} on {', '.join(tasks)}" for size, tasks in missing.items() if tasks]
    return f" Not measured: {'; '.join(named)}." if named else ""


def weights_of(maps: Maps) -> str:
    """Say how many weights the models have that were trained from scratch."""
    places = [split(place) for place in maps or [f"{task}-{SHIPPED}" for task in TASKS]]
    counts = [count_weights(ALL_TASKS[t], size) for t, size in places if size != PRETRAINED]
    return " to ".join(f"{number:,}" for number in sorted({min(counts), max(counts)})) + " weights"


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
