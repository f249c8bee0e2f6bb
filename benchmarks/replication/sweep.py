"""Many runs side by side, in processes of one thread each; what has ended is never done again."""

import os
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context, parent_process
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.replication import runs
from benchmarks.replication.arms import MAIN, STRIPPED, planned
from benchmarks.replication.models import PRETRAINED
from benchmarks.replication.runs import Run
from benchmarks.replication.tasks import ALL_TASKS, WORD_TASKS
from benchmarks.replication.training import Settings


def plan(arms: Sequence[str], tasks: Sequence[str], seeds: int, size: str) -> list[Run]:
    """Order the runs: the main arms first; within them task by task, and seed by seed.

    So a sweep that is stopped has the same seeds for all arms of a task. Without `arms`, each task
    gets those planned.

    Raises:
        ValueError: A task does not go with the size of the model, or an arm with a task.
    """
    for task in tasks:
        if (size == PRETRAINED) is not (task in WORD_TASKS):
            raise ValueError(
                f"--task {task} does not go with --size {size}: word problems are for "
                f"{PRETRAINED}, all other tasks for models that are trained from scratch"
            )
        for arm in () if ALL_TASKS[task].thinks else STRIPPED.keys() & {*arms}:
            raise ValueError(
                f"--arm {arm} is {STRIPPED[arm]} once more on --task {task}, which does not think"
            )
    wanted = {task: arms or list(planned(task, size)) for task in tasks}
    return [
        Run(task, size, arm, seed)
        for is_main in (True, False)
        for task, names in wanted.items()
        for seed in range(seeds)
        for arm in names
        if (arm in MAIN) is is_main
    ]


def sweep(
    wanted: Sequence[Run],
    settings: Settings,
    folder: Path,
    weights: Path,
    *,
    workers: int,
    console: Console,
) -> int:
    """Do the runs that have not ended; return how many did not finish."""
    todo = [run for run in wanted if runs.is_open(run, settings, folder)]
    console.print(f"{len(todo)} of {len(wanted)} runs to go, {settings.steps} steps each")
    failures = 0
    if not todo:
        return failures
    with (
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=prepare_worker) as pool,
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


def prepare_worker() -> None:
    """Keep a worker to one core, since a tiny model gains nothing from two; end it with its sweep.

    A pool's workers outlive a parent that was killed, and wait for work forever.
    """
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=end_with_the_sweep, daemon=True).start()


def end_with_the_sweep() -> None:
    """Wait until the sweep has ended, however it did; then end this process."""
    sweep = parent_process()
    assert sweep is not None
    sweep.join()
    os._exit(1)
