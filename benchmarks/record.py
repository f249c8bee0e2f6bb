"""Measure every op beside its peers; write, draw and compare the figures.

    python -m benchmarks.record                      # this machine's grid: six minutes on a CPU
    python -m benchmarks.record --quick              # its most important cases
    python -m benchmarks.record --only 'frozen'      # cases whose line holds this

Writes one dated JSON under benchmarks/results/ after every case, and a plot beside it. The same
command with the same --output goes on where it ended: cases that the JSON holds are not run again.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import cases, compare, results
from benchmarks.cases import Case
from benchmarks.measure import Ceilings, Figure, measure, measure_ceilings
from benchmarks.ops import OURS
from benchmarks.results import Record

SECONDS = {"cpu": 300.0, "cuda": 420.0}  # no case is started that would end later
QUICK_SECONDS = {"cpu": 120.0, "cuda": 75.0}
CLOCK = {"cpu": 8.0, "cuda": 2.0}  # seconds of readings of one case
FAR_BEHIND, DEAR_MS = 5.0, 100.0  # times the fastest, and milliseconds, of a peer left out later
print_at_once = partial(print, flush=True)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", choices=["cpu", "cuda"], default=device)
    options.add_argument("--quick", action="store_true", help="the most important cases only")
    options.add_argument("--small", action="store_true", help="tiny sizes, to try the machinery")
    options.add_argument("--only", default="", help="cases whose line contains this")
    options.add_argument("--without", action="append", default=[], help="a peer to leave out")
    options.add_argument("--seconds", type=float, help="start no case that would end later")
    options.add_argument("--threads", type=int, help="of torch on the CPU")
    options.add_argument("--no-memory", action="store_true", help="leave out the peak memory")
    options.add_argument("--no-plots", action="store_true")
    options.add_argument("--output", type=Path, help="the JSON, continued if it is there")
    options.add_argument("--commit", help="of the sources, where there is no clone to ask")
    return options


def grid(options: argparse.Namespace) -> list[Case]:
    if options.small:
        chosen = cases.small_grid()
    elif options.device == "cuda":
        chosen = cases.quick_gpu_grid() if options.quick else cases.gpu_grid()
    else:
        chosen = cases.cpu_grid()[:4] if options.quick else cases.cpu_grid()
    return [case for case in chosen if options.only in str(case)]


def show(figure: Figure) -> str:
    """One line of the table that the run prints."""
    if figure.not_run is not None:
        return f"    {figure.peer:16} not run: {figure.not_run}"
    ms = figure.ms
    peak = "" if figure.peak_bytes is None else f"{figure.peak_bytes / 2**20:8.0f} MiB"
    worst = max(figure.errors.values())
    note = f" ({figure.computes})" if figure.computes else ""
    return (
        f"    {figure.peer:16} {ms['median']:9.3f} ms [{ms['p20']:.3f}, {ms['p80']:.3f}] {peak}"
        f" {figure.share_of_floor:6.1%} of the floor, error {worst:.1e}{note}"
    )


def run_cases(
    options: argparse.Namespace,
    chosen: Sequence[Case],
    record: Record,
    path: Path,
    say: Callable[[str], None] = print_at_once,
) -> None:
    """Measure the cases that the record lacks, until they or the seconds are spent.

    The record is written after each.
    """
    device = torch.device(options.device)
    if record["ceilings"] is None:
        record["ceilings"] = vars(measure_ceilings(device, small=options.small))
    ceilings = Ceilings(**record["ceilings"])
    measured = compare.by_case(record)
    chosen = [case for case in chosen if case not in measured]
    record["left_out"] = []
    budget = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)[device.type]
    clock = 0.1 if options.small else CLOCK[device.type]
    began = time.monotonic()
    longest = 0.0
    for number, case in enumerate(chosen):
        start = time.monotonic() - began
        if start + longest > budget:
            record["left_out"] = [str(case) for case in chosen[number:]]
            say(f"out of time: {len(chosen) - number} cases left out")
            break
        say(f"{start:4.0f} s  {case}")
        some = unwanted(options) | far_behind(record, case.op)
        memory = not options.no_memory
        figures = measure(case, device, ceilings, clock, memory=memory, without=some)
        for figure in figures:
            say(show(figure))
        results.add(record, figures)
        results.write(record, path)
        longest = max(longest, time.monotonic() - began - start)
    record["finished"] = True
    results.write(record, path)


def unwanted(options: argparse.Namespace) -> dict[str, str]:
    """Peers that this run leaves out from the start."""
    named = dict.fromkeys(options.without, "left out of this run")
    if options.quick and options.device == "cuda":
        named["torch.compile"] = "left out: it compiles for longer than all others run"
    return named


def far_behind(record: Record, op: str) -> dict[str, str]:
    """Peers that cost more time than their later figures would be worth, and how far they are."""
    found = {}
    for case, figures in compare.by_case(record).items():
        medians = {peer: some["ms"]["median"] for peer, some in figures.items() if some["ms"]}
        fastest = min(medians.values(), default=0.0)
        for peer, median in medians.items():
            slow = median > max(FAR_BEHIND * fastest, DEAR_MS)
            if case.op == op and slow and peer != OURS:
                found[peer] = f"left out: {median / fastest:.0f} times the fastest before"
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where one of our own outputs was wrong."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    record = results.new_record(torch.device(options.device), None, options.commit)
    path = options.output or results.default_path(record)
    record = results.resumed(record, path)
    run_cases(options, grid(options), record, path)
    return report(options, record, path)


def report(options: argparse.Namespace, record: Record, path: Path) -> int:
    """Compare, draw, and say what was wrong."""
    print(f"written: {path}")
    record["compared"] = compare.against_baseline(record)
    results.write(record, path)
    print("\n    ".join(record["compared"]))
    if not options.no_plots and importlib.util.find_spec("matplotlib"):
        from benchmarks.draw import draw

        print(f"drawn: {draw(record, path.with_suffix('.png'))}")
    wrong = [f for f in record["figures"] if f["peer"] == OURS and f["not_run"]]
    for figure in wrong:
        print(f"RED: {figure['op']}, {figure['passes']}, {figure['dtype']}: {figure['not_run']}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
