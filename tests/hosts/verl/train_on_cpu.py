"""Three steps of verl's FSDP2 engine with each loss: `torchrun train_on_cpu.py MODEL RESULT`."""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from verl.trainer.config import CheckpointConfig
from verl.utils import tensordict_utils as tu
from verl.workers.config import (
    ActorConfig,
    FSDPEngineConfig,
    FSDPOptimizerConfig,
    HFModelConfig,
    TrainingWorkerConfig,
)
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.engine import EngineRegistry
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils.losses import ppo_loss

SEQUENCES, STEPS = 8, 3


def nested(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)


def make_batch(rank: int, ranks: int) -> Any:
    generator = torch.Generator().manual_seed(7)
    columns: dict[str, list[torch.Tensor]] = {}
    for row in range(SEQUENCES):
        prompt, response = 3 + row % 3, 2 + row % 4
        ids = torch.randint(4, 90, (prompt + response,), generator=generator)
        mask = torch.ones(response, dtype=torch.int64)
        entries = {
            "input_ids": ids,
            "prompts": ids[:prompt],
            "responses": ids[prompt:],
            "position_ids": torch.arange(len(ids)),
            "response_mask": mask,
            "loss_mask": mask,
            "advantages": torch.randn(1, generator=generator).expand(response).clone(),
        }
        if row % ranks == rank:
            for name, value in entries.items():
                columns.setdefault(name, []).append(value)
    settings = {"temperature": 1.0, "global_batch_size": SEQUENCES, "calculate_entropy": False}
    return tu.get_tensordict({name: nested(rows) for name, rows in columns.items()}, settings)


def train(loss_mode: str, model: str) -> dict[str, Any]:
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    worker = TrainingWorker(
        TrainingWorkerConfig(
            model_type="language_model",
            model_config=HFModelConfig(
                path=model,
                use_remove_padding=False,
                enable_gradient_checkpointing=False,
                override_config={"attn_implementation": "eager"},
            ),
            engine_config=FSDPEngineConfig(
                strategy="fsdp2",
                dtype="float32",
                use_dynamic_bsz=False,
                micro_batch_size_per_gpu=2,
                infer_micro_batch_size_per_gpu=2,
                use_torch_compile=False,
                mixed_precision={"param_dtype": "fp32", "reduce_dtype": "fp32"},
            ),
            optimizer_config=FSDPOptimizerConfig(lr=1e-2, total_training_steps=STEPS),
            checkpoint_config=CheckpointConfig(),
        )
    )
    worker.reset()
    actor = ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        use_dynamic_bsz=True,
        loss_agg_mode="seq-mean-token-mean",
        policy_loss=PolicyLossConfig(loss_mode=loss_mode),
    )
    worker.set_loss_fn(partial(ppo_loss, actor))
    batch = make_batch(rank, ranks)
    asked = make_batch(rank, ranks)
    tu.assign_non_tensor(asked, compute_loss=False)
    whole = worker.infer_batch(asked)["log_probs"].unbind()
    responses = batch["responses"].unbind()
    old = [row[-len(r) - 1 : -1] for row, r in zip(whole, responses, strict=True)]
    steps = []
    for _ in range(STEPS):
        batch = make_batch(rank, ranks)
        batch["old_log_probs"] = nested(old)
        metrics = tu.get(worker.train_batch(batch), "metrics")
        steps.append({name: metrics[name] for name in ("loss", "grad_norm")})
    weights = [p.full_tensor().double().sum().item() for p in worker.engine.module.parameters()]
    return {"steps": steps, "weights": weights}


def main(model: str, result: str) -> None:
    torch.distributed.init_process_group("gloo")
    engines = EngineRegistry._engines["language_model"]["fsdp2"]
    engines["cpu"] = engines["cuda"]
    trained = {mode: train(mode, model) for mode in ("vanilla", "igrpo")}
    if torch.distributed.get_rank() == 0:
        Path(result).write_text(json.dumps(trained))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
