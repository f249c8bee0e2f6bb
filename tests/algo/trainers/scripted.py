"""Two stages whose samples are written out by hand."""

from collections.abc import Iterable
from typing import Any

from tiny_qwen import make_tokenizer

# With `digit_reward`: 1 3 3 0 for the first prompt, 0 for all drafts of the second that have one.
DRAFTS = ["a1", "b3", "c3", "d0", "e0", "f0", "g", "h0"]
REFINED = ["p1", "q2", "r3", "s4", "t0", "u0", "v0", "w2"]


class ScriptedSampler:
    """Stands where TRL samples: gives out texts in turn and keeps the prompts it was shown."""

    def __init__(self, texts: Iterable[Iterable[str]]) -> None:
        self.texts = iter(texts)
        self.tokenizer = make_tokenizer()
        self.prompts: list[list[str]] = []

    def __call__(
        self, prompt_ids: list[list[int]], *_: Any, **__: Any
    ) -> tuple[list[list[int]], None]:
        self.prompts.append([self.tokenizer.decode(ids) for ids in prompt_ids])
        texts = list(next(self.texts))
        assert len(texts) == len(prompt_ids)
        # Letter by letter: a text that spells "</s>" is no special token, as from a real model.
        return [self.tokenizer.convert_tokens_to_ids(list(text)) for text in texts], None


def run_stages(
    trainer: Any, *scripts: list[str], mode: str = "train", questions: tuple[int, ...] = (0, 1)
) -> tuple[dict[str, Any], ScriptedSampler]:
    """Feed one generation batch of 4 rows per question through the trainer."""
    sampler = ScriptedSampler(scripts)
    trainer._generate_single_turn = sampler
    rows = [trainer.train_dataset[q] for q in questions for _ in range(4)]
    trainer.model.train(mode == "train")
    return trainer._generate_and_score_completions(rows), sampler


def chat(question: str) -> str:
    return f"<s>user:{question}</s><s>assistant:"
