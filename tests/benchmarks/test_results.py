"""A run of the benchmarks: recorded case by case, ended in time, compared at the end."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from made_runs import figure, run, run_of

from benchmarks import cases, record, results
from benchmarks.measure import Ceilings

FAST = ["--small", "--device", "cpu", "--no-memory", "--no-plots", "--without", "torch.compile"]


def test_a_name_that_sorts_by_date() -> None:
    assert results.default_path(run()).name == "2026-11-24-2105-a-cpu.json"


def test_a_run_records_case_by_case_and_says_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "2026-11-24-0000-x.json"
    arguments = [*FAST, "--only", "clipped", "--output", str(path)]
    assert record.main(arguments) == 0
    written = json.loads(path.read_text())
    assert written["finished"]
    assert written["compared"][0].startswith(("against", "no earlier run"))
    by_peer = {figure["peer"]: figure for figure in written["figures"]}
    assert by_peer["igrpo"]["ms"]["median"] > 0
    assert by_peer["torch.compile"]["not_run"] == "left out of this run"
    path.unlink()
    assert record.main([*arguments, "--seconds", "-1"]) == 0
    assert len(json.loads(path.read_text())["left_out"]) == 1


def test_no_case_is_started_that_would_end_too_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now)

    def measure(case: cases.Case, *_: Any, **__: Any) -> list[Any]:
        clock.now += 10
        return [figure("igrpo", 1.0, case)]

    monkeypatch.setattr(record, "time", clock)
    monkeypatch.setattr(record, "measure", measure)
    monkeypatch.setattr(record, "measure_ceilings", lambda *_, **__: Ceilings(1.0, {}))
    options = record.parser().parse_args([*FAST, "--seconds", "35"])
    made, path = run(), tmp_path / "x.json"
    record.run_cases(options, cases.small_grid(), made, path, say=lambda line: None)
    assert len(made["left_out"]) == len(cases.small_grid()) - 3


def test_a_peer_far_behind_is_left_out_of_later_cases_if_it_costs_time() -> None:
    slow = run_of(figure("igrpo", 40.0), figure("TRL", 190.0), figure("Liger", 570.0))
    op = slow["figures"][0]["op"]
    assert record.far_behind(slow, op) == {"Liger": "left out: 14 times the fastest before"}
    assert record.far_behind(slow, "token_logprobs") == {}
    assert record.far_behind(run_of(figure("TRL", 1.0), figure("torch", 90.0)), op) == {}
    assert record.far_behind(run_of(figure("TRL", 1.0), figure("igrpo", 900.0)), op) == {}


def test_a_run_goes_on_where_it_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, measured = tmp_path / "x.json", []

    def measure(case: cases.Case, *_: Any, **__: Any) -> list[Any]:
        measured.append(case)
        return [figure("igrpo", 1.0, case)]

    monkeypatch.setattr(record, "measure", measure)
    arguments = [*FAST, "--commit", "abc123", "--output", str(path)]
    record.main([*arguments, "--only", "clipped"])
    clock = json.loads(path.read_text())["ceilings"]
    record.main(arguments)
    assert sorted(map(str, measured)) == sorted(map(str, cases.small_grid()))  # each once
    written = json.loads(path.read_text())
    assert len(written["figures"]) == len(measured)
    assert written["ceilings"] == clock
    with pytest.raises(ValueError, match="its commit is abc123, and here it is def456; give ano"):
        record.main([*arguments, "--commit", "def456"])
    path.write_text(path.read_text().replace("abc123", "abc123+"))
    with pytest.raises(ValueError, match="its commit is abc123"):
        record.main([*arguments, "--commit", "abc123+"])  # which may be other changes
    path.write_text(path.read_text().replace("abc123+", "abc123"))
    monkeypatch.setattr(results.machine, "versions", lambda device: {"torch": "9.9"})
    with pytest.raises(ValueError, match="its versions is"):
        record.main(arguments)


def test_the_grid_of_a_gpu_starts_with_what_readme_shows_and_fits_80_gb() -> None:
    grid = cases.gpu_grid()
    assert grid[:5] == cases.headlines() == cases.quick_gpu_grid()[:5]
    assert len(grid) == len(set(grid))
    for case in grid:
        head = case.vocabulary * case.width
        logits = case.tokens * case.vocabulary
        wide = 4 if case.dtype == "fp32" else 2
        # two sets of inputs with their gradients; or the gate's head and gradients in float64, for
        # two kinds of peer; either way with the logits of the ops that start from them
        inputs = 2 * 2 * wide * (head if case.width else logits)
        gate = 8 * head * 3 + wide * 2 * head if case.width else 2**33 * 3 + wide * logits
        assert max(inputs, gate) < 70e9, case
