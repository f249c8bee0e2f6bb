"""Time, peak memory and error of every peer on one case, after the gate.

No figure for an output that is wrong: each peer is held against float64 before the clock runs. All
peers get the same warm-up, take turns round by round, and see inputs that rotate.
"""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.batches import Batch
from benchmarks.cases import Case
from benchmarks.exact import errors
from benchmarks.ops import OURS, Op, Peer, allowed_error, op_of
from benchmarks.resident import peak_in_fresh_process

SETS = 2  # of inputs that rotate
LEAST_ROUNDS, MOST_ROUNDS = 3, 30
WINDOW = 0.01  # seconds that one reading spans at least; short steps are repeated
# What the gate may spend on float64: operations of products, and bytes of logits
CHECKED_OPERATIONS = {"cpu": 4e10, "cuda": 4.1e13}
CHECKED_BYTES = 2**33


@dataclass
class Figure:
    """What one peer gave on one case; or why it was not run."""

    case: Case
    peer: str
    device: str
    not_run: str | None = None
    computes: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    rows_checked: int = 0
    ms: dict[str, float] = field(default_factory=dict)
    readings: int = 0
    peak_bytes: int | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None

    def record(self) -> dict[str, Any]:
        """The figure as JSON holds it."""
        values = asdict(self)
        return values.pop("case") | values


@dataclass(frozen=True)
class Ceilings:
    """What the machine gave in this run: the yardsticks of every floor."""

    copy_bytes_per_second: float
    operations_per_second: dict[str, float]

    def floor(self, op: Op, case: Case) -> float:
        """Seconds below which no version of the op runs much faster."""
        moved = op.bytes_of(case) / self.copy_bytes_per_second
        rates = self.operations_per_second
        # bf16 may be cast to fp32, which is the faster product on many CPUs
        rate = rates["fp32"] if case.dtype == "fp32" else max(rates.values())
        return max(moved, op.operations_of(case) / rate)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Time of one call: between device events on a GPU, by the clock elsewhere."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def median_seconds(function: Callable[[], object], device: torch.device, count: int) -> float:
    for _ in range(3):
        function()
    synchronize(device)
    return statistics.median(seconds_of(function, device) for _ in range(count))


def measure_ceilings(device: torch.device, *, small: bool = False) -> Ceilings:
    """A copy on the device, both directions counted, and products of random matrices."""
    gpu = device.type == "cuda"
    count = 2**20 if small else 2**30 if gpu else 2**26
    source = torch.rand(count, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(partial(target.copy_, source), device, 10)
    copy = 2 * 4 * count / seconds
    rates = {}
    for name, dtype, size in (("bf16", torch.bfloat16, 8192), ("fp32", torch.float32, 4096)):
        size = 256 if small else size if gpu else 2048
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_seconds(partial(torch.mm, a, b, out=out), device, 7)
        rates[name] = 2 * size**3 / seconds
    return Ceilings(copy, rates)


def checked(case: Case, device: torch.device) -> Case:
    """The case with as many rows as the gate can afford in float64."""
    if not case.vocabulary:
        return case
    if case.width:
        rows = CHECKED_OPERATIONS[device.type] / (8 * case.vocabulary * case.width)
    else:
        rows = CHECKED_BYTES / (8 * case.vocabulary)
    return replace(case, tokens=max(64, min(case.tokens, int(rows) // 8 * 8)))


def reason(problem: Exception) -> str:
    """An exception in one line; a peer that can't be imported is not installed."""
    kind = "not installed" if isinstance(problem, ImportError) else type(problem).__name__
    lines = str(problem).strip().splitlines() or [""]
    return f"{kind}: {lines[0]}"[:200]


@contextlib.contextmanager
def may_fail(figure: Figure) -> Iterator[None]:
    """Write down why a peer does not run."""
    try:
        yield
    except Exception as problem:
        figure.not_run = reason(problem)
    if figure.not_run:
        release()


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pass_gate(op: Op, case: Case, device: torch.device, figures: dict[str, Figure]) -> None:
    """Fill in each peer's errors; refuse those whose outputs are wrong, or missing."""
    case = checked(case, device)
    batch = op.make(case, 0, device)
    wanted: dict[Any, Any] = {}
    for name, peer in op.peers.items():
        figure = figures[name]
        figure.computes = peer.computes
        if device.type not in peer.devices:
            figure.not_run = f"needs {' or '.join(peer.devices)}"
        if figure.not_run is not None:
            continue
        with may_fail(figure):
            exact = peer.exact or op.exact
            if exact not in wanted:
                wanted[exact] = exact(case, batch)
            figure.errors = errors(op.step(peer, batch, case), wanted[exact])
            figure.rows_checked = case.tokens
            wrong = {
                output: found
                for output, found in figure.errors.items()
                if not found <= allowed_error(name, output, case.dtype)
            }
            if wrong or not figure.errors:
                figure.not_run = f"wrong result: {wrong}"
    batch.clear()


def readings_of(
    op: Op, case: Case, batches: list[Batch], figures: dict[str, Figure], seconds: float
) -> dict[str, list[float]]:
    """Milliseconds per step of every peer that runs, read in turns for about so many seconds."""
    device = batches[0].targets.device
    repeats = {}

    def steps(peer: Peer, start: int, count: int) -> None:
        for i in range(start, start + count):
            op.step(peer, batches[i % SETS], case)

    for name, peer in op.peers.items():
        if figures[name].not_run is None:
            with may_fail(figures[name]):
                steps(peer, 0, SETS)
                synchronize(device)
                took = seconds_of(partial(steps, peer, 0, 1), device)
                repeats[name] = max(1, math.ceil(WINDOW / max(took, 1e-6)))
    readings: dict[str, list[float]] = {name: [] for name in repeats}
    began = time.monotonic()
    for turn in range(MOST_ROUNDS):
        if turn >= LEAST_ROUNDS and time.monotonic() - began > seconds:
            break
        for name, count in repeats.items():
            if figures[name].not_run is not None:
                continue
            with may_fail(figures[name]):
                took = seconds_of(partial(steps, op.peers[name], turn, count), device)
                readings[name].append(1e3 * took / count)
            for batch in batches:  # peers do not share memory for gradients
                batch.clear()
    return readings


def peak_on_gpu(op: Op, peer: Peer, case: Case, batch: Batch) -> int:
    """Peak of the allocator above the inputs during one step."""
    device = batch.targets.device
    batch.clear()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    op.step(peer, batch, case)
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    batch.clear()
    return peak


def spread(readings: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    if len(readings) == 1:
        return dict.fromkeys(("median", "p20", "p80"), readings[0])
    fifths = statistics.quantiles(readings, n=5, method="inclusive")
    return {"median": statistics.median(readings), "p20": fifths[0], "p80": fifths[-1]}


def measure(
    case: Case,
    device: torch.device,
    ceilings: Ceilings,
    seconds: float,
    *,
    memory: bool = True,
    without: Mapping[str, str] = MappingProxyType({}),
) -> list[Figure]:
    """Measure the peers on a case; the clock runs for about so many seconds.

    Args:
        without: Peers to leave out, and why.
    """
    op = op_of(case)
    figures = {name: Figure(case, name, device.type) for name in op.peers}
    for name in figures.keys() & without.keys():
        figures[name].not_run = without[name]
    torch.compiler.reset()
    pass_gate(op, case, device, figures)
    release()
    if figures[OURS].not_run is not None:  # the gate: peers alone make no comparison
        return [figures[OURS]]
    batches = [op.make(case, 1 + i, device) for i in range(SETS)]
    readings = readings_of(op, case, batches, figures, seconds)
    floor = ceilings.floor(op, case)
    for name, peer in op.peers.items():
        figure = figures[name]
        if figure.not_run is not None or not readings.get(name):
            continue
        figure.ms = spread(readings[name])
        figure.readings = len(readings[name])
        figure.floor_ms = 1e3 * floor
        figure.share_of_floor = figure.floor_ms / figure.ms["median"]
        if memory and device.type == "cuda":
            figure.peak_bytes = peak_on_gpu(op, peer, case, batches[0])
    del batches
    release()
    if memory and device.type == "cpu":
        for name in readings:
            if figures[name].ms:
                figures[name].peak_bytes = peak_in_fresh_process(case, name)
    return list(figures.values())
