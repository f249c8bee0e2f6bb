"""What each of two ranks runs in `test_trl_two_ranks`; writes what it saw."""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from tiny_qwen import (
    base_options,
    early_letters,
    make_dataset,
    make_model,
    make_tokenizer,
)

from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer


def digest(model: torch.nn.Module) -> str:
    values = torch.cat([p.detach().flatten() for p in model.parameters()])
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()


def main(folder: Path, draft_loss_coef: float, rounds: int, *, sampled: bool) -> None:
    warnings.simplefilter("ignore")
    options = base_options(folder) | {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "draft_loss_coef": draft_loss_coef,
        "refinement_rounds": rounds,
        "draft_template": {"before": "[", "after": "]"},
        "max_steps": 3,
    }
    model = make_model()
    engine = TransformersSampler(make_model(seed=3), make_tokenizer(), max_new_tokens=6)
    trainer = IGRPOTrainer(
        model,
        early_letters,
        IGRPOConfig(**options),
        make_dataset(),
        processing_class=make_tokenizer(),
        sampler=engine if sampled else None,
    )
    before = digest(model)
    calls: list[dict[str, list[str]]] = []
    rows: list[int] = []
    sample, compute = trainer._generate_single_turn, trainer._compute_loss

    def listen(prompt_ids: list[list[int]], *rest: Any, **options: Any) -> Any:
        completion_ids, logprobs = sample(prompt_ids, *rest, **options)
        decode = make_tokenizer().batch_decode
        drawn = decode(completion_ids, skip_special_tokens=True)
        calls.append({"prompts": decode(prompt_ids), "drawn": drawn})
        return completion_ids, logprobs

    def count(model: Any, inputs: dict[str, Any]) -> Any:
        rows.append(len(inputs["advantages"]))
        return compute(model, inputs)

    trainer._generate_single_turn, trainer._compute_loss = listen, count
    trainer.train()
    seen = {
        "world": trainer.accelerator.num_processes,
        "calls": calls,
        "before": before,
        "parameters": digest(model),
        "rows": [sum(rows[:2]), sum(rows[2:4])],
        "engine": digest(engine.model),
        "difference": [
            log["sampling/sampling_logp_difference/max"]
            for log in trainer.state.log_history
            if sampled and "reward" in log
        ],
    }
    rank = trainer.accelerator.process_index
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    _, folder, draft_loss_coef, rounds, how = sys.argv
    main(Path(folder), float(draft_loss_coef), int(rounds), sampled=how == "sampled")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of torch's that is still there when Python ends aborts the process
