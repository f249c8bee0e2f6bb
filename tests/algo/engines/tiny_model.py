"""A Qwen3 of 20 thousand random weights, and a tokenizer of letters."""

import tiny_qwen3
import torch
from tiny_qwen3 import byte_tokenizer

from igrpo_kernels import token_logprobs

TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
PROMPTS = ["1+1=", "a longer question?", [{"role": "user", "content": "2+2"}], [9, 8, 7]]


def make_tokenizer():
    return byte_tokenizer(["<pad>", "<eos>", "<u>", "<a>"], TEMPLATE, pad="<pad>", eos="<eos>")


def make_model(seed=0, tie=False, **options):
    sizes = {"vocab_size": 260, "hidden_size": 32, "intermediate_size": 48, "head_dim": 16}
    ids = {"bos_token_id": None, "eos_token_id": 1, "max_position_embeddings": 64}
    spread = {"initializer_range": 0.3}  # far from uniform, so that temperature and top-p show
    return tiny_qwen3.make_model(seed, tie_word_embeddings=tie, **sizes | ids | spread | options)


def teacher_forced(model, prompt_ids, ids, temperature):
    """Log-probs of `ids` after `prompt_ids`: one forward pass, one sequence, no padding."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return token_logprobs(logits / temperature, torch.tensor(ids))
