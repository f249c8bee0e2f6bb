"""Two recorded runs side by side: what counts as fallen back, and which run is the baseline."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import CASE, figure, run, run_of

from benchmarks import compare, results
from benchmarks.compare import against_baseline, baseline, fallen, lost, rows


def test_our_share_of_the_fastest_peer() -> None:
    (row,) = rows(run())
    best = row.over_fastest()
    assert best is not None
    assert (best.peer, best.value) == ("QuACK CE", 0.5)
    assert best.spread == pytest.approx(0.2)
    assert str(row.over_fastest({"TRL", "Liger"})) == "0.25 of TRL's"
    assert row.over_fastest({"Liger"}) is None


def test_a_clock_that_moves_for_all_is_no_change() -> None:
    slower = run_of(figure("igrpo", 40.0), figure("TRL", 160.0))
    assert fallen(slower, run()) == []


def test_a_share_falls_by_more_than_the_readings_lie_apart() -> None:
    before = run_of(figure("igrpo", 20.0), figure("TRL", 80.0))
    within = run_of(figure("igrpo", 23.9), figure("TRL", 80.0))
    beyond = run_of(figure("igrpo", 24.1), figure("TRL", 80.0))
    assert fallen(within, before) == []
    (line,) = fallen(beyond, before)
    assert line == f"{CASE}: 0.25 of TRL's -> 0.30 of TRL's time"


def test_a_peer_that_ran_in_one_of_the_runs_alone_decides_nothing() -> None:
    before = run_of(figure("igrpo", 20.0), figure("TRL", 80.0))
    now = run_of(figure("igrpo", 20.0), figure("TRL", 80.0), figure("QuACK CE", 5.0))
    assert fallen(now, before) == []
    assert fallen(run_of(figure("igrpo", 20.0), figure("QuACK CE", 5.0)), before) == []


def test_memory_counts_by_its_bytes() -> None:
    before = run()
    more = copy.deepcopy(before)
    more["figures"][0]["peak_bytes"] *= 2
    assert fallen(more, before) == [f"{CASE}: 1024 -> 2048 MiB"]
    more["figures"][0]["peak_bytes"] = 1.04 * 2**30
    assert fallen(more, before) == []


def test_other_sizes_are_not_compared() -> None:
    other = replace(CASE, tokens=CASE.tokens + 8)
    assert fallen(run_of(figure("igrpo", 900.0, other), figure("TRL", 1.0, other)), run()) == []


def test_who_ran_then_and_not_now() -> None:
    before, now = run(), run()
    trl = now["figures"][1]
    trl["not_run"] = "not installed: No module named 'trl'"
    assert lost(now, before) == [f"{CASE}: TRL ran then, now: {trl['not_run']}"]
    assert lost(before, now) == []


def test_the_baseline_is_the_newest_earlier_run_on_the_same_hardware(tmp_path: Path) -> None:
    kept = {
        "2026-11-01-b": run_of(date="2026-11-01 10:00", name="b"),
        "2026-11-02-a": run_of(date="2026-11-02 10:00", name="a"),
        "2026-11-03-b": run_of(date="2026-11-03 10:00", name="b"),
        "2026-11-09-a": run_of(date="2026-11-09 10:00", name="a"),
        "2026-11-03-gpu": run_of(date="2026-11-03 11:00") | {"device": "cuda"},
        "2026-11-03-step": {**run_of(date="2026-11-03 12:00"), "ceilings": None},
    }
    for name, record in kept.items():
        results.write(record, tmp_path / f"{name}.json")

    def found(**change: str) -> str | None:
        past = baseline(run_of(**change), tmp_path)
        return past and past[0].stem

    assert found(date="2026-11-05 10:00", name="a") == "2026-11-02-a"
    assert found(date="2026-11-05 10:00", name="never seen") == "2026-11-03-b"
    assert found(date="2026-11-01 10:00", name="a") is None


def test_the_comparison_in_words(tmp_path: Path) -> None:
    now = run_of(figure("igrpo", 60.0), figure("TRL", 80.0), date="2026-12-01 10:00")
    assert against_baseline(now, tmp_path) == ["no earlier run on such a device to compare with"]
    results.write(run(), tmp_path / "2026-11-24-a.json")
    first, *lines = against_baseline(now, tmp_path)
    assert first == "against 2026-11-24-a.json: 1 fell back"
    assert len(lines) == 1
    now["figures"][0]["ms"]["median"] = 20.0
    assert against_baseline(now, tmp_path) == ["against 2026-11-24-a.json: nothing fell back"]


@pytest.mark.parametrize(
    ("value", "text"), [(52.3, "52.3"), (17.04, "17.0"), (99.96, "100"), (6064.2, "6,064")]
)
def test_numbers_of_three_digits(value: float, text: str) -> None:
    assert compare.number(value) == text
