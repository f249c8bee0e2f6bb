"""How fast the kernels are to be beside their peers, and which of it a record on a GPU shows.

    python -m benchmarks.goals benchmarks/results/2026-11-26-h100.json

`gpu_check` prints this last. A goal is the most that our time and our peak memory may be over a
peer's in the same run. Those on a CPU and on what an op costs the host are tests.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks import cases, compare
from benchmarks.cases import BOTH, FORWARD, FROZEN, Case, logits, policy, scores
from benchmarks.ops import OURS
from benchmarks.results import Record
from benchmarks.speed_page import size, table

COPY = "a copy of its bytes"
Shares = tuple[float, float | None] | None
"""Our time and our peak memory over a peer's; None: it was not measured."""


@dataclass(frozen=True)
class Goal:
    """What is wanted of an op at a size.

    Attributes:
        case: The op and the size.
        time: Our time over the peer's, at most.
        peak: Our peak memory over the peer's, at most; None: as it comes.
        peer: Whose; None: the fastest's that ran.
    """

    case: Case
    time: float
    peak: float | None = None
    peer: str | None = None


def goals() -> list[Goal]:
    """What the kernels are built for."""
    at, narrow = cases.BARS, replace(cases.BARS, vocabulary=32768)
    others = [replace(at, tokens=2048), narrow, replace(at, vocabulary=262144)]
    others += [replace(at, width=8192)]
    return [
        Goal(policy(BOTH, "bf16", at), 0.96, 1.1),
        *(Goal(policy(BOTH, "bf16", other), 1.0) for other in others),
        Goal(policy(BOTH, "bf16", replace(at, width=1024)), 0.9),
        Goal(policy(BOTH, "bf16", replace(at, tokens=32768)), 1.0, 0.55),
        Goal(policy(BOTH, "bf16", at, 0.3), 0.36),
        Goal(policy(BOTH, "bf16", narrow, 0.3), 0.6),
        Goal(policy(FROZEN, "bf16", at), 1.0),
        Goal(scores(FORWARD, "bf16", at), 0.95, 1.0, "TRL"),
        Goal(scores(BOTH, "bf16", at), 0.85, None, "TRL"),
        Goal(logits(FORWARD, "bf16", at), 1 / 0.92, None, COPY),
        Goal(logits(BOTH, "bf16", at), 1.0, None, "Liger Triton"),
        Goal(logits(BOTH, "bf16", narrow), 1.1, None, "Liger Triton"),
        Goal(cases.loss(2**22), 1.0, None, "torch.compile"),
    ]


# By the names that `gpu_check` gives to whole steps: whose, time and peak memory
STEPS: dict[str, tuple[str, float, float | None]] = {
    "train-step": ("TRL", 0.98, 1.0),
    "shared-prompt-one-group": ("padded", 1 / 1.6, None),
    "shared-prompt-short-groups": ("padded", 1.0, None),
}


def shares_of(goal: Goal, row: compare.Row | None) -> Shares:
    """What a record shows of a goal."""
    if row is None:
        return None
    if goal.peer == COPY:
        return 1 / row.ours["share_of_floor"], None
    best = row.over_fastest(None if goal.peer is None else {goal.peer})
    if best is None:
        return None
    peaks = row.ours["peak_bytes"], row.peers[best.peer]["peak_bytes"]
    return best.value, peaks[0] / peaks[1] if all(peaks) else None


def shares_of_step(record: Record, peer: str) -> Shares:
    """What the record of a whole step shows, of a training step or of a shared prompt."""
    for row in record.get("rows", []):
        form = row["forms"][peer]
        return 1 / form["speedup_of_shared"]["median"], 1 / form["memory_over_shared"]
    ours, other = (record.get("figures", {}).get(name, {}) for name in (OURS, peer))
    if "ms" not in ours or "ms" not in other:  # it was stopped, or did not fit
        return None
    time = ours["ms"]["median"] / other["ms"]["median"]
    return time, ours["peak_bytes"] / other["peak_bytes"] if other["peak_bytes"] else None


def verdict(shares: Shares, time: float, peak: float | None) -> str:
    """Whether a goal is met: both of its parts have to be."""
    if shares is None or (peak is not None and shares[1] is None):
        return "not yet measured"
    found, found_peak = shares
    over = peak is not None and found_peak is not None and found_peak > peak
    return "missed" if over or found > time else "met"


def line(name: str, peer: str, time: float, peak: float | None, shares: Shares) -> list[str]:
    """One line of the table."""

    def show(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    found = shares or (None, None)
    return [name, peer, *map(show, (time, found[0], peak, found[1])), verdict(shares, time, peak)]


def lines(record: Record, path: Path) -> Iterator[list[str]]:
    """The table: every goal beside what a record shows, and the records of whole steps by it."""
    yield ["", "over", "time, at most", "time", "memory, at most", "memory", ""]
    measured = {row.case: row for row in compare.rows(record)}
    for goal in goals():
        name = f"{goal.case.op}, {goal.case.passes}, {size(goal.case)}"
        row = measured.get(goal.case)
        shares = shares_of(goal, row)
        yield line(name, goal.peer or fastest(row), goal.time, goal.peak, shares)
    for name, (peer, time, peak) in STEPS.items():
        beside = path.with_name(f"{path.stem}-{name}.json")
        shares = None
        if record["device"] == "cuda" and beside.exists():  # a CPU rehearses with tiny models
            shares = shares_of_step(json.loads(beside.read_text()), peer)
        yield line(name, peer, time, peak, shares)


def fastest(row: compare.Row | None) -> str:
    """The peer that a goal without a name is measured by."""
    best = row and row.over_fastest()
    return best.peer if best else "the fastest"


def main(path: Path) -> None:
    """Print the table of a record."""
    print(table(list(lines(json.loads(path.read_text()), path))))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
