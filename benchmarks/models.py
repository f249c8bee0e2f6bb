"""Transformers models with random weights, for benchmarks of whole steps."""

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM


def random_qwen3(
    *, width: int, layers: int, vocabulary: int, positions: int, device: str, dtype: torch.dtype
) -> PreTrainedModel:
    """A Qwen3 with heads of 64, two query heads for each of keys and values, and a head apart."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 128),
        head_dim=64,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        pad_token_id=0,
    )
    with torch.device(device):
        return Qwen3ForCausalLM(config).to(dtype)
