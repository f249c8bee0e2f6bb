"""A tiny random Qwen3, and tokenizers of characters or bytes, built in code."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]


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


def byte_tokenizer(
    special: list[str], chat_template: str, *, pad: str, eos: str
) -> PreTrainedTokenizerFast:
    """The special tokens, then one token per byte."""
    vocabulary = {
        token: index for index, token in enumerate(special + sorted(ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=eos,
        extra_special_tokens=[token for token in special if token not in (pad, eos)],
    )
    fast.chat_template = chat_template
    return fast


def make_model(seed: int = 0, **config: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    tiny = {
        "vocab_size": len(SPECIAL + CHARACTERS),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return Qwen3ForCausalLM(Qwen3Config(**tiny | config))
