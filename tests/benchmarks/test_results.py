"""A recorded run: written case by case, held against the last one, and shown in README."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check, record, results, speed_table
from benchmarks.cases import Case
from benchmarks.measure import Figure

CASE = Case("linear_policy_loss", "forward and backward", "bf16", 2048, 32768, 768, 0.3)


def figure(peer: str, median: float, **more: Any) -> Figure:
    ms = {"median": median, "p20": 0.95 * median, "p80": 1.05 * median}
    values = {"ms": ms, "peak_bytes": 2**30, "errors": {"loss": 3e-7}, "share_of_floor": 0.5}
    return Figure(CASE, peer, "cpu", **values | more)


@pytest.fixture
def run() -> results.Record:
    made = results.new_record(torch.device("cpu"), None, "abc123")
    made["hardware"] = {"name": "A CPU", "cores": 2, "threads": 2}
    made["date"] = "2026-11-24 21:05"
    quack = figure("QuACK CE", 40.0, computes="cross entropy of every row")
    results.add(made, [figure("igrpo", 20.0), figure("TRL", 80.0), quack])
    missing = Figure(CASE, "Liger", "cpu", not_run="ImportError: no")
    results.add(made, [missing])
    return json.loads(json.dumps(made))


def test_a_name_that_sorts_by_date(run: results.Record) -> None:
    assert results.default_path(run).name == "2026-11-24-2105-a-cpu.json"


def test_what_fell_by_more_than_its_spread(run: results.Record) -> None:
    now = copy.deepcopy(run)
    assert results.fallen(now, run) == []
    ours, trl, _, liger = now["figures"]
    ours["ms"] = {"median": 23.0, "p20": 22.0, "p80": 24.0}  # 3 ms more, spread 2
    trl["ms"]["median"] = 87.0  # 7 more, spread 8
    (line,) = results.fallen(now, run)
    assert line.startswith("igrpo: linear_policy_loss")
    assert line.endswith("20 -> 23 ms")
    trl["peak_bytes"] *= 2
    assert any(line.startswith("TRL") and "MiB" in line for line in results.fallen(now, run))
    ran = {**liger, "not_run": None}
    before = {**run, "figures": [ran]}
    assert "now not: ImportError" in results.fallen(now, before)[0]


def test_the_last_run_on_the_same_hardware(run: results.Record, tmp_path: Path) -> None:
    names = ["2026-11-01-0000-a.json", "2026-11-02-0000-a.json", "2026-11-03-0000-b.json"]
    for name in names:
        other = {**run, "hardware": {"name": name[-6:-5]}}
        results.write(other, tmp_path / name)
    now = {**run, "hardware": {"name": "a"}}
    found = results.last_before(now, tmp_path / "2026-11-04-0000-a.json", tmp_path)
    assert found is not None
    assert found[0].name == names[1]
    nothing = {**run, "hardware": {"name": "c"}}
    assert results.last_before(nothing, tmp_path / "2026-11-04-0000-c.json", tmp_path) is None


def test_the_table_of_a_run(run: results.Record) -> None:
    table = speed_table.table_of(run, "benchmarks/results/x.json")
    lines = table.splitlines()
    assert "A CPU, 2 cores, 2 threads" in lines[0]
    assert "2026-11-24, commit abc123 ([every figure](benchmarks/results/x.json)):" in lines[0]
    assert lines[2] == "| op | size | igrpo | TRL | QuACK CE | error |"
    assert lines[4] == (
        "| `linear_policy_loss`, forward and backward | bf16, T=2048 H=768 V=32768, 30% active "
        "| 20, 1024 | 80 (0.25), 1024 | 40 (0.50), 1024* | 3e-07 |"
    )
    assert "*QuACK CE: cross entropy of every row." in table


def test_the_table_between_the_markers(run: results.Record, tmp_path: Path) -> None:
    results.write(run, tmp_path / "benchmarks/results/x.json")
    table = speed_table.table(["benchmarks/results/x.json"], tmp_path)
    assert table.endswith(speed_table.NO_GPU)
    text = f"before\n{speed_table.BEGIN}\nold\n{speed_table.END}\nafter\n"
    new = speed_table.replaced(text, table)
    assert speed_table.between_markers(new) == table
    assert speed_table.named_runs(new) == ["benchmarks/results/x.json"]
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    with pytest.raises(ValueError, match="speed:begin"):
        speed_table.replaced("no markers", table)


def test_readme_shows_what_the_recorded_runs_give() -> None:
    readme = (speed_table.ROOT / "README.md").read_text()
    shown = speed_table.between_markers(readme)
    paths = speed_table.named_runs(readme)
    assert shown is None or paths
    assert shown in (None, speed_table.table(paths))


def test_a_run_records_case_by_case_and_says_what_was_left_out(tmp_path: Path) -> None:
    arguments = ["--small", "--device", "cpu", "--only", "clipped", "--no-memory", "--no-plots"]
    path = tmp_path / "2026-11-24-0000-x.json"
    without = ["--without", "torch.compile", "--output", str(path)]
    assert record.main([*arguments, *without]) == 0
    written = json.loads(path.read_text())
    assert written["finished"]
    by_peer = {figure["peer"]: figure for figure in written["figures"]}
    assert by_peer["igrpo"]["ms"]["median"] > 0
    assert by_peer["torch.compile"]["not_run"] == "left out of this run"
    assert record.main([*arguments, *without, "--seconds", "-1"]) == 0
    assert len(json.loads(path.read_text())["left_out"]) == 1


def test_the_report_of_a_red_test_is_read(tmp_path: Path) -> None:
    suite = tmp_path / "test_it.py"
    suite.write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    outcome = gpu_check.run_suite([str(suite)], 120)
    assert outcome["exit_code"] == 1
    assert (outcome["tests"], outcome["failures"]) == (2, 1)
    ((name, message),) = outcome["failed"].items()
    assert name.endswith("::test_bad")
    assert "assert 1 == 2" in message


def test_quick_and_small_choose_fewer_tests() -> None:
    parser = record.parser()
    full = gpu_check.suites(parser.parse_args(["--device", "cuda"]))
    quick = gpu_check.suites(parser.parse_args(["--device", "cuda", "--quick"]))
    assert list(full) == ["on the device", "without it"]
    assert list(quick) == ["on the device"]
    assert "gpu" in full["on the device"]
    assert "not gpu" in gpu_check.suites(parser.parse_args(["--device", "cpu"]))["on the device"]
