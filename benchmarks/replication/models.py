"""The models: tiny Qwen3 warmed up on a teacher that errs, or SmolLM2; made once, then kept."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from igrpo_algo.cli.demo.model import build_model, build_tokenizer, load_model, save_weights
from igrpo_algo.cli.demo.warmup import WarmUp, warm_up
from igrpo_algo.files import write_whole

from . import smollm
from .tasks import Task

HELD_OUT_SEED = 0


@dataclass(frozen=True)
class Size:
    """A rung of the ladder."""

    width: int
    layers: int


SIZES = {"64x2": Size(64, 2), "128x3": Size(128, 3), "256x4": Size(256, 4)}
SHIPPED = "64x2"
PRETRAINED = "smollm2"


def warm_weights(task: Task, size: str, path: Path, *, held_out: int, settings: WarmUp) -> None:
    """Write the warmed weights of a task and size, if they are not there."""
    if path.exists():
        return
    if size == PRETRAINED:
        smollm.load(path)
        return
    if task.weights is not None and size == SHIPPED:
        write_whole(path, task.weights.read_bytes())
        return
    tokenizer = build_tokenizer(task.words)
    rung = SIZES[size]
    model = build_model(tokenizer, width=rung.width, layers=rung.layers)
    draw = partial(
        task.converse,
        exclude=frozenset(held_out_problems(task, held_out)),
        draft_share=settings.draft_share,
    )
    for _ in warm_up(model, tokenizer, settings, draw):
        pass
    save_weights(model, path)


def load(task: Task, size: str, path: Path) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load a warmed or pretrained model and its tokenizer."""
    if size == PRETRAINED:
        model, own = smollm.load(path)
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), own
    tokenizer, rung = build_tokenizer(task.words), SIZES[size]
    return load_model(path, tokenizer, width=rung.width, layers=rung.layers), tokenizer


def count_weights(task: Task, size: str) -> int:
    """Count the weights of a model that is trained from scratch."""
    rung = SIZES[size]
    model = build_model(build_tokenizer(task.words), width=rung.width, layers=rung.layers)
    return sum(weights.numel() for weights in model.parameters())


def held_out_problems(task: Task, count: int) -> list[Any]:
    """Give the problems that neither the warm-up nor any run trains on."""
    return task.draw_many(count, HELD_OUT_SEED)
