"""`igrpo train`: train a model with iGRPO on a prompt set, through `IGRPOTrainer`."""

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..files import sole_writer
from ..rollouts.scoring import Reward
from . import options
from .data import Row
from .errors import usage_errors
from .metrics_file import MetricsFile, Record, write_json
from .run_config import Settings, build_config, parse_assignments, read_config_file
from .run_folder import Checkpoint, check_settings, digest, last_checkpoint, save_settings
from .samplers import CHOICES, check_sampler_name, make_sampler

if TYPE_CHECKING:
    from datasets import Dataset

    from ..trainers.trl.config import IGRPOConfig
    from ..trainers.trl.trainer import IGRPOTrainer

# What may change when a run is resumed: its length, and what is saved and logged.
FREE_ON_RESUME = frozenset({
    "max_steps", "num_train_epochs", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "run_name", "disable_tqdm",
})  # fmt: skip

SUMMARY = "summary.json"

# What the table at the end shows besides `igrpo/...`; a run logs one of the two entropies.
IN_SUMMARY = frozenset({
    "reward", "entropy", "entropy/nonzero_advantage", "frac_reward_zero_std",
    "completions/mean_length",
})  # fmt: skip


@dataclass(frozen=True)
class Job:
    """A training run whose arguments are checked; no model is loaded yet."""

    model: str
    tokenizer: Any
    rewards: Mapping[str, Reward]
    rows: list[Row]
    eval_rows: list[Row] | None
    config: "IGRPOConfig"
    peft: Any
    settings: Settings
    resume: bool
    sampler: str | None = None


def train(
    model: options.Model,
    dataset: options.Dataset,
    reward: options.Rewards = "math",
    reward_weights: Annotated[
        str | None, typer.Option(help="One number per reward, separated by commas (all 1).")
    ] = None,
    output_dir: Annotated[
        Path, typer.Option(help="Checkpoints, metrics.jsonl, summary.json and the final model.")
    ] = Path("runs/train"),
    num_drafts: Annotated[int | None, typer.Option(help="Drafts per prompt (4).")] = None,
    num_refinements: Annotated[int | None, typer.Option(help="Refinements per prompt (4).")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate (1e-6).")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; wins over epochs (3 epochs; paper 1).")
    ] = None,
    max_completion_length: Annotated[
        int | None, typer.Option(help="Maximum tokens of a completion (512; paper 4096).")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Sampling temperature (1.0; paper 0.7).")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and sampling (42).")] = None,
    paper: Annotated[
        bool, typer.Option("--paper", help="Start from the paper's settings (IGRPOConfig.paper).")
    ] = False,
    config: Annotated[
        Path | None, typer.Option(help="JSON or YAML with fields of IGRPOConfig.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for any field of IGRPOConfig.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last complete checkpoint, if any.")
    ] = False,
    eval_dataset: Annotated[
        str | None, typer.Option(help="Prompts to evaluate on during training.")
    ] = None,
    eval_split: Annotated[
        str | None, typer.Option(help="Split of the evaluation set (test).")
    ] = None,
    split: options.Split = None,
    dataset_config: options.DatasetConfig = None,
    question_column: options.QuestionColumn = None,
    answer_column: options.AnswerColumn = None,
    system_prompt: options.SystemPrompt = None,
    limit: options.Limit = None,
    peft_r: Annotated[int | None, typer.Option(help="Train LoRA adapters of this rank.")] = None,
    sampler: Annotated[
        str | None, typer.Option(help=f"What draws, in TRL's place: {CHOICES}.")
    ] = None,
    chat_template_kwargs: options.ChatTemplateKwargs = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train a model with iGRPO.

    Settings come from the paper's preset (with --paper), then --config, then the options here, then
    --set; later ones win. --resume continues a run that was killed from its last checkpoint, or
    starts one if there is none. Nothing is written over: without --resume a folder that holds a
    checkpoint is refused, and a finished run that kept none in any case. So is --resume with other
    settings; only these may change: max_steps, num_train_epochs, save_steps, save_total_limit,
    logging_steps, report_to, run_name and disable_tqdm.
    """
    flags: Settings = {
        "num_drafts": num_drafts,
        "num_refinements": num_refinements,
        "learning_rate": learning_rate,
        "max_steps": max_steps,
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "seed": seed,
        "trust_remote_code": trust_remote_code or None,
    }
    reading: dict[str, Any] = {
        "question_column": question_column,
        "answer_column": answer_column,
        "system_prompt": system_prompt,
        "limit": limit,
        "config": dataset_config,
    }
    with usage_errors("train"):
        check_sampler_name(sampler)
        if eval_dataset is None and eval_split is not None:
            raise ValueError("--eval-split has no effect without --eval-dataset")
        settings = read_config_file(config) if config else {}
        flags["chat_template_kwargs"] = options.parse_kwargs(chat_template_kwargs)
        settings |= {name: value for name, value in flags.items() if value is not None}
        settings |= parse_assignments(assignments or [])
        rewards = options.load_rewards(reward)
        settings |= _reward_weights(reward_weights, list(rewards))
        arguments = build_config(
            output_dir, paper=paper, evaluates=eval_dataset is not None, settings=settings
        )
        record = {
            "model": model, "dataset": dataset, "split": split, "eval_dataset": eval_dataset,
            "eval_split": eval_split, "reward": reward, "paper": paper,
            "peft_r": peft_r, "sampler": sampler,
            **reading, **settings,
        }  # fmt: skip
        peft = _lora(peft_r)
        tokenizer = options.load_tokenizer(model, trust_remote_code=arguments.trust_remote_code)
        functions = list(rewards.values())
        reading["chat_template_kwargs"] = arguments.chat_template_kwargs
        rows = options.load_rows(dataset, tokenizer, functions, split=split, **reading)
        eval_rows = None
        if eval_dataset is not None:
            eval_rows = options.load_rows(
                eval_dataset,
                tokenizer,
                functions,
                split=eval_split,
                default_split="test",
                **reading,
            )
        record |= {"rows": digest(rows), "eval_rows": eval_rows and digest(eval_rows)}
        _check_batch(arguments, rows)
    job = Job(model, tokenizer, rewards, rows, eval_rows, arguments, peft, record, resume, sampler)
    run(job, output_dir)


def run(job: Job, output_dir: Path) -> None:
    """Train a job to its end. Its files are in the output folder, which it holds meanwhile."""
    is_first = job.config.process_index == 0
    with ExitStack() as held:
        with usage_errors("train"):
            if is_first:
                held.enter_context(sole_writer(output_dir))
            checkpoint = _checkpoint_to_resume(output_dir, job.settings, resume=job.resume)
            metrics = MetricsFile(output_dir / "metrics.jsonl")
            trainer = build_trainer(job, metrics)
        step, path = checkpoint or (-1, None)
        if is_first:
            metrics.truncate(lambda row: row["step"] <= step)
            save_settings(output_dir, job.settings)
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=path and str(path))
        trainer.save_model()
        if is_first:
            seconds = time.monotonic() - began
            summary = summarize(metrics.read(), trainer.state.global_step, seconds)
            write_json(output_dir / SUMMARY, summary)
            print_summary(summary, output_dir)


def build_trainer(job: Job, metrics: MetricsFile) -> "IGRPOTrainer":
    """Load the model and build the trainer."""
    from ..trainers.trl.trainer import IGRPOTrainer
    from .recorder import Recorder

    return IGRPOTrainer(
        job.model,
        list(job.rewards.values()),
        job.config,
        train_dataset=as_dataset(job.rows),
        eval_dataset=as_dataset(job.eval_rows) if job.eval_rows else None,
        processing_class=job.tokenizer,
        peft_config=job.peft,
        sampler=make_sampler(job.sampler, job.model, job.tokenizer, job.config),
        callbacks=[Recorder(metrics)],
    )


def as_dataset(rows: list[Row]) -> "Dataset":
    """Make the trainer's data set of rows; the cells of a column may be of several types."""
    from datasets import Dataset

    return Dataset.from_list(rows, on_mixed_types="use_json")


def _checkpoint_to_resume(
    output_dir: Path, settings: Settings, *, resume: bool
) -> Checkpoint | None:
    checkpoint = last_checkpoint(output_dir)
    if checkpoint is None:
        if (output_dir / SUMMARY).exists():
            raise ValueError(
                f"{output_dir} holds a finished run without a checkpoint to continue: choose "
                "another --output-dir"
            )
        return None
    if not resume:
        raise ValueError(
            f"{output_dir} holds {checkpoint.path.name} of an earlier run: add --resume to "
            "continue it, or choose another --output-dir"
        )
    check_settings(output_dir, settings, free=FREE_ON_RESUME)
    return checkpoint


def _reward_weights(text: str | None, names: Sequence[str]) -> Settings:
    if text is None:
        return {}
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--reward-weights wants numbers separated by commas, got {text!r}"
        ) from None
    if len(weights) != len(names):
        raise ValueError(
            f"--reward-weights must have one number per reward: {len(weights)} for {len(names)}"
        )
    if not any(weights):
        raise ValueError(f"--reward-weights must not all be 0, got {text!r}")
    return {"reward_weights": weights}


def _lora(rank: int | None) -> Any:
    if rank is None:
        return None
    if rank < 1:
        raise ValueError(f"--peft-r must be >= 1, got {rank}")
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _check_batch(config: "IGRPOConfig", rows: Sequence[Row]) -> None:
    assert config.generation_batch_size is not None
    prompts = config.generation_batch_size // config.num_refinements
    if prompts > len(rows):
        raise ValueError(
            f"a batch takes {prompts} prompts (per_device_train_batch_size * processes * "
            f"steps_per_generation / num_refinements) and the data set has {len(rows)}"
        )


def summarize(rows: Sequence[Record], steps: int, seconds: float) -> Record:
    """Collect how the run began and ended: its first and last training rows."""
    training = [row for row in rows if "reward" in row]
    first, last = (training[0], training[-1]) if training else ({}, {})
    return {"steps": steps, "seconds": round(seconds, 1), "first": first, "last": last}


def print_summary(summary: Record, output_dir: Path) -> None:
    """Print the first and last values of the main metrics, side by side."""
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "first", "last", title=f"{summary['steps']} steps")
    names = [
        name
        for name in summary["first"] | summary["last"]
        if name in IN_SUMMARY or name.startswith("igrpo/")
    ]
    for name in names:
        values = (summary[when].get(name) for when in ("first", "last"))
        table.add_row(name, *("-" if value is None else f"{value:.4g}" for value in values))
    console = Console(width=None if os.isatty(1) else 100)
    console.print(table)
    console.print(f"model and metrics: {output_dir}", soft_wrap=True)
