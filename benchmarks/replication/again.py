"""Forms that were run again, on seeds that had no part in choosing them."""

from collections.abc import Callable, Sequence

from benchmarks.replication import compare, prose
from benchmarks.replication.arms import ARMS, SEEDS, baseline_of
from benchmarks.replication.compare import ByArm
from benchmarks.replication.tables import MEASURES, Maps, beside_grpo, ordered
from benchmarks.speed_page import table


def planned_seeds(maps: Maps) -> dict[str, ByArm]:
    """Keep the seeds that every arm is planned with: forms are chosen by them."""
    return keep(maps, lambda seed: seed < SEEDS)


def fresh_seeds(maps: Maps) -> dict[str, ByArm]:
    """Keep the seeds beyond those planned."""
    return keep(maps, lambda seed: seed >= SEEDS)


def keep(maps: Maps, wanted: Callable[[int], bool]) -> dict[str, ByArm]:
    """Keep the runs of some seeds."""
    return {
        place: {
            arm: {seed: run for seed, run in runs.items() if wanted(seed)}
            for arm, runs in arms.items()
        }
        for place, arms in maps.items()
    }


def section(maps: Maps) -> list[str]:
    """Put what fresh seeds say beside what the planned ones said, where forms were tried again."""
    rows = comparisons(planned_seeds(maps), fresh_seeds(maps))
    if not rows:
        return []
    head = ["model", "form", "measure", f"seeds 0 to {SEEDS - 1}", "", "fresh seeds", "", "of them"]
    verdicts = [(row[4].strip("*"), row[6].strip("*")) for row in rows]
    return ["## Tried again on fresh seeds", prose.AGAIN, held(verdicts), table([head, *rows])]


def comparisons(first: Maps, fresh: Maps) -> list[list[str]]:
    """Give a row for each form, model and measure that both kinds of seeds can compare."""
    return [
        [
            *(place, ARMS[arm].label, name),
            *(text for arms in both for text in beside_grpo(arms, arm, value)[::2]),
            str(len(compare.differences(both[1], arm, baseline_of(arm), value))),
        ]
        for place, arms in ordered(fresh)
        for arm in ARMS
        if arm != baseline_of(arm)
        for both in [(first[place], arms)]
        if all(compare.is_compared(each, arm, baseline_of(arm)) for each in both)
        for name, value in MEASURES.items()
    ]


def held(verdicts: Sequence[tuple[str, str]]) -> str:
    """Say how many differences were clear, that is ahead or behind, on both kinds of seeds.

    Examples:
        >>> held([("ahead", "open"), ("behind", "behind"), ("level", "ahead")])
        'Of 2 differences that were clear, 1 came out so again; of 1 that was not, 1 is clear now.'
    """
    clear = ("ahead", "behind")
    again = [was == now for was, now in verdicts if was in clear]
    anew = [now in clear for was, now in verdicts if was not in clear]
    return (
        f"Of {len(again)} differences that were clear, {sum(again)} came out so again; "
        f"of {len(anew)} that {'was' if len(anew) == 1 else 'were'} not, {sum(anew)} "
        f"{'is' if sum(anew) == 1 else 'are'} clear now."
    )
