"""One run from its weights to its record, and where the record lies."""

import json
import math
import platform
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.replication.arms import ARMS
from benchmarks.replication.measures import mean_of, of_model, of_step
from benchmarks.replication.models import PRETRAINED, held_out_problems, load, warm_weights
from benchmarks.replication.tasks import ALL_TASKS
from benchmarks.replication.training import (
    SAMPLER,
    DivergenceError,
    Settings,
    Step,
    build_sampler,
    splice_of,
    train,
)
from igrpo_algo.cli.demo.warmup import WarmUp
from igrpo_algo.early_warning import EarlyWarning
from igrpo_algo.files import write_whole

EVALUATION_SEED = 0
FINISHED, DIVERGED, DIED = "finished", "diverged", "died"
WATCHED = {
    "copied": "copy_rate",
    "refinement_zero_std": "zero_variance",
    "draft_zero_std": "draft_zero_variance",
    "draft_reward": "reward",
    "uplift": "uplift",
    "right_after_right_draft": "after_right",
    "right_after_wrong_draft": "after_wrong",
}
"""Names of the trainer's metrics, by which the early warning knows them, and of ours."""


@dataclass(frozen=True)
class Run:
    """An arm on a task, with a size of model and a seed."""

    task: str
    size: str
    arm: str
    seed: int

    def record(self, folder: Path) -> Path:
        """Where the run is recorded once it has ended."""
        return folder / f"{self.task}-{self.size}" / f"{self.arm}-{self.seed}.json"


def read_record(run: Run, folder: Path) -> dict[str, Any] | None:
    """Read what a run found; None if it has not ended."""
    path = run.record(folder)
    return json.loads(path.read_bytes()) if path.exists() else None


def is_open(run: Run, settings: Settings, folder: Path) -> bool:
    """Say whether a run is still to be done: it has no record, or it died.

    Raises:
        ValueError: The record has other settings.
    """
    record = read_record(run, folder)
    if record is not None and record["settings"] != asdict(settings):
        raise ValueError(
            f"{run.record(folder)} was made with other settings: {record['settings']}, not "
            f"{asdict(settings)}; give another folder, or move it away"
        )
    return record is None or record["status"] == DIED


def do(run: Run, settings: Settings, folder: Path, weights: Path) -> str:
    """Do a run and record it, whatever becomes of it; return its status."""
    record = {
        **asdict(run),
        "settings": asdict(settings),
        "machine": machine(),
        "began": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "curve": [],
        "steps": [],
        "warnings": [],
    }
    try:
        for name, row in measure(run, settings, weights):
            if name == "final":
                record[name] = row
            else:
                record[name].append(row)
        record["status"] = FINISHED
    except (DivergenceError, ValueError) as error:
        # A model whose log-probs are no numbers any more is refused by the sampler's records.
        diverged = isinstance(error, DivergenceError) or "finite" in str(error)
        record |= {"status": DIVERGED if diverged else DIED, "error": describe(error)}
    except Exception as error:
        record |= {"status": DIED, "error": describe(error)}
    write_whole(run.record(folder), as_json(record))
    return record["status"]


def measure(run: Run, settings: Settings, weights: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Train and evaluate; yield points of the curve, means over steps, and the end.

    Every point says what it had cost: completions, tokens sampled and trained, and the seconds and
    CPU seconds of sampling and training (evaluations left out).
    """
    task, arm = ALL_TASKS[run.task], ARMS[run.arm]
    path = warm_path(run.task, run.size, settings, weights)
    model, tokenizer = load(task, run.size, path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    sampler = build_sampler(model, tokenizer, task)
    splice = splice_of(arm, settings, task, tokenizer)
    problems = held_out_problems(task, settings.held_out)
    spent = dict.fromkeys(
        ("completions", "sampled_tokens", "trained_tokens", "seconds", "cpu_seconds"), 0.0
    )

    def evaluate(**how: int) -> dict[str, Any]:
        return of_model(
            model, tokenizer, task, problems, splice=splice, seed=EVALUATION_SEED, **how
        )

    yield "curve", {"step": 0, **spent, **evaluate(samples=1, rounds=1)}
    rows: list[dict[str, float]] = []
    watch = EarlyWarning()
    steps = train(model, sampler, task, arm, settings, run.seed, frozenset(problems))
    for number in range(1, settings.steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        step = next(steps)
        spent["seconds"] += time.perf_counter() - wall
        spent["cpu_seconds"] += time.process_time() - cpu
        for name, count in counts(step).items():
            spent[name] += count
        rows.append(of_step(step.rollouts, splice))
        for text in watch.see({ours: rows[-1][name] for ours, name in WATCHED.items()}):
            yield "warnings", {"step": number, "text": text}
        if number in (*settings.evaluation_steps, settings.steps):
            yield "steps", {"step": number, **mean_of(rows)}
            rows = []
        if number in settings.evaluation_steps:
            yield "curve", {"step": number, **spent, **evaluate(samples=1, rounds=1)}
    final = {"step": settings.steps, **spent}
    yield "final", final | evaluate(samples=settings.samples, rounds=settings.rounds)


def counts(step: Step) -> dict[str, int]:
    """Count what a step sampled and trained."""
    completions = [
        completion
        for rollout in step.rollouts
        for stage in rollout.stages
        for completion in stage.completions
        if completion.token_ids
    ]
    return {
        "completions": len(completions),
        "sampled_tokens": sum(len(completion.token_ids) for completion in completions),
        "trained_tokens": step.trained_tokens,
    }


def warm_path(task: str, size: str, settings: Settings, weights: Path) -> Path:
    """Where the warmed weights of a task and size lie."""
    if size == PRETRAINED:
        return weights / size
    name = f"{task}-{size}-{settings.warm_up_steps}-{settings.held_out}"
    return weights / f"{name}.safetensors"


def warm(task: str, size: str, settings: Settings, weights: Path) -> None:
    """Make the warmed weights of a task and size, if they are not there."""
    warm_weights(
        ALL_TASKS[task],
        size,
        warm_path(task, size, settings, weights),
        held_out=settings.held_out,
        settings=WarmUp(steps=settings.warm_up_steps),
    )


def machine() -> dict[str, Any]:
    """Say what a run was made on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "sampler": SAMPLER.__name__,
    }


def describe(error: Exception) -> str:
    """Give an error and where it came from, in one line."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def as_json(record: Mapping[str, Any]) -> bytes:
    """Write a record: numbers of five digits, null for NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}") if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {str(name): plain(each) for name, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return value

    return json.dumps({**plain(record), "settings": record["settings"]}).encode() + b"\n"
