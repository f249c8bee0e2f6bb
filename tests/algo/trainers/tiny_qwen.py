"""A tiny Qwen3 with a tokenizer of characters and a chat template, built in code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
SHORT_TEMPLATE = {"before": "[", "after": "]", "delimiters": ["[", "]"]}

# Warnings that TRL and its dependencies give about themselves.
third_party = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning:transformers",
    "ignore:.*deprecated:DeprecationWarning",
    "ignore:.*use_reentrant.*:UserWarning",
    "ignore::ResourceWarning",
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(seed: int = 0) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(SPECIAL + CHARACTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return Qwen3ForCausalLM(config)


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
