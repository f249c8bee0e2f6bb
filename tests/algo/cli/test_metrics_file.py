"""Files that a killed run leaves whole."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from igrpo_algo.cli.metrics_file import MetricsFile, write_json
from igrpo_algo.files import write_whole


def test_rows_come_back_and_nonfinite_numbers_are_null(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "new" / "metrics.jsonl")
    assert file.read() == []
    file.append({"step": 1, "loss": float("nan"), "note": "a\nb"}, {"step": 2, "x": [1e300, None]})
    file.append({"step": 3, "loss": float("-inf"), "path": Path("p"), "deep": {"a": (1, True)}})
    wanted = [
        {"step": 1, "loss": None, "note": "a\nb"},
        {"step": 2, "x": [1e300, None]},
        {"step": 3, "loss": None, "path": "p", "deep": {"a": [1, True]}},
    ]
    assert file.read() == MetricsFile(file.path).read() == wanted
    assert len(file.path.read_bytes().splitlines()) == 3


@pytest.mark.parametrize("tail", [b"{", b'{"step": 3}', b'{"a": "\xc3'])
def test_a_torn_last_line_is_cut_off_on_opening(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = b'{"step": 1}\n{"step": 2}\n'
    path.write_bytes(whole + tail)
    file = MetricsFile(path)
    assert path.read_bytes() == whole
    file.append({"step": 3})
    assert [row["step"] for row in file.read()] == [1, 2, 3]


def test_truncate_keeps_what_it_is_told_to(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.truncate(lambda row: row["step"] > 0)
    assert not file.path.exists()
    file.append(*({"step": step} for step in range(5)))
    file.truncate(lambda row: row["step"] <= 2)
    assert [row["step"] for row in file.read()] == [0, 1, 2]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


@pytest.mark.parametrize("line", [b"{]", b"3", b'"a"'])
def test_a_line_that_is_wrong_is_named(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line + b"\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: (not JSON|wanted an object)"):
        MetricsFile(path)


def test_files_are_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, metrics = tmp_path / "deep" / "summary.json", MetricsFile(tmp_path / "metrics.jsonl")
    write_json(path, {"mean": float("inf"), "n": 3})
    metrics.append({"step": 1})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", die)
    with pytest.raises(KeyboardInterrupt):
        write_whole(path, b"half")
    with pytest.raises(KeyboardInterrupt):
        metrics.append({"step": 2})
    assert json.loads(path.read_text()) == {"mean": None, "n": 3}
    assert metrics.path.read_bytes() == b'{"step": 1}\n'


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import sys; from pathlib import Path\n"
        "from igrpo_algo.cli.metrics_file import MetricsFile\n"
        "file = MetricsFile(Path(sys.argv[1]))\n"
        "for step in range(10**9): file.append({'step': step, 'text': 'x' * 20_000})\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while not path.exists() or path.stat().st_size < 1_000_000:
        assert writer.poll() is None
        time.sleep(0.01)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line)["step"] for line in lines] == list(range(len(lines)))
