"""A model that is made in a second, and made-up problems in the shape of GSM8K's rows."""

import json
from pathlib import Path

import pytest
from tiny_qwen3 import byte_tokenizer, make_model

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a Qwen3 model of two layers, with random weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(special, CHAT_TEMPLATE, pad="<|pad|>", eos="<|im_end|>")
    make_model(
        vocab_size=len(tokenizer), tie_word_embeddings=True, bos_token_id=None
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def problems(tmp_path: Path) -> str:
    """Six sums as jsonl."""
    rows = [
        {
            "question": f"Lena has {n} shells and finds {n + 1} more. How many are there?",
            "answer": f"{n} + {n + 1} = <<{n}+{n + 1}={2 * n + 1}>>{2 * n + 1}\n#### {2 * n + 1}",
        }
        for n in range(1, 7)
    ]
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
