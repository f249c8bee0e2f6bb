"""A run that never stops, the same run killed, and resumed, on however many ranks.

Completions are TRL's own, so what is drawn after a resume hangs on each rank's random state.

    python resumed_run.py FOLDER HOW RUN...

HOW is plain, fsdp2 or zero3; a RUN is whole, killed or resumed.
"""

import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from one_run import shard
from safetensors.torch import save_file
from tiny_qwen import base_options, early_letters, make_dataset, make_model, make_tokenizer
from transformers import TrainerCallback

from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer
from igrpo_algo.trainers.trl.sampler import whole_weights

KILLED_AFTER = 3  # updates: between the two on the second batch


class Kill(TrainerCallback):
    """Kills every rank as the next update begins."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == KILLED_AFTER:
            torch.distributed.barrier()  # all files of the checkpoint are there
            os.kill(os.getpid(), signal.SIGKILL)


def train(folder: Path, run: str, **sharded: Any) -> None:
    options = base_options(folder) | {
        "output_dir": str(folder / ("whole" if run == "whole" else "killed")),
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "num_iterations": 2,
        "draft_loss_coef": 1.0,
        "draft_ties": "random",
        "draft_dropout": 0.3,
        "optim": "adamw_torch",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": KILLED_AFTER,
    }
    trainer = IGRPOTrainer(
        make_model(seed=5 if run == "resumed" else 0),
        early_letters,
        IGRPOConfig(**options | sharded),
        make_dataset(),
        processing_class=make_tokenizer(),
        callbacks=[Kill()] if run == "killed" else None,
    )
    trainer.train(resume_from_checkpoint=run == "resumed")
    model = trainer.accelerator.unwrap_model(trainer.model)
    with whole_weights(model, trainer._dist) as weights:
        kept = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    if trainer.accelerator.is_main_process:
        save_file(kept, folder / f"{run}.safetensors")
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _, folder, how, *runs = sys.argv
    sharded = {} if how == "plain" else shard(how)
    for run in runs:
        train(Path(folder), run, **sharded)
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of torch's that is still there when Python ends aborts the process
