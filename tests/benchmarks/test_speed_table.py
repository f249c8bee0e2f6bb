"""README's speed section and `docs/speed.md` are what the recorded runs give."""

from dataclasses import replace
from pathlib import Path

import pytest
from made_runs import CASE, figure, run, run_of

from benchmarks import cases, results, speed_page, speed_table


def test_readme_and_the_page_show_what_the_records_give() -> None:
    path, record = speed_table.newest()["cuda"]
    part = speed_table.readme_part(record, str(path.relative_to(speed_table.ROOT)))
    shown = speed_table.between_markers((speed_table.ROOT / "README.md").read_text())
    assert shown in (None, part)
    assert speed_table.PAGE.read_text() == speed_table.page()


def test_the_five_rows_of_readme() -> None:
    first, second, *_ = cases.headlines()
    record = run_of(
        figure("igrpo", 52.3, first),
        figure("TRL", 41.6, first, peak_bytes=None),
        figure("igrpo", 9.0, second),
    )
    text = speed_table.readme_part(record, "benchmarks/results/x.json")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 5
    assert lines[2] == (
        "| `linear_policy_loss`, forward and backward | bf16, T=8192 H=4096 V=151936 "
        "| 52.3 ms, 1,024 MiB | TRL: 41.6 ms | 1.26 |"
    )
    assert all(line.endswith("| not yet measured |") for line in lines[3:])
    assert "Measured at commit abc123" in text
    assert "(benchmarks/results/x.json)" in text


def test_the_newest_finished_run_of_each_device(tmp_path: Path) -> None:
    runs = {
        "2026-11-01-cpu": run_of(date="2026-11-01 10:00"),
        "2026-11-02-cpu": run_of(date="2026-11-02 10:00"),
        "2026-11-03-cpu": run_of(date="2026-11-03 10:00") | {"finished": False},
        "2026-11-01-gpu": run_of(date="2026-11-01 11:00") | {"device": "cuda"},
    }
    for name, record in runs.items():
        results.write(record, tmp_path / f"{name}.json")
    found = {kind: path.stem for kind, (path, _) in speed_table.newest(tmp_path).items()}
    assert list(found.items()) == [("cuda", "2026-11-01-gpu"), ("cpu", "2026-11-02-cpu")]


def test_a_table_for_each_op_with_the_peers_that_ran() -> None:
    (lines,) = speed_page.kernels(run()).values()
    assert lines == [
        ["size", "igrpo", "TRL", "QuACK CE", "error"],
        [
            "bf16, T=2048 H=768 V=32768, 30% active",
            "20.0, 1,024",
            "80.0 (0.25), 1,024",
            "40.0 (0.50), 1,024*",
            "3e-07",
        ],
    ]
    apart = run_of(figure("igrpo", 1.0), figure("igrpo", 2.0, replace(CASE, op="another")))
    assert len(speed_page.kernels(apart)) == 2


def test_what_did_not_run_is_said_once_with_its_reason() -> None:
    record = run()
    record["figures"] += record["figures"]
    record["left_out"] = ["a case", "another"]
    assert speed_page.notes(record).split("\n\n") == [
        "\n*QuACK CE: cross entropy of every row.",
        "Liger did not run: not installed: No module named 'liger'.",
        "2 more cases had no time.\n",
    ]


def test_steps_that_did_not_run_are_named() -> None:
    ran = {"ms": {"median": 50.0}, "peak_bytes": 2**31, "error": 1e-6}
    record = {
        "figures": {
            "igrpo": ran,
            "TRL": {**ran, "ms": {"median": 100.0}},
            "Liger": {"not_run": "no"},
        }
    }
    assert list(speed_page.train_step(record))[1:] == [
        ["igrpo", "50.0", "", "2.00"],
        ["TRL", "100", "0.50", "2.00"],
        ["Liger", "not run: no", "", ""],
    ]


def test_the_part_between_the_markers() -> None:
    text = f"before\n{speed_table.BEGIN}\nold\n{speed_table.END}\nafter\n"
    new = speed_table.replaced(text, "a part\n")
    assert speed_table.between_markers(new) == "a part\n"
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    with pytest.raises(ValueError, match="speed:begin"):
        speed_table.replaced("no markers", "a part\n")
