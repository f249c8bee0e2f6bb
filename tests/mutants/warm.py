"""Run pytest again and again in forks of one process that has imported what no fault is in.

A worker of `run.py` starts it as `python warm.py MODULE ...` in a copy of the project, writes one
JSON list of pytest arguments per line, and reads one exit code per line. The copy's own packages
are never imported here, so each fork imports them as they stand on disk.
"""

import importlib
import json
import os
import signal
import sys
import time

import pytest

TIMED_OUT = -1
QUIET = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--assert=plain"]


def run_in_fork(arguments: list[str], timeout: float) -> int:
    """Run pytest in a child process group, which is killed after `timeout` seconds."""
    child = os.fork()
    if child == 0:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nothing, stream)
        os._exit(int(pytest.main([*QUIET, *arguments])))
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return TIMED_OUT


def main() -> None:
    timeout, *modules = sys.argv[1:]
    for module in modules:
        importlib.import_module(module)
    for line in sys.stdin:
        print(run_in_fork(json.loads(line), float(timeout)), flush=True)


if __name__ == "__main__":
    main()
