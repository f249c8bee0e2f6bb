"""The demo's training runs: GRPO and iGRPO through TRL, alike in everything but the algorithm.

A worker of the demo runs `python -m igrpo_algo.cli.demo.training FOLDER grpo-0 igrpo-1`.
"""

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from ...files import sole_writer
from ...trainers.trl.trainer import IGRPOConfig, IGRPOTrainer
from ..metrics_file import MetricsFile, write_json
from ..run_folder import last_checkpoint, load_settings
from . import chain
from .evaluation import MAX_ANSWER_TOKENS, Evaluation, evaluate
from .model import build_tokenizer, load_model
from .runs import ARMS, Arm, DemoConfig, Run

EVALUATION_SEED = 0
METRICS = {
    "reward": "reward",
    "frac_reward_zero_std": "zero_variance",
    "entropy": "entropy",
    "entropy/nonzero_advantage": "entropy_nonzero_advantage",
    "completions/mean_length": "length",
    "igrpo/draft_reward": "draft_reward",
    "igrpo/best_draft_reward": "best_draft_reward",
    "igrpo/copied": "copy_rate",
    "igrpo/draft_zero_std": "draft_zero_variance",
}
"""Names of the trainers' metrics, and of the same in the demo's metrics file."""


def training_problems(config: DemoConfig, seed: int) -> Dataset:
    """The problems of a seed, the same for each arm: every one is asked once."""
    problems = chain.draw_problems(
        config.steps * config.prompts_per_step,
        seed=seed + 1,
        exclude=frozenset(chain.held_out_problems(config.held_out)),
    )
    return Dataset.from_list(
        [{"prompt": chain.ask(problem), "answer": problem.answer} for problem in problems]
    )


def training_arguments(config: DemoConfig, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    """Arguments for TRL; between arms only the batch differs, which counts trained completions."""
    return {
        "output_dir": str(folder),
        "max_steps": config.steps,
        "per_device_train_batch_size": config.prompts_per_step * arm.num_refinements,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": config.warmup_steps,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "beta": 0.0,
        "loss_type": "grpo",
        "temperature": 1.0,
        "max_completion_length": MAX_ANSWER_TOKENS,
        "seed": seed,
        "save_steps": config.checkpoint_steps,
        "save_total_limit": 1,
        "logging_steps": config.logging_steps,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
    }


def build_trainer(config: DemoConfig, run: Run, output_dir: Path) -> GRPOTrainer:
    """Build the trainer of a run, on the warmed model of `output_dir`."""
    arm = ARMS[run.arm]
    tokenizer = build_tokenizer()
    common = {
        "model": load_model(output_dir / "warm.safetensors", tokenizer),
        "reward_funcs": chain.chain_reward,
        "train_dataset": training_problems(config, run.seed),
        "processing_class": tokenizer,
    }
    arguments = training_arguments(config, arm, run.seed, run.folder(output_dir))
    if arm.num_drafts == 0:
        args = GRPOConfig(num_generations=arm.num_refinements, **arguments)
        return GRPOTrainer(args=args, **common)
    args = IGRPOConfig(
        num_drafts=arm.num_drafts,
        num_refinements=arm.num_refinements,
        draft_choice=arm.draft_choice,
        draft_loss_coef=arm.draft_loss_coef,
        draft_template=asdict(chain.TEMPLATE),
        **arguments,
    )
    return IGRPOTrainer(args=args, **common)


class DemoCallback(TrainerCallback):
    """Writes a run's metrics file, evaluates on schedule, and ends with the demo's process."""

    def __init__(
        self,
        config: DemoConfig,
        run: Run,
        metrics: MetricsFile,
        evaluate: Callable[[], Evaluation],
    ) -> None:
        self.config, self.run, self.metrics, self.evaluate = config, run, metrics, evaluate
        self.parent = os.getppid()
        self.per_step = config.prompts_per_step * ARMS[run.arm].completions

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Answer the held-out problems before the first step."""
        if state.global_step == 0:
            self._record_evaluation(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **objects: Any
    ) -> None:
        """Answer the held-out problems where the schedule says so."""
        if os.getppid() != self.parent:
            raise SystemExit("the demo's process has ended")
        if state.global_step in self.config.evaluation_steps:
            self._record_evaluation(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **objects: Any,
    ) -> None:
        """Keep the rows of training; the trainer's summary at the end has no reward."""
        if logs and "reward" in logs:
            row = {ours: logs[name] for name, ours in METRICS.items() if name in logs}
            self._record(state.global_step, "train", row)

    def _record_evaluation(self, step: int) -> None:
        result = self.evaluate()
        row = {
            "accuracy": result.accuracy,
            "refined_accuracy": result.refined_accuracy,
            "entropy": result.entropy,
            "length": result.length,
        }
        self._record(step, "held-out", row)

    def _record(self, step: int, split: str, row: dict[str, float]) -> None:
        position = {"step": step, "completions": step * self.per_step}
        self.metrics.append({**asdict(self.run), "split": split, **position, **row})


def train_run(config: DemoConfig, run: Run, output_dir: Path) -> None:
    """Train one run to its end, from its last checkpoint where there is one; write its result."""
    folder = run.folder(output_dir)
    step, checkpoint = last_checkpoint(folder) or (-1, None)
    metrics = run.metrics(output_dir)
    metrics.truncate(lambda row: row["step"] <= step)
    trainer = build_trainer(config, run, output_dir)
    problems = chain.held_out_problems(config.held_out)

    def answer(times: int = 1) -> Evaluation:
        return evaluate(
            trainer.model, trainer.processing_class, problems * times, seed=EVALUATION_SEED
        )

    trainer.add_callback(DemoCallback(config, run, metrics, answer))
    began = time.process_time()
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    final = answer(config.final_samples)
    result = {
        **asdict(run),
        "accuracy": final.accuracy,
        "refined_accuracy": final.refined_accuracy,
        "entropy": final.entropy,
        "length": final.length,
        "right": count_right(final.correct, config.held_out),
        "refined_right": count_right(final.refined, config.held_out),
        "cpu_seconds": time.process_time() - began,
    }
    trainer.save_model(str(folder / "model"))
    write_json(folder / "result.json", result)


def count_right(correct: Sequence[bool], problems: int) -> list[int]:
    """Count the right answers to each problem, which were asked in turn, several times over.

    Examples:
        >>> count_right([True, False, True, True], 2)
        [2, 1]
    """
    return [sum(correct[problem::problems]) for problem in range(problems)]


def main(arguments: list[str]) -> None:
    """Train the named runs of an output folder, one after the other."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    output_dir = Path(arguments[0])
    config = DemoConfig(**load_settings(output_dir))
    for run in map(Run.parse, arguments[1:]):
        with sole_writer(run.folder(output_dir)):
            if run.result(output_dir) is None:
                train_run(config, run, output_dir)


if __name__ == "__main__":
    main(sys.argv[1:])
