"""Recorded runs read back: our time over the fastest peer's in each, and what became worse.

Clocks move from run to run; the ratio to a peer that took turns with ours moves much less.
"""

from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.cases import Case
from benchmarks.ops import OURS
from benchmarks.results import RESULTS, Record, recorded

CASE = tuple(field.name for field in fields(Case))
MORE_MEMORY = 1.05  # times what it was, before a peak counts as risen


@dataclass(frozen=True)
class Ratio:
    """Our time over that of the fastest of some peers."""

    peer: str
    value: float
    spread: float  # relative: how far the readings of each are apart

    def __str__(self) -> str:
        return f"{self.value:.2f} of {self.peer}'s"


@dataclass(frozen=True)
class Row:
    """One case of a recorded run: the figures of ours and of the peers that ran."""

    case: Case
    ours: Record
    peers: dict[str, Record]

    def over_fastest(self, among: Collection[str] | None = None) -> Ratio | None:
        """Our time over that of the fastest peer, of all or of some; None where none ran."""
        chosen = [f for name, f in self.peers.items() if among is None or name in among]
        if not chosen:
            return None
        best = min(chosen, key=lambda figure: figure["ms"]["median"])
        spread = relative_spread(self.ours) + relative_spread(best)
        return Ratio(best["peer"], self.ours["ms"]["median"] / best["ms"]["median"], spread)


def number(value: float) -> str:
    """Three digits or more, and no exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def relative_spread(figure: Record) -> float:
    ms = figure["ms"]
    return (ms["p80"] - ms["p20"]) / ms["median"]


def by_case(record: Record) -> dict[Case, dict[str, Record]]:
    """Every peer's figure of every case, in the order they were run."""
    found: dict[Case, dict[str, Record]] = {}
    for figure in record["figures"]:
        case = Case(**{name: figure[name] for name in CASE})
        found.setdefault(case, {})[figure["peer"]] = figure
    return found


def rows(record: Record) -> list[Row]:
    """The cases in which ours ran."""
    found = []
    for case, figures in by_case(record).items():
        ran = {peer: figure for peer, figure in figures.items() if figure["not_run"] is None}
        if OURS in ran:
            found.append(Row(case, ran.pop(OURS), ran))
    return found


def baseline(record: Record, folder: Path = RESULTS) -> tuple[Path, Record] | None:
    """The newest earlier run on the same hardware, or else on the same kind of device."""
    earlier = [
        (path, old)
        for path, old in recorded(folder)
        if old["date"] < record["date"] and old["device"] == record["device"]
    ]
    alike = [(path, old) for path, old in earlier if old["hardware"] == record["hardware"]]
    return max(alike or earlier, key=lambda run: run[1]["date"], default=None)


def fallen(record: Record, old: Record) -> list[str]:
    """Where ours fell back behind the fastest peer of both runs, or takes more memory.

    A ratio counts as fallen if it rose by more than the spread of either run's readings.
    """
    before = {row.case: row for row in rows(old)}
    lines = []
    for row in rows(record):
        past = before.get(row.case)
        if past is None:
            continue
        among = row.peers.keys() & past.peers.keys()
        now, then = row.over_fastest(among), past.over_fastest(among)
        if now and then and now.value > then.value * (1 + max(now.spread, then.spread)):
            lines.append(f"{row.case}: {then} -> {now} time")
        peaks = past.ours["peak_bytes"], row.ours["peak_bytes"]
        if None not in peaks and peaks[1] > MORE_MEMORY * peaks[0] + 2**20:
            lines.append(f"{row.case}: {peaks[0] / 2**20:.0f} -> {peaks[1] / 2**20:.0f} MiB")
    return lines


def lost(record: Record, old: Record) -> list[str]:
    """Peers, ours among them, that ran a case then and did not now, with the reason."""
    now = by_case(record)
    return [
        f"{case}: {peer} ran then, now: {now[case][peer]['not_run']}"
        for case, figures in by_case(old).items()
        for peer, figure in figures.items()
        if case in now and peer in now[case]
        if figure["not_run"] is None and now[case][peer]["not_run"] is not None
    ]


def against_baseline(record: Record, folder: Path = RESULTS) -> list[str]:
    """The comparison as lines to print, the name of the baseline first."""
    found = baseline(record, folder)
    if found is None:
        return ["no earlier run on such a device to compare with"]
    path, old = found
    worse = [*fallen(record, old), *lost(record, old)]
    return [f"against {path.name}: {len(worse) or 'nothing'} fell back", *worse]
