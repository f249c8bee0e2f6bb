"""What the tests of the TRL trainer train the tiny Qwen3 with."""

import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

sys.path.append(str(Path(__file__).parents[2] / "models"))  # for scripts that a test runs
from tiny_qwen3 import make_model as make_model
from tiny_qwen3 import make_tokenizer as make_tokenizer

SHORT_TEMPLATE = {"before": "[", "after": "]", "delimiters": ["[", "]"]}

# Warnings that TRL and its dependencies give about themselves.
third_party = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning:transformers",
    "ignore:.*deprecated:DeprecationWarning",
    "ignore:.*use_reentrant.*:UserWarning",
    "ignore::ResourceWarning",
)


def make_dataset(size: int = 8, *, chat: bool = True) -> Dataset:
    questions = [f"{n}+{n}?" for n in range(size)]
    prompts = [[{"role": "user", "content": q}] if chat else q for q in questions]
    return Dataset.from_list([{"prompt": p, "answer": f"a{n}"} for n, p in enumerate(prompts)])


def text_of(completion: Any) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def early_letters(completions: list[Any], **columns: Any) -> list[float]:
    """Graded and deterministic: the share of characters before K."""
    texts = [text_of(completion) for completion in completions]
    return [sum(letter < "K" for letter in text) / (len(text) + 1) for text in texts]


def digit_reward(completions: list[Any], **columns: Any) -> list[float | None]:
    """The first digit of a completion is its reward; without one it cannot be scored."""
    digits = [[c for c in text_of(completion) if c.isdigit()] for completion in completions]
    return [float(found[0]) if found else None for found in digits]


def base_options(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder / "run"),
        "per_device_train_batch_size": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
    }
