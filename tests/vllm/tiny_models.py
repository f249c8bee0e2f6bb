"""Tiny models that vLLM's CPU build takes (heads of 32)."""

from pathlib import Path
from typing import Any

import torch
from tiny_qwen3 import CHARACTERS, SPECIAL
from tiny_qwen3 import make_tokenizer as make_tokenizer
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from igrpo_algo.engines.vllm import VllmSampler
from igrpo_algo.rollouts.completions import Completion

KINDS = {
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    "qwen3 tied": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32, "tie_word_embeddings": True}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
}
CONTEXT = 512

# float32, against which transformers is compared; the cache is small, and its blocks too.
ENGINE: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": CONTEXT,
    "max_num_seqs": 32,
    "seed": 0,
    "kv_cache_memory_bytes": 16 << 20,
}
PROMPTS: list[Any] = [
    "1+1=",
    "a longer question than a block has tokens?",
    [{"role": "user", "content": "2+2"}],
    [9, 8, 7],
]


def make_model(kind: str, seed: int) -> PreTrainedModel:
    config, model, options = KINDS[kind]
    torch.manual_seed(seed)
    built: PreTrainedModel = model(
        config(
            vocab_size=len(SPECIAL + CHARACTERS),
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
            initializer_range=0.2,  # far from uniform, so that the temperature shows
            **options,
        )
    )
    return built.eval()


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def teacher_forced(
    model: PreTrainedModel, prompt_ids: list[int], ids: list[int], temperature: float
) -> torch.Tensor:
    """Log-probs of `ids` after `prompt_ids` by transformers: one pass, one sequence, no cache."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]


def worst_difference(
    model: PreTrainedModel, sampler: Any, prompts: list[Any], groups: list[list[Completion]]
) -> float:
    """Largest distance of a told log-prob from that of transformers on `model`."""
    worst = 0.0
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            expected = teacher_forced(
                model,
                sampler.encode(prompt),
                completion.token_ids,
                sampler.distribution.temperature,
            )
            told = torch.tensor(completion.logprobs)
            worst = max(worst, float((told - expected).abs().max()))
    return worst


ENGINES: dict[str, Any] = {}


def engine(folder: Path, name: str = "", **options: Any) -> Any:
    """An engine with the folder's weights, made once per set of options and never freed.

    An engine that dies takes vLLM's process-wide state with it, and so every other one.
    """
    from vllm import LLM

    wanted = {"logprobs_mode": "processed_logprobs", "block_size": 32, **ENGINE, **options}
    key = f"{folder} {name} {wanted}"
    if key not in ENGINES:
        ENGINES[key] = LLM(model=str(folder), **wanted)
    else:
        VllmSampler(ENGINES[key], max_new_tokens=1).sync_weights(folder)
    return ENGINES[key]
