"""The tables of the page, each from the records of a task and a size, or of all."""

import math
from collections.abc import Mapping, Sequence

from benchmarks.replication import compare, prose
from benchmarks.replication.arms import ARMS, STRIPPED, baseline_of
from benchmarks.replication.compare import (
    ByArm,
    Record,
    Value,
    Verdict,
    difference,
    finished,
    resampled,
    split,
    verdict_on,
)
from benchmarks.replication.models import PRETRAINED, SIZES
from benchmarks.replication.tasks import ALL_TASKS
from benchmarks.speed_page import table
from igrpo_algo.cli.intervals import Interval

Maps = Mapping[str, ByArm]
MEASURES = {"single-shot": compare.single_shot, "draft-then-refine": compare.refined}
FEW = f"fewer than {compare.SEEDS_NEEDED} seeds"


def ordered(maps: Maps) -> list[tuple[str, ByArm]]:
    """Give the places, in the order of the tasks and then of the sizes."""
    tasks, sizes = list(ALL_TASKS), [*SIZES, PRETRAINED]

    def position(item: tuple[str, ByArm]) -> tuple[int, int]:
        task, size = split(item[0])
        return tasks.index(task), sizes.index(size)

    return sorted(maps.items(), key=position)


def section(place: str, arms: ByArm) -> str:
    """Compare all arms of a task with GRPO."""
    beside = ["less GRPO", "bootstrap", ""]
    rows = [["arm", "seeds", "single-shot", *beside, "draft, then refine", *beside]]
    for arm in measured(arms):
        row = [ARMS[arm].label, str(len(finished(arms, arm)))]
        for value in MEASURES.values():
            row.append(percent(accuracy(arms, arm, value)))
            row += [""] * 3 if arm == baseline_of(arm) else beside_grpo(arms, arm, value)
        rows.append(row)
    title = ALL_TASKS[split(place)[0]].title
    note = prose.NOTHING_LEARNED if compare.gain(arms) < compare.GAIN_NEEDED else ""
    if not compare.is_compared(arms, "grpo", "grpo"):
        note = prose.TOO_FEW_SEEDS
    return f"**{place}**: {title}.{note}{used_best(arms)}{thinking(arms)}\n\n{table(rows)}"


def accuracy(arms: ByArm, arm: str, value: Value) -> float:
    """Average a measure over an arm's finished runs."""
    return mean([value(record) for record in finished(arms, arm).values()])


def used_best(arms: ByArm) -> str:
    """Compare the arms as a user would deploy them: GRPO, and the form that does best."""
    forms = [arm for arm in ARMS if ARMS[arm].num_drafts and baseline_of(arm) == "grpo"]
    compared = [arm for arm in forms if compare.is_compared(arms, arm, "grpo")]
    if not compared:
        return ""
    best = max(compared, key=lambda arm: accuracy(arms, arm, compare.best_use))
    gap, _, verdict = beside_grpo(arms, best, compare.best_use)
    return (
        f" At its better use, single-shot or draft-then-refine, GRPO has "
        f"{percent(accuracy(arms, 'grpo', compare.best_use))}; of {len(compared)} forms with one "
        f"update, *{ARMS[best].label}* does best: {gap} points, {verdict.strip('*')}."
    )


def thinking(arms: ByArm) -> str:
    """Say what it changes to show a draft's thinking, where both ways were run."""
    told = [
        f"*{ARMS[stripped].label}*, {name} {points(difference(arms, kept, stripped, value))}"
        for kept, stripped in STRIPPED.items()
        if compare.is_compared(arms, kept, stripped)
        for name, value in MEASURES.items()
    ]
    return f" Thinking shown less thinking stripped: {'; '.join(told)}." if told else ""


def beside_grpo(arms: ByArm, arm: str, value: Value) -> list[str]:
    """Give the difference with both its intervals, and the verdict."""
    versus = (arms, arm, baseline_of(arm))
    if not compare.is_compared(*versus):
        return ["", "", FEW]
    verdict = verdict_on(*versus, value)
    bold = verdict in (Verdict.AHEAD, Verdict.BEHIND)
    gap, again = difference(*versus, value), resampled(*versus, value)
    return [points(gap), bounds(again), f"**{verdict}**" if bold else str(verdict)]


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
            versus = (arms, arm, baseline_of(arm))
            if arm == baseline_of(arm):
                row.append("")
            elif not compare.is_compared(*versus):
                row.append(FEW)
            else:
                row.append(points(compare.difference_at_equal_cost(*versus, axis)))
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
    """Say at which steps it was first warned of copies or equal groups, in how many of the runs."""
    steps = [warned[0] for record in runs if (warned := warned_steps(record))]
    return f"{span(steps)}, {len(steps)} of {len(runs)} runs" if steps else "none"


def first_warnings(maps: Maps) -> str:
    """Say when the paper's form was first warned of, over all tasks."""
    runs = [record for arms in maps.values() for record in finished(arms, "best").values()]
    steps = [warned[0] for record in runs if (warned := warned_steps(record))]
    if not steps:
        return "Here that form was never warned of."
    return (
        f"Here the first warnings of that form came at {span(steps)}, in {len(steps)} of "
        f"{len(runs)} runs."
    )


def forgotten(maps: Maps) -> str:
    """Say where the paper's form, training only with a draft in the prompt, lost Stage 1."""
    falls = {
        place: [
            record["steps"][0]["reward"] - record["steps"][-1]["reward"] >= compare.GAIN_NEEDED
            for record in finished(arms, "best").values()
        ]
        for place, arms in ordered(maps)
    }
    total = sum(map(len, falls.values()))
    fell = sum(map(sum, falls.values()))
    places = ", ".join(place for place, each in falls.items() if any(each))
    return (
        f"It fell by five points or more in {fell} of {total} runs of the paper's form"
        f"{f' ({places})' if fell else ''}."
    )


def warned_steps(record: Record) -> list[int]:
    """Give the steps at which a run was warned of copies or equal groups, not of its template."""
    return [
        each["step"] for each in record["warnings"] if not each["text"].startswith(prose.TEMPLATE)
    ]


def span(steps: Sequence[int]) -> str:
    """Write steps from the first to the last."""
    first, last = min(steps), max(steps)
    return f"step {first}" if first == last else f"steps {first} to {last}"


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
    return f"{100 * gap.mean:+.1f} {bounds(gap)}"


def bounds(gap: Interval) -> str:
    """Write an interval in points."""
    return f"[{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"
