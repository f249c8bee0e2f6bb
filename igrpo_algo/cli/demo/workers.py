"""Processes that train the demo's runs, one thread each: a tiny model gains nothing from two."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from ...files import write_whole
from .runs import DemoConfig, Run, share_runs

SHIPPED_WEIGHTS = Path(__file__).with_name("warm.safetensors")
MAX_WORKERS = 8
TAIL = 2000


def default_workers() -> int:
    """Return the number of cores that this process may use, at most eight."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return min(cores, MAX_WORKERS)


def prepare_weights(config: DemoConfig, output_dir: Path, *, say: Callable[[str], None]) -> None:
    """Put the warmed weights into a folder that lacks them: the shipped ones, or new ones."""
    weights = output_dir / "warm.safetensors"
    if weights.exists():
        return
    if config.warm_up:
        say("Warming the model up on a teacher's answers ...")
        subprocess.run(_python("igrpo_algo.cli.demo.warmup", str(weights)), check=True)
    else:
        write_whole(weights, SHIPPED_WEIGHTS.read_bytes())


class Workers:
    """Worker processes for a list of runs; a context manager that leaves none behind.

    What a worker prints goes to `runs/worker-<k>.log`.

    Raises:
        RuntimeError: From `running`, when a worker failed; the message ends as its log does.
    """

    def __init__(self, output_dir: Path, runs: Sequence[Run], count: int) -> None:
        self.output_dir = output_dir
        self.shares = share_runs(runs, count)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.logs: list[IO[bytes]] = []

    def __enter__(self) -> "Workers":
        folder = self.output_dir / "runs"
        folder.mkdir(parents=True, exist_ok=True)
        for index, share in enumerate(self.shares):
            log = (folder / f"worker-{index}.log").open("wb")
            self.logs.append(log)
            command = _python(
                "igrpo_algo.cli.demo.training", str(self.output_dir), *(run.name for run in share)
            )
            self.processes.append(
                subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=_environment())
            )
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            process.wait()
        for log in self.logs:
            log.close()

    def running(self) -> bool:
        """Say whether a worker is still at work."""
        codes = [process.poll() for process in self.processes]
        for index, code in enumerate(codes):
            if code:
                log = self.output_dir / "runs" / f"worker-{index}.log"
                tail = log.read_text(errors="replace")[-TAIL:]
                raise RuntimeError(f"worker {index} ended with code {code}; {log} ends:\n{tail}")
        return None in codes


def _python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
