"""Some runs, on however many ranks and however the weights are kept; writes where each ends.

Completions depend on the prompt alone, so a run's batches do not change with its ranks.

    python one_run.py FOLDER HOW MICRO_BATCHES      # HOW: plain, fsdp2 or zero3
"""

import json
import os
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from cpus_for_gpus import pass_for_gpus
from peft import LoraConfig
from safetensors.torch import save_file
from tiny_qwen import base_options, early_letters, make_dataset, make_model, make_tokenizer

from igrpo_algo.prompts import encode_prompt
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer
from igrpo_algo.trainers.trl.sampler import whole_weights

RUNS: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo"},
    "drafts-trained": {"loss_type": "dapo", "draft_loss_coef": 1.0},
    "two-rounds": {"loss_type": "dapo", "refinement_rounds": 2, "draft_loss_coef": 0.5},
    "adapter": {"adapter": {"target_modules": ["q_proj", "down_proj"]}},
    "adapter-and-head": {"adapter": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}},
}


class Fixed:
    """Draws what a checksum of the prompt says: 1 to 6 letters for each completion."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.seen: list[torch.Tensor] = []

    def encode(self, prompt: Any) -> list[int]:
        return encode_prompt(prompt, self.tokenizer)

    async def sample_one(self, prompt: Any, n: int, *, seed: int | None = None) -> list[Completion]:
        drawn = []
        for place in range(n):
            number = zlib.crc32(str((self.encode(prompt), place)).encode())
            text = "".join(chr(65 + number // 7**k % 26) for k in range(1 + number % 6))
            drawn.append(Completion(self.tokenizer.convert_tokens_to_ids([*text, "</s>"]), text))
        return drawn

    def sync_weights(self, weights: dict[str, torch.Tensor]) -> None:
        self.seen.append(torch.cat([weight.flatten() for weight in weights.values()]))


FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ZERO3 = {
    "zero_optimization": {"stage": 3},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def shard(kind: str) -> dict[str, Any]:
    """Let accelerate shard the weights."""
    if kind == "fsdp2":
        os.environ |= FSDP2
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    pass_for_gpus()
    return {"use_cpu": False} | ({} if kind == "fsdp2" else {"deepspeed": ZERO3})


def train(folder: Path, adapter: dict[str, Any] | None = None, **given: Any) -> None:
    folder.mkdir(exist_ok=True)
    options = base_options(folder) | {
        "optim": "sgd",  # a step in proportion to the gradient
        "learning_rate": 1.0,
        "max_steps": 3,
        "vllm_importance_sampling_correction": False,
    }
    sampler = Fixed()
    trainer = IGRPOTrainer(
        make_model(),
        early_letters,
        IGRPOConfig(**options | given),
        make_dataset(),
        processing_class=make_tokenizer(),
        peft_config=adapter and LoraConfig(r=2, task_type="CAUSAL_LM", **adapter),
        sampler=sampler,
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    with whole_weights(model, trainer._dist) as weights:
        kept = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    if trainer.accelerator.is_main_process:
        save_file(kept | {"synced": torch.stack(sampler.seen)}, folder / "weights.safetensors")
        logs = [log for log in trainer.state.log_history if "reward" in log]
        (folder / "logs.json").write_text(json.dumps(logs))
    trainer.accelerator.wait_for_everyone()


def main(folder: Path, how: str, micro_batches: int) -> None:
    """Take 8 refinements a step, in so many micro-batches on all ranks together."""
    warnings.simplefilter("ignore")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    dealt = {
        "per_device_train_batch_size": 8 // micro_batches,
        "gradient_accumulation_steps": micro_batches // ranks,
    }
    sharded = {} if how == "plain" else shard(how)
    for name, options in RUNS.items():
        train(folder / name, **sharded, **dealt, **options)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of torch's that is still there when Python ends aborts the process
