r"""iGRPO in Unsloth 2026.10.9: LoRA on a small model, products as the task.

    python examples/unsloth_igrpo.py unsloth/Qwen3-0.6B

The logs get igrpo/draft_reward, igrpo/uplift and igrpo/refinement_zero_std. tests/hosts/unsloth
runs `train` on a CPU with a tiny model, on Unsloth's CPU backend and with the trainer that it
writes for GPUs; its kernels need a GPU and have not been run.
"""

import sys
from typing import Any

import unsloth  # isort: skip  # before TRL, so that it can rewrite it
from datasets import Dataset
from trl import GRPOConfig

from igrpo_algo import DraftRules
from igrpo_algo.trainers.unsloth import make_trainer


def ends_with_answer(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Give 1 for a completion that ends with the answer, and 0 for any other."""
    texts = [completion[0]["content"].rstrip(". ") for completion in completions]
    return [float(text.endswith(right)) for text, right in zip(texts, answer, strict=True)]


def train(
    model: Any, tokenizer: Any, rows: list[dict[str, Any]], rules: DraftRules, **options: Any
) -> Any:
    """Train on rows of prompts and answers; give the trainer when it is done."""
    reward = options.pop("reward", ends_with_answer)
    trainer = make_trainer(rules=rules, num_drafts=4)(
        model=model,
        processing_class=tokenizer,
        args=GRPOConfig(loss_type="grpo", beta=0.0, num_generations=4, **options),
        reward_funcs=reward,
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    return trainer


def main(name: str) -> None:
    """Train LoRA weights on a model of the hub."""
    model, tokenizer = unsloth.FastLanguageModel.from_pretrained(name, max_seq_length=2048)
    model = unsloth.FastLanguageModel.get_peft_model(model, r=16)
    factors = [(17 * n + 3, 29 * n + 7) for n in range(64)]
    rows = [
        {"prompt": [{"role": "user", "content": f"What is {a} * {b}?"}], "answer": str(a * b)}
        for a, b in factors
    ]
    train(model, tokenizer, rows, DraftRules(), output_dir="runs/unsloth", logging_steps=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
