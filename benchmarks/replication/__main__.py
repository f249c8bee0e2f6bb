"""The command: do the runs, or make the pages of what is recorded."""

import argparse
import os
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path

from rich.console import Console

from benchmarks.options import positive
from benchmarks.replication.arms import ARMS, SEEDS
from benchmarks.replication.models import PRETRAINED, SHIPPED, SIZES
from benchmarks.replication.sweep import plan, sweep
from benchmarks.replication.tasks import ALL_TASKS, TASKS
from benchmarks.replication.training import Settings

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/results/replication"
WEIGHTS = ROOT / "runs/replication-weights"
SMOKE = Settings(
    steps=6, prompts=8, evaluations=1, held_out=64, samples=2, rounds=2, warm_up_steps=60
)

REAL = Settings(steps=100, prompts=32, learning_rate=1e-5)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.replication",
        description="Measure arms x seeds x tasks, or make the pages of what is recorded.",
    )
    options.add_argument("what", nargs="?", choices=["run", "map"], default="run")
    options.add_argument("--smoke", action="store_true", help="every arm, tiny: ten minutes")
    options.add_argument(
        "--arm", action="append", choices=ARMS, help="repeatable; default: those planned"
    )
    options.add_argument("--task", action="append", choices=ALL_TASKS, help="repeatable")
    options.add_argument("--size", choices=[*SIZES, PRETRAINED], default=SHIPPED)
    options.add_argument("--seeds", type=positive, help="default: 5, with --smoke 1")
    options.add_argument("--workers", type=positive, default=min(os.cpu_count() or 1, 8))
    options.add_argument("--folder", type=Path, help="of the records")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    folder = options.folder or (ROOT / "runs/replication-smoke" if options.smoke else RECORDS)
    if options.what == "map":
        from benchmarks.replication.page import write_pages

        write_pages(folder)
        return 0
    pretrained = options.size == PRETRAINED
    settings = SMOKE if options.smoke else REAL if pretrained else Settings()
    console = Console(highlight=False, soft_wrap=True)
    try:
        runs = plan(
            options.arm or (),
            options.task or (["words"] if pretrained else [*TASKS]),
            options.seeds or (1 if options.smoke else SEEDS),
            options.size,
        )
        failures = sweep(runs, settings, folder, WEIGHTS, workers=options.workers, console=console)
    except (FileNotFoundError, ValueError) as error:
        console.print(str(error))
        return 2
    except BrokenExecutor:
        console.print("A worker was killed; the same command goes on with the runs that are open.")
        return 1
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on with the runs that have not ended.")
        return 130
    console.print(f"{failures} of {len(runs)} runs did not finish")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
