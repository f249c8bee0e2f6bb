"""Tiny models and data under the hub's names that TRL's tests load, made here and fetched nowhere.

A folder of a name's own path in the working directory is taken before the hub is asked.
"""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import chat_template_utils

HUB = "trl-internal-testing"
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
}
EXPERTS = {
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
}
# Name on the hub: class, and what its configuration has besides the sizes.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("Qwen2ForCausalLM", {}),
    "tiny-Qwen2ForSequenceClassification-2.5": ("Qwen2ForSequenceClassification", {}),
    "tiny-Qwen3ForCausalLM": ("Qwen3ForCausalLM", {}),
    "tiny-Qwen3ForSequenceClassification": ("Qwen3ForSequenceClassification", {}),
    "tiny-Qwen3MoeForCausalLM": ("Qwen3MoeForCausalLM", EXPERTS),
    "tiny-LlamaForCausalLM-3.2": ("LlamaForCausalLM", {}),
    "tiny-LlamaForSequenceClassification-3.2": ("LlamaForSequenceClassification", {}),
    "tiny-MistralForCausalLM-0.2": ("MistralForCausalLM", {}),
    "tiny-Cohere2ForCausalLM": ("Cohere2ForCausalLM", {"logit_scale": 0.25}),
    "tiny-Gemma2ForCausalLM": ("Gemma2ForCausalLM", {"final_logit_softcapping": 2.0}),
    "tiny-Glm4MoeForCausalLM": ("Glm4MoeForCausalLM", EXPERTS),
}
BEGINNINGS = ["The first of the two is", "What is sorted is", "A rule without exceptions is"]
ENDINGS = ["never", "sometimes", "always", "of course", "as we know", "perhaps"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = chat_template_utils.qwen2_5_chat_template
    return fast


def make_models(folder: Path) -> None:
    tokenizer = make_tokenizer()
    for name, (kind, options) in MODELS.items():
        model_class = getattr(transformers, kind)
        config = model_class.config_class(**SIZES | {"vocab_size": len(tokenizer)} | options)
        config.num_labels = 1
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder / HUB / name)
        tokenizer.save_pretrained(folder / HUB / name)


def make_data(folder: Path) -> None:
    """Write the two forms of prompts that TRL's tests load, with a train and a test split."""
    texts = [f"{beginning} {ending}" for beginning in BEGINNINGS for ending in ENDINGS]
    home, listing = folder / HUB / "zen", ""
    home.mkdir(parents=True)
    for form in ("standard_prompt_only", "conversational_prompt_only"):
        listing += f"- config_name: {form}\n  data_files:\n"
        for split, part in (("train", texts[:-2]), ("test", texts[-2:])):
            chats = [[{"role": "user", "content": text}] for text in part]
            rows = part if form.startswith("standard") else chats
            file = home / f"{form}-{split}.jsonl"
            file.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
            listing += f"  - split: {split}\n    path: {file.name}\n"
    (home / "README.md").write_text(f"---\nconfigs:\n{listing}---\n")
