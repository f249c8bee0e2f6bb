"""`igrpo demo`: GRPO and iGRPO side by side, on this machine, without a GPU and without a hub."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ...files import sole_writer, write_whole
from ..errors import usage_errors
from ..metrics_file import write_json
from ..run_folder import SETTINGS, check_settings, save_settings
from .runs import ARMS, DEFAULT_ARMS, DemoConfig, Run
from .verdict import summarize, takeaway, write_verdict
from .workers import Workers, default_workers, prepare_weights

MADE_HERE = (
    *("runs", SETTINGS, "warm.safetensors"),
    *("metrics.jsonl", "summary.json", "verdict.txt", "curves.png"),
)
POLL_SECONDS = 1.0


class ExtraArm(StrEnum):
    """Arms besides the three that the demo compares."""

    BOTH_BEST = "both-best"
    RANDOM = "random"


def demo(
    output_dir: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("runs/demo"),
    arm: Annotated[
        list[ExtraArm] | None,
        typer.Option(help="One more arm. Repeatable."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds per arm.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Updates per run.")] = DemoConfig.steps,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Runs at a time; by default one per core, at most 8.")
    ] = None,
    warm_up: Annotated[
        bool, typer.Option("--warm-up", help="Remake the warmed weights instead of the shipped.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw earlier runs away.")] = False,
) -> None:
    """Train a tiny model with GRPO and two forms of iGRPO, and say what to train with.

    GRPO samples 8 completions per prompt, iGRPO 4 drafts and 4 refinements: the paper's form, which
    refines the best draft, and the one that trains on the drafts too and refines the worst.

    A stopped demo continues where it was; for a finished one, only the picture is drawn again.
    """
    console = Console(highlight=False, markup=False, soft_wrap=True)
    config = DemoConfig(steps=steps, warm_up=warm_up)
    arms = [*DEFAULT_ARMS, *dict.fromkeys(extra.value for extra in arm or ())]
    runs = [Run(name, seed) for seed in range(seeds) for name in arms]
    with ExitStack() as held:
        with usage_errors("demo"):
            held.enter_context(sole_writer(output_dir))
            if fresh:
                clear(output_dir)
            if (output_dir / SETTINGS).exists():
                check_settings(output_dir, asdict(config))
            save_settings(output_dir, asdict(config))
        finish(config, runs, output_dir, console, workers or default_workers())


def finish(
    config: DemoConfig, runs: Sequence[Run], output_dir: Path, console: Console, workers: int
) -> None:
    """Train the runs that have no result yet, and report on all."""
    open_runs = [run for run in runs if run.result(output_dir) is None]
    if not open_runs:
        console.print(f"All {len(runs)} runs in {output_dir} are finished; --fresh starts again.")
    else:
        to_go = f"{len(open_runs)} of {len(runs)} runs to go"
        console.print(f"{to_go}, {config.steps} steps each, in {output_dir}")
        try:
            train(config, open_runs, output_dir, console, workers)
        except KeyboardInterrupt:
            console.print("Stopped. The same command continues from the last checkpoints.")
            raise typer.Exit(130) from None
        except RuntimeError as error:
            console.print(str(error))
            raise typer.Exit(1) from error
    report(config, runs, output_dir, console)


def clear(output_dir: Path) -> None:
    """Remove what an earlier demo made in a folder, and nothing else."""
    for name in MADE_HERE:
        path = output_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def train(
    config: DemoConfig, runs: Sequence[Run], output_dir: Path, console: Console, workers: int
) -> None:
    """Train the runs in worker processes and show how far they are."""
    began = time.monotonic()
    prepare_weights(config, output_dir, say=console.print)
    with Workers(output_dir, runs, workers) as pool, RunProgress(config, runs, console) as progress:
        while pool.running():
            time.sleep(POLL_SECONDS)
            progress.show(read_metrics(runs, output_dir))
        progress.show(read_metrics(runs, output_dir))
    console.print(f"Trained in {time.monotonic() - began:.0f} s.")


class RunProgress:
    """A bar per run; without a terminal, a line per held-out evaluation."""

    def __init__(self, config: DemoConfig, runs: Sequence[Run], console: Console) -> None:
        self.config, self.console = config, console
        self.accuracies: dict[Run, int] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  held-out {task.fields[accuracy]}"),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.tasks = {
            run: self.progress.add_task(
                describe(run), total=config.steps, accuracy="", start=False, visible=True
            )
            for run in runs
        }

    def __enter__(self) -> "RunProgress":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Move the bars to where the metrics files are."""
        for run, task in self.tasks.items():
            own = [row for row in rows if (row["arm"], row["seed"]) == (run.arm, run.seed)]
            evaluations = [row for row in own if row["split"] == "held-out"]
            if not evaluations:
                continue
            self.progress.start_task(task)
            accuracy = f"{100 * evaluations[-1]['accuracy']:5.1f} %"
            self.progress.update(task, completed=own[-1]["step"], accuracy=accuracy)
            if not self.console.is_terminal and len(evaluations) > self.accuracies.get(run, 0):
                self.accuracies[run] = len(evaluations)
                step = evaluations[-1]["step"]
                self.console.print(
                    f"{describe(run)}: step {step} of {self.config.steps}, held-out {accuracy}"
                )


def describe(run: Run) -> str:
    """Name a run for people."""
    return f"{ARMS[run.arm].label}, seed {run.seed}"


def read_metrics(runs: Sequence[Run], output_dir: Path) -> list[dict[str, Any]]:
    """Read the metrics of several runs, one run after the other."""
    return [row for run in runs for row in run.metrics(output_dir).read()]


def report(config: DemoConfig, runs: Sequence[Run], output_dir: Path, console: Console) -> None:
    """Write metrics.jsonl, summary.json, verdict.txt and curves.png; print the verdict."""
    from .plots import build_figure, save_figure

    rows = read_metrics(runs, output_dir)
    results: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        result = run.result(output_dir)
        assert result is not None
        results.setdefault(run.arm, []).append(result)
    summary = summarize(config, results, rows)
    verdict = write_verdict(summary)
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_whole(output_dir / "metrics.jsonl", lines.encode())
    write_json(output_dir / "summary.json", {**summary, "verdict": verdict})
    write_whole(output_dir / "verdict.txt", f"{verdict}\n".encode())
    labels = {arm: ARMS[arm].label for arm in results}
    save_figure(build_figure(rows, labels, title(summary)), output_dir / "curves.png")
    console.print(f"\n{verdict}\n")
    console.print(f"Curves: {output_dir / 'curves.png'}; numbers: {output_dir / 'summary.json'}")


def title(summary: Mapping[str, Any]) -> str:
    """Say above the picture what it shows."""
    seeds = len(summary["seeds"])
    lines = f"{seeds} seeds, thin; their mean, thick" if seeds > 1 else "1 seed"
    return f"{takeaway(summary)}\nA tiny Qwen3 on chains of five operations modulo 16 ({lines})"
