"""What the pages rest on: which runs, of which models, on which machines, and what failed."""

import math
from collections import Counter
from collections.abc import Iterator

from benchmarks.replication import prose
from benchmarks.replication.arms import SEEDS, planned
from benchmarks.replication.compare import ByArm, Record, split
from benchmarks.replication.models import PRETRAINED, SHIPPED, SIZES, count_weights
from benchmarks.replication.tables import Maps, ordered, percent
from benchmarks.replication.tasks import ALL_TASKS, TASKS


def basis(maps: Maps) -> str:
    """Say how many runs of how many the pages rest on, what is missing, and what they ran on."""
    finished = sum(record["status"] == "finished" for record in records(maps))
    plan = sum(SEEDS * len(planned(*split(place))) for place, _ in in_plan(maps))
    text = prose.BASIS.format(
        total=finished, planned=plan, seeds=SEEDS, larger=not_measured(maps)
    )  # fmt: skip
    return f"{text} {machines(maps)}{failures(maps)}"


def counts(maps: Maps) -> list[list[str]]:
    """Tabulate what became of the runs of each task and size."""
    ends = ("finished", "diverged", "died")
    rows = [["task and size", "base, single-shot", "arms planned", *ends, "not run"]]
    for place, arms in in_plan(maps):
        plan = planned(*split(place))
        statuses = [record["status"] for record in records({place: arms})]
        base = base_accuracy(arms)
        mark = " (nothing can be learned from this)" if base in (0, 1) else ""
        missing = sum(seed not in arms.get(arm, {}) for arm in plan for seed in range(SEEDS))
        numbers = map(str, [len(plan), *map(statuses.count, ends), missing])
        rows.append([place, percent(base) + mark, *numbers])
    return rows


def in_plan(maps: Maps) -> list[tuple[str, ByArm]]:
    """Give what is recorded, and the smallest model of each task even if nothing is."""
    return ordered({f"{task}-{SHIPPED}": {} for task in TASKS} | {**maps})


def records(maps: Maps) -> Iterator[Record]:
    """Give all records."""
    return (record for arms in maps.values() for runs in arms.values() for record in runs.values())


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
    places = [split(place) for place, _ in (maps and ordered(maps)) or in_plan(maps)]
    sizes = [count_weights(ALL_TASKS[t], size) for t, size in places if size != PRETRAINED]
    return " to ".join(f"{number:,}" for number in sorted({min(sizes), max(sizes)})) + " weights"


def machines(maps: Maps) -> str:
    """Say what the runs were made on, and how many on each."""
    made = Counter(
        "{device} ({threads} thread), torch {torch}, {sampler}".format(**record["machine"])
        for record in records(maps)
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
    return "\n\n" + "\n".join(lines) if lines else ""


def base_accuracy(arms: ByArm) -> float:
    """Give the accuracy before training: it is the same for all runs of a task and size."""
    first = [record["curve"][0] for record in records({"": arms}) if record["curve"]]
    return first[0]["sampled"] if first else math.nan
