"""The supervised warm-up: the model imitates a teacher that errs, with and without a draft."""

import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from ...drafts.text import splice_prompt
from . import chain
from .model import build_model, build_tokenizer, save_weights

Message = dict[str, str]
IGNORED = -100


@dataclass(frozen=True)
class WarmUp:
    """Settings of the warm-up; the defaults made the weights that the package ships."""

    steps: int = 600
    batch_size: int = 256
    learning_rate: float = 3e-3
    draft_share: float = 0.5
    seed: int = 0


def corrupt(values: str, share: float, rng: random.Random) -> str:
    """Return the written values with each replaced by a random one with probability `share`."""
    return " ".join(
        str(rng.randrange(chain.MODULUS)) if rng.random() < share else value
        for value in values.split()
    )


def draw_conversation(
    teacher: chain.Teacher,
    rng: random.Random,
    *,
    exclude: frozenset[chain.Problem],
    draft_share: float,
) -> list[Message]:
    """Draw a problem with the teacher's answer, and now and then with a draft in the prompt.

    Half of the drafts are another answer of the teacher's; the others are the target with a share
    of its values replaced, the share itself uniform on [0, 1]. So a draft is informative, but
    copying it is not what the warm-up teaches.
    """
    problem = chain.draw_problem(rng)
    while problem in exclude:
        problem = chain.draw_problem(rng)
    answer = teacher.answer(problem, rng)
    prompt = chain.ask(problem)
    if rng.random() < draft_share:
        independent = rng.random() < 0.5
        draft = teacher.answer(problem, rng) if independent else corrupt(answer, rng.random(), rng)
        prompt = splice_prompt(prompt, draft, template=chain.TEMPLATE)
    return [*prompt, {"role": "assistant", "content": answer}]


def chain_conversations(
    settings: WarmUp, exclude: frozenset[chain.Problem] = frozenset()
) -> Callable[[random.Random], list[Message]]:
    """Return what draws the conversations of the demo's warm-up."""
    return partial(
        draw_conversation,
        chain.Teacher(settings.seed),
        exclude=exclude,
        draft_share=settings.draft_share,
    )


def encode(
    conversations: list[list[Message]], tokenizer: PreTrainedTokenizerFast
) -> dict[str, Tensor]:
    """Tokenize conversations into a left-padded batch whose labels are the last message."""
    prompts = tokenizer.apply_chat_template(
        [turns[:-1] for turns in conversations], tokenize=False, add_generation_prompt=True
    )
    answers = [turns[-1]["content"] + tokenizer.eos_token for turns in conversations]
    rows = [
        (len(prompt), prompt + answer)
        for prompt, answer in zip(
            tokenizer(prompts).input_ids, tokenizer(answers).input_ids, strict=True
        )
    ]
    batch = tokenizer.pad({"input_ids": [ids for _, ids in rows]}, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED)
    width = labels.shape[1]
    for row, (prompt_length, ids) in enumerate(rows):
        labels[row, : width - len(ids) + prompt_length] = IGNORED
    return {**batch, "labels": labels}


def warm_up(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    settings: WarmUp,
    draw: Callable[[random.Random], list[Message]],
) -> Iterator[float]:
    """Train the model in place on drawn conversations; yield the loss of each step."""
    rng = random.Random(f"warm-up {settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 50) * (1 - 0.9 * step / settings.steps)
    )
    model.train()
    for _ in range(settings.steps):
        conversations = [draw(rng) for _ in range(settings.batch_size)]
        loss = model(**encode(conversations, tokenizer), use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def main(path: Path) -> None:
    """Make the warmed weights and write them to a file."""
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    settings = WarmUp()
    exclude = frozenset(chain.held_out_problems())
    draw = chain_conversations(settings, exclude)
    losses = warm_up(model, tokenizer, settings, draw)
    *_, loss = track(losses, "warm-up", total=settings.steps)
    print(f"loss after {settings.steps} steps: {loss:.3f}")
    save_weights(model, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
