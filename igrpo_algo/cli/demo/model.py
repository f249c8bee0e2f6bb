"""The demo's model: a Qwen3 of 91,008 weights, its tokenizer and its chat template."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ...files import write_whole
from ...thinking import MARK_TOKENS
from . import chain

PAD, UNKNOWN, TURN_START, TURN_END = "<|pad|>", "<|unknown|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = ("\n", "user", "assistant", " mod", "draft", "refine", ":")


def write_words(largest: int, *others: str) -> tuple[str, ...]:
    """Return a task's words: those of prompts, the numbers with and without a space, and others."""
    numbers = [str(number) for number in range(largest + 1)]
    return (*WORDS, *numbers, *(f" {number}" for number in numbers), *others)


CHAIN_WORDS = write_words(chain.MODULUS, *(f" {operation}" for operation in chain.OPERATIONS))


def build_tokenizer(words: Sequence[str] = CHAIN_WORDS) -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: one token for a number, an operation or a word.

    A space belongs to the token after it, so that decoding is plain concatenation.

    Args:
        words: What it knows besides its control tokens.

    Examples:
        >>> tokenizer = build_tokenizer()
        >>> tokenizer.convert_ids_to_tokens(tokenizer("7 +5 *3 mod 16").input_ids)
        ['7', ' +5', ' *3', ' mod', ' 16']
        >>> tokenizer.decode(tokenizer("12 4 0 0 2").input_ids)
        '12 4 0 0 2'
    """
    known = [PAD, UNKNOWN, TURN_START, TURN_END, *words]
    vocabulary = {word: index for index, word in enumerate(known)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r" ?[+*-]?\d+| ?\p{L}+| ?[^\s\p{L}\d]|\s"), behavior="isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_tokens([word for word in words if word in MARK_TOKENS])  # whole, as models do
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, width: int = 64, layers: int = 2
) -> Qwen3ForCausalLM:
    """Build the model with fresh weights; the global random state is left as it was."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 16,
        num_key_value_heads=width // 16,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def save_weights(model: Qwen3ForCausalLM, path: Path) -> None:
    """Write the weights in bf16, which halves the file."""
    weights = {name: weight.bfloat16() for name, weight in model.state_dict().items()}
    write_whole(path, save(weights))


def load_model(
    path: Path, tokenizer: PreTrainedTokenizerFast, *, width: int = 64, layers: int = 2
) -> Qwen3ForCausalLM:
    """Build the model with the weights of a safetensors file, in fp32."""
    model = build_model(tokenizer, width=width, layers=layers)
    model.load_state_dict(load_file(path))
    return model
