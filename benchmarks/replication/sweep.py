"""Many runs side by side, in processes of one thread each; what has ended is never done again."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.replication import runs
from benchmarks.replication.arms import MAIN
from benchmarks.replication.runs import Run
from benchmarks.replication.training import Settings


def plan(arms: Iterable[str], tasks: Iterable[str], seeds: int, size: str) -> list[Run]:
    """Order the runs: the main arms first; within them task by task, and seed by seed.

    So a sweep that is stopped has the same seeds for all arms of a task.
    """
    arms, tasks = list(arms), list(tasks)
    main = [arm for arm in arms if arm in MAIN]
    others = [arm for arm in arms if arm not in MAIN]
    return [
        Run(task, size, arm, seed)
        for group in (main, others)
        for task in tasks
        for seed in range(seeds)
        for arm in group
    ]


def sweep(
    planned: Sequence[Run],
    settings: Settings,
    folder: Path,
    weights: Path,
    *,
    workers: int,
    console: Console,
) -> int:
    """Do the runs that have not ended; return how many did not finish."""
    todo = [run for run in planned if runs.is_open(run, settings, folder)]
    console.print(f"{len(todo)} of {len(planned)} runs to go, {settings.steps} steps each")
    failures = 0
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=use_one_thread) as pool,
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
    ):
        bar = progress.add_task("warming up", total=len(todo))
        warmed = {
            (run.task, run.size): pool.submit(runs.warm, run.task, run.size, settings, weights)
            for run in todo
        }
        for future in warmed.values():
            future.result()
        futures = {pool.submit(runs.do, run, settings, folder, weights): run for run in todo}
        try:
            for future in as_completed(futures):
                run, status = futures[future], future.result()
                failures += status != runs.FINISHED
                name = f"{run.task} {run.arm} {run.seed}"
                progress.update(bar, advance=1, description=name)
                if not console.is_terminal or status != runs.FINISHED:
                    console.print(f"{name}: {status}")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failures


def use_one_thread() -> None:
    """Keep a worker to one core: a tiny model gains nothing from two."""
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
