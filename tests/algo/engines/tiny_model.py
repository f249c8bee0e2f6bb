"""A Qwen3 of 20 thousand random weights, and a tokenizer of letters."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from igrpo_kernels import token_logprobs

TEMPLATE = (
    "{% for m in messages %}<u>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
PROMPTS = ["1+1=", "a longer question?", [{"role": "user", "content": "2+2"}], [9, 8, 7]]


def make_tokenizer():
    special = ["<pad>", "<eos>", "<u>", "<a>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    inner = Tokenizer(models.BPE(vocab, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        extra_special_tokens=["<u>", "<a>"],
    )
    fast.chat_template = TEMPLATE
    return fast


def make_model(seed=0, tie=False, **options):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=64,
        tie_word_embeddings=tie,
        eos_token_id=1,
        pad_token_id=0,
        initializer_range=0.3,  # far from uniform, so that temperature and top-p show
        **options,
    )
    return Qwen3ForCausalLM(config)


def teacher_forced(model, prompt_ids, ids, temperature):
    """Log-probs of `ids` after `prompt_ids`: one forward pass, one sequence, no padding."""
    model.eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + ids])).logits[0, len(prompt_ids) - 1 : -1]
    return token_logprobs(logits / temperature, torch.tensor(ids))
