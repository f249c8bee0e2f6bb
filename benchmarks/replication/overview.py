"""What a user needs first: the verdict, and a line for each form over all models."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.replication import compare
from benchmarks.replication.arms import ARMS, baseline_of
from benchmarks.replication.compare import ByArm, Verdict, difference, split, verdict_on
from benchmarks.replication.tables import MEASURES, Maps, ordered, points
from igrpo_algo.cli.intervals import Interval

FORMS = [arm for arm in ARMS if ARMS[arm].num_drafts]


@dataclass(frozen=True)
class Gap:
    """A form's difference to its GRPO on one model, by one measure."""

    place: str
    measure: str
    interval: Interval
    verdict: Verdict


def takeaway(maps: Maps) -> str:
    """Say first what to take away, from the numbers: every size of every task counts."""
    if not maps:
        return "**Nothing has been measured yet.**"
    places = judged(maps)
    everywhere = [arm for arm in FORMS if places and places_of(places, arm).keys() == places.keys()]
    if not everywhere:
        return f"**No form has {compare.SEEDS_NEEDED} seeds on every task and size yet.**"
    run_on = {arm: run for arm in FORMS if (run := places_of(places, arm))}
    good = [arm for arm, run in run_on.items() if compare.never_behind(run, arm, baseline_of(arm))]
    tasks = len({split(place)[0] for place in places})
    on = f"on these tasks ({tasks}, with {len(places)} models)"
    if best := [arm for arm in everywhere if arm in good]:
        return f"**Never behind GRPO {on}, and ahead somewhere: {labels(best)}.**"
    return (
        f"**No form of iGRPO was shown to be never behind GRPO {on}, and ahead somewhere**, "
        f"so no preset is recommended by these numbers. {closest(places, everywhere)} "
        + partly(good, len(run_on) - len(everywhere))
    ).strip()


def judged(maps: Maps) -> dict[str, ByArm]:
    """Keep the tasks and sizes that say something: GRPO learns there, and a form was run."""
    return {
        place: arms
        for place, arms in compare.telling(maps).items()
        if any(compare.is_compared(arms, arm, baseline_of(arm)) for arm in FORMS)
    }


def places_of(maps: Maps, arm: str) -> dict[str, ByArm]:
    """Keep the tasks and sizes on which an arm can be compared."""
    return {
        place: arms
        for place, arms in maps.items()
        if compare.is_compared(arms, arm, baseline_of(arm))
    }


def closest(maps: Maps, arms: Sequence[str]) -> str:
    """Name the arm, of those measured everywhere, whose worst mean difference is the smallest."""
    best = max(arms, key=lambda arm: worst_of(gaps_of(maps, arm)))
    which = (
        f"Of the {len(arms)} forms with {compare.SEEDS_NEEDED} seeds on all of them, the closest, "
        "by its worst mean difference, is"
        if len(arms) > 1
        else f"The only form with {compare.SEEDS_NEEDED} seeds on all of them is"
    )
    return f"{which} *{ARMS[best].label}*: {gaps_in_words(gaps_of(maps, best))} (in points)."


def partly(good: Sequence[str], others: int) -> str:
    """Say what became of the forms that were not run everywhere."""
    if not others:
        return ""
    if not good:
        return f"The same is true of the {others} other forms, on the models that they were run on."
    return f"Of the {others} other forms, {labels(good)} was never behind on those it was run on."


def labels(arms: Sequence[str]) -> str:
    """Name arms in a sentence."""
    return ", ".join(f"*{ARMS[arm].label}*" for arm in arms)


def gaps_of(maps: Maps, arm: str) -> list[Gap]:
    """Give an arm's differences to its GRPO, on each model where it can be compared."""
    return [
        Gap(
            place,
            measure,
            difference(arms, arm, baseline_of(arm), value),
            verdict_on(arms, arm, baseline_of(arm), value),
        )
        for place, arms in ordered(places_of(maps, arm))
        for measure, value in MEASURES.items()
    ]


def worst_of(gaps: Sequence[Gap]) -> float:
    """Give the lowest mean difference."""
    return min(gap.interval.mean for gap in gaps)


def gaps_in_words(gaps: Sequence[Gap]) -> str:
    """Write in a sentence where an arm is behind, and where ahead."""
    told = {
        verdict: [
            f"{gap.place} {gap.measure} {points(gap.interval)}"
            for gap in gaps
            if gap.verdict is verdict
        ]
        for verdict in (Verdict.BEHIND, Verdict.AHEAD)
    }
    text = "; ".join(f"{verdict} at {', '.join(where)}" for verdict, where in told.items() if where)
    others = len(gaps) - sum(map(len, told.values()))
    return f"{text}{'; ' if text else ''}level or open at {others} of {len(gaps)}"


def forms(maps: Maps) -> list[list[str]]:
    """Tabulate each form over its models: those run on most first, then the least far behind."""
    places = judged(maps)
    gaps = {arm: found for arm in FORMS if (found := gaps_of(places, arm))}
    head = ["form", "models"]
    rows = [[*head, *(name for measure in MEASURES for name in (measure, "behind", "ahead"))]]
    for arm in sorted(gaps, key=lambda arm: (-len(gaps[arm]), -worst_of(gaps[arm]))):
        row = [ARMS[arm].label, str(len(gaps[arm]) // len(MEASURES))]
        for measure in MEASURES:
            own = [gap for gap in gaps[arm] if gap.measure == measure]
            means = [100 * gap.interval.mean for gap in own]
            verdicts = [gap.verdict for gap in own]
            counts = [verdicts.count(each) for each in (Verdict.BEHIND, Verdict.AHEAD)]
            ends = dict.fromkeys(f"{end:+.1f}" for end in (min(means), max(means)))
            row += [" to ".join(ends), *map(str, counts)]
        rows.append(row)
    return rows
