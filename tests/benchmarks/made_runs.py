"""A recorded run made by hand, for the tests of what reads one."""

import json
from typing import Any

import torch

from benchmarks import results
from benchmarks.cases import Case
from benchmarks.measure import Figure

CASE = Case("linear_policy_loss", "forward and backward", "bf16", 2048, 32768, 768, 0.3)


def figure(peer: str, median: float, case: Case = CASE, **more: Any) -> Figure:
    ms = {"median": median, "p20": 0.95 * median, "p80": 1.05 * median}
    values = {"ms": ms, "peak_bytes": 2**30, "errors": {"loss": 3e-7}, "share_of_floor": 0.5}
    return Figure(case, peer, "cpu", **values | more)


def run_of(*figures: Figure, date: str = "2026-11-24 21:05", name: str = "A CPU") -> results.Record:
    made = results.new_record(torch.device("cpu"), None, "abc123")
    made |= {"hardware": {"name": name, "cores": 2, "threads": 2}, "date": date, "finished": True}
    made["ceilings"] = {"copy_bytes_per_second": 2e10, "operations_per_second": {"fp32": 4e11}}
    results.add(made, list(figures))
    return json.loads(json.dumps(made))


def run() -> results.Record:
    """Ours at 20 ms, TRL at 80, one that computes something else at 40, one not installed."""
    return run_of(
        figure("igrpo", 20.0),
        figure("TRL", 80.0),
        figure("QuACK CE", 40.0, computes="cross entropy of every row"),
        Figure(CASE, "Liger", "cpu", not_run="not installed: No module named 'liger'"),
    )
