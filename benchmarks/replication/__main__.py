"""The command: do the runs, or make the page of what is recorded."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.replication.arms import ARMS
from benchmarks.replication.models import SHIPPED, SIZES
from benchmarks.replication.sweep import plan, sweep
from benchmarks.replication.tasks import TASKS
from benchmarks.replication.training import Settings

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks/results/replication"
SMOKE = Settings(
    steps=6, prompts=8, evaluations=1, held_out=64, samples=2, rounds=2, warm_up_steps=60
)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(
        prog="python -m benchmarks.replication",
        description="Measure arms x seeds x tasks, or make the page of what is recorded.",
    )
    options.add_argument("what", nargs="?", choices=["run", "map"], default="run")
    options.add_argument("--smoke", action="store_true", help="every arm, tiny: ten minutes")
    options.add_argument("--arm", action="append", choices=ARMS, help="repeatable; default: all")
    options.add_argument("--task", action="append", choices=TASKS, help="repeatable; default: all")
    options.add_argument("--size", choices=SIZES, default=SHIPPED, help="width x layers")
    options.add_argument("--seeds", type=int, help="default: 5, with --smoke 1")
    options.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 8))
    options.add_argument("--folder", type=Path, help="of the records")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    folder = options.folder or (ROOT / "runs/replication-smoke" if options.smoke else RECORDS)
    if options.what == "map":
        from benchmarks.replication.page import write_page

        write_page(folder)
        return 0
    settings = SMOKE if options.smoke else Settings()
    runs = plan(
        options.arm or ARMS,
        options.task or TASKS,
        options.seeds or (1 if options.smoke else 5),
        options.size,
    )
    console = Console(highlight=False, soft_wrap=True)
    try:
        failures = sweep(
            runs,
            settings,
            folder,
            ROOT / "runs/replication-weights",
            workers=options.workers,
            console=console,
        )
    except ValueError as error:
        console.print(str(error))
        return 2
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on with the runs that have not ended.")
        return 130
    console.print(f"{failures} of {len(runs)} runs did not finish")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
