"""`docs/method/replication.md`: the map, written from the records."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.replication import compare, prose
from benchmarks.replication.arms import ARMS, baseline_of
from benchmarks.replication.compare import ByArm, Record, Verdict, difference, finished, judge
from benchmarks.replication.plot import draw
from benchmarks.replication.tasks import ALL_TASKS, TASKS
from benchmarks.speed_page import table
from igrpo_algo.cli.intervals import Interval
from igrpo_algo.files import write_whole

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/method/replication.md"
PLOT = ROOT / "docs/images/replication.png"
Maps = Mapping[str, ByArm]


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
        prose.ADVICE,
        "## What it rests on",
        basis(maps),
        "## Where iGRPO is ahead, level, behind",
        prose.MAP,
        *(section(place, arms) for place, arms in ordered(maps)),
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


def ordered(maps: Maps) -> list[tuple[str, ByArm]]:
    """Give the places, those of a task together, in the order of the tasks."""
    return sorted(maps.items(), key=lambda item: list(ALL_TASKS).index(item[0].partition("-")[0]))


def takeaway(maps: Maps) -> str:
    """Say first what to take away, from the numbers."""
    recorded, maps = maps, compare.telling(maps)
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
    planned = len(ARMS) * prose.SEEDS
    for place, arms in ordered(maps):
        statuses = [record["status"] for runs in arms.values() for record in runs.values()]
        counts = [statuses.count(status) for status in ("finished", "diverged", "died")]
        base = base_accuracy(arms)
        mark = "" if 0 < base < 1 else " (nothing can be learned from this)"
        rows.append(
            [place, f"{percent(base)}{mark}", *map(str, counts), str(planned - len(statuses))]
        )
    total = sum(int(row[2]) for row in rows[1:])
    text = prose.BASIS.format(total=total, planned=planned * len(TASKS), arms=len(ARMS))
    return f"{text} {machines(maps)}\n\n{table(rows)}{failures(maps)}"


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


def section(place: str, arms: ByArm) -> str:
    """Compare all arms of a task with GRPO."""
    head = ["arm", "seeds", "single-shot", "less GRPO", "", "draft, then refine", "less GRPO", ""]
    rows = [head]
    for arm in measured(arms):
        runs = finished(arms, arm)
        row = [ARMS[arm].label, str(len(runs))]
        for value in (compare.single_shot, compare.refined):
            row.append(percent(mean([value(record) for record in runs.values()])))
            row += [""] * 2 if arm == baseline_of(arm) else beside_grpo(arms, arm, value)
        rows.append(row)
    title = ALL_TASKS[place.partition("-")[0]].title
    note = prose.NOTHING_LEARNED if compare.gain(arms) < compare.GAIN_NEEDED else ""
    if not compare.is_compared(arms, "grpo", "grpo"):
        note = prose.TOO_FEW_SEEDS
    return f"**{place}**: {title}.{note}\n\n{table(rows)}"


def beside_grpo(arms: ByArm, arm: str, value) -> list[str]:
    """Give the difference and the verdict."""
    if not compare.is_compared(arms, arm, baseline_of(arm)):
        return ["", f"fewer than {compare.SEEDS_NEEDED} seeds"]
    gap = difference(arms, arm, baseline_of(arm), value)
    verdict = judge(gap)
    bold = verdict in (Verdict.AHEAD, Verdict.BEHIND)
    return [points(gap), f"**{verdict}**" if bold else str(verdict)]


def costs(arms: ByArm) -> list[list[str]]:
    """Tabulate what the arms cost, and single-shot accuracy at the cost that both reached."""
    axes = {"completions": "completions", "sampled_tokens": "tokens", "cpu_seconds": "CPU time"}
    head = ["arm", "completions", "tokens sampled", "tokens trained", "CPU seconds"]
    rows = [[*head, *(f"single-shot less GRPO at equal {name}" for name in axes.values())]]
    for arm in measured(arms):
        spent = ("completions", "sampled_tokens", "trained_tokens", "cpu_seconds")
        ends = [record["final"] for record in finished(arms, arm).values()]
        row = [ARMS[arm].label, *(f"{mean([end[name] for end in ends]):,.0f}" for name in spent)]
        for axis in axes:
            if arm == baseline_of(arm):
                row.append("")
            else:
                row.append(
                    points(compare.difference_at_equal_cost(arms, arm, baseline_of(arm), axis))
                )
        rows.append(row)
    return rows


def diagnostics(arms: ByArm) -> list[list[str]]:
    """Tabulate the early numbers of each arm with drafts, beside how it ended."""
    head = ["arm", "copies", "Stage 2 without variance", "Stage 1 without variance", "uplift"]
    rows = [[*head, "first warning", "single-shot at the end, less GRPO"]]
    for arm in measured(arms):
        if not ARMS[arm].num_drafts:
            continue
        runs = list(finished(arms, arm).values())
        first = [record["steps"][0] for record in runs]
        names = ("copy_rate", "zero_variance", "draft_zero_variance")
        early = [percent(mean([row[name] for row in first])) for name in names]
        uplift = mean([row["uplift"] for row in first])
        row = [ARMS[arm].label, *early, f"{uplift:+.2f}", first_warning(runs)]
        rows.append([*row, beside_grpo(arms, arm, compare.single_shot)[0]])
    return rows


def first_warning(runs: Sequence[Record]) -> str:
    """Say at which steps the early warning first spoke, in how many of the runs."""
    steps = [record["warnings"][0]["step"] for record in runs if record["warnings"]]
    if not steps:
        return "none"
    span = (
        f"step {min(steps)}" if min(steps) == max(steps) else f"steps {min(steps)} to {max(steps)}"
    )
    return f"{span}, {len(steps)} of {len(runs)} runs"


def more(arms: ByArm) -> list[list[str]]:
    """Tabulate what else was measured at the end."""
    head = ["arm", "greedy", "pass@4", "refined once", "twice", "3 times", "4 times"]
    head += ["after a right draft", "after a wrong one", "copies", "length", "entropy"]
    rows = [[*head, "entropy at 40 %"]]
    for arm in measured(arms):
        runs = list(finished(arms, arm).values())
        ends = [record["final"] for record in runs]
        shares = [[end["greedy"] for end in ends]]
        shares.append([list(end["pass_at_k"].values())[-1] for end in ends])
        shares += zip(*(end["refined"] for end in ends), strict=True)
        names = ("after_right", "after_wrong", "copy_rate")
        shares += [[end[name] for end in ends] for name in names]
        row = [ARMS[arm].label, *(percent(mean(values)) for values in shares)]
        row += [f"{mean([end[name] for end in ends]):.2f}" for name in ("length", "entropy")]
        at_equal = mean([compare.entropy_at(record, 0.4) for record in runs])
        rows.append([*row, "" if math.isnan(at_equal) else f"{at_equal:.2f}"])
    return rows


def measured(arms: ByArm) -> list[str]:
    """Name the arms that have a finished run."""
    return [arm for arm in ARMS if finished(arms, arm)]


def mean(values: Sequence[float | None]) -> float:
    """Average what is known; NaN if nothing is."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def percent(share: float) -> str:
    """Write a share; nothing where it is not known."""
    return "" if math.isnan(share) else f"{100 * share:.1f} %"


def points(gap: Interval) -> str:
    """Write a difference in points, with its interval."""
    if math.isnan(gap.mean):
        return ""
    if math.isnan(gap.low):
        return f"{100 * gap.mean:+.1f}"
    return f"{100 * gap.mean:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
