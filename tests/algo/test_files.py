"""Files written whole, and one writer at a time, however the last one ended."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_algo.files import sole_writer, write_whole

HOLDER = """
import sys, time
from igrpo_algo.files import sole_writer
with sole_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_whole_content_replaces_the_old(tmp_path):
    path = tmp_path / "new" / "file"
    write_whole(path, b"first")
    write_whole(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["file"]


def test_a_failed_write_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_whole(path, b"old")

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_second_writer_is_refused_while_the_first_one_holds(tmp_path):
    with sole_writer(tmp_path / "folder"), pytest.raises(BlockingIOError, match="folder is being"):
        sole_writer(tmp_path / "folder").__enter__()
    with sole_writer(tmp_path / "folder"):
        pass


def test_others_may_write_other_files(tmp_path):
    with sole_writer(tmp_path / "a"), sole_writer(tmp_path / "b"):
        write_whole(tmp_path / "b" / "file", b"whole")
    assert (tmp_path / "b" / "file").read_bytes() == b"whole"


def test_a_killed_process_holds_nothing(tmp_path):
    command = [sys.executable, "-c", HOLDER, tmp_path / "journal"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(BlockingIOError, match="journal is being written by another run"):
            sole_writer(tmp_path / "journal").__enter__()
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with sole_writer(tmp_path / "journal"):
        pass
