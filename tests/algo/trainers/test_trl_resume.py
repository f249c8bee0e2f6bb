"""A run that is killed and resumed, against the run that never stopped: prompts and weights."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import early_letters, make_dataset, make_model, text_of, third_party
from trl.trainer.utils import RepeatSampler

from igrpo_algo.trainers.trl.bookkeeping import OrderOfEpoch, load_batches, save_batches

pytestmark = third_party
MakeTrainer = Callable[..., Any]


class Listening:
    """A reward that keeps the questions that it was asked about, stage by stage."""

    def __init__(self) -> None:
        self.__name__ = "listening"
        self.answers: list[list[str]] = []

    def __call__(self, completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        self.answers.append(answer)
        return early_letters(completions)


def run(
    make_trainer: MakeTrainer, folder: Path, checkpoint: Path | None = None, **options: Any
) -> tuple[Any, list[list[str]]]:
    """Train on 6 prompts, 2 to a batch of 4 refinements: 3 batches an epoch."""
    reward = Listening()
    known = {
        "train_dataset": make_dataset(6),
        "per_device_train_batch_size": 4,
        "num_refinements": 2,
        "num_drafts": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "draft_ties": "random",
        "draft_choice": "random",
        "draft_dropout": 0.5,
        "output_dir": str(folder),
    }
    model = make_model() if checkpoint is None else make_model(seed=5)
    trainer = make_trainer(model=model, reward_funcs=reward, **known | options)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer, reward.answers


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        ({"max_steps": 9}, (2, 3, 5, 8)),  # inside the epochs and between them
        ({"max_steps": 10, "num_iterations": 2}, (3, 6, 7)),
        ({"max_steps": 9, "steps_per_generation": 2}, (1, 3, 4)),
        (
            {"max_steps": 8, "gradient_accumulation_steps": 2, "num_iterations": 2,
             "steps_per_generation": 1},
            (4, 6),
        ),
        ({"max_steps": 8, "num_iterations": 2, "draft_loss_coef": 1.0}, (3,)),
    ],
    ids=["batches", "iterations", "steps-per-generation", "accumulation", "drafts-trained"],
)  # fmt: skip
def test_a_resumed_run_is_the_run_that_never_stopped(
    make_trainer: MakeTrainer, tmp_path: Path, options: dict[str, Any], stops: tuple[int, ...]
) -> None:
    whole, asked = run(make_trainer, tmp_path / "whole", **options)
    batches = [tuple(sorted(set(answer))) for answer in asked[::2]]
    epochs = [sum(batches[i : i + 3], ()) for i in range(0, len(batches) - 2, 3)]
    if "steps_per_generation" not in options:
        assert all(len(set(epoch)) == 6 for epoch in epochs)  # each prompt once an epoch
    assert whole.state.epoch > 1
    for stop in stops:
        checkpoint = tmp_path / "whole" / f"checkpoint-{stop}"
        resumed, later = run(make_trainer, tmp_path / f"from-{stop}", checkpoint, **options)
        assert resumed.state.global_step == options["max_steps"]
        assert later == asked[len(asked) - len(later) :]
        assert later
        for name, parameter in whole.model.named_parameters():
            torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=0)


def test_a_checkpoint_without_its_batch_still_keeps_the_order(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    options = {"max_steps": 8, "num_iterations": 2}
    _, asked = run(make_trainer, tmp_path / "whole", **options)
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    (checkpoint / "generated_batch_0.safetensors").unlink()
    _, later = run(make_trainer, tmp_path / "resumed", checkpoint, **options)
    # The batch of steps 3 and 4 is drawn again for the one update that is left of it.
    assert [sorted(answer) for answer in later] == [sorted(answer) for answer in asked[2:]]


def test_a_batch_survives_its_file(tmp_path: Path) -> None:
    shared = torch.arange(12).view(4, 3)
    batches = [
        {"ids": shared[:2], "advantages": torch.tensor([0.5, math.nan]), "count": torch.tensor(7)},
        {"ids": shared[2:], "is_draft": torch.tensor([True, False]), "count": torch.tensor(7)},
    ]
    save_batches(tmp_path / "new" / "batch.safetensors", batches)
    device = torch.device("cpu", 0)  # as a second rank has it: an index that files do not know
    loaded = load_batches(tmp_path / "new" / "batch.safetensors", device)
    for mine, other in zip(loaded, batches, strict=True):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, equal_nan=True)


def test_without_shuffling_the_order_is_that_of_the_data_set(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    _, asked = run(make_trainer, tmp_path / "whole", max_steps=4, shuffle_dataset=False)
    assert [sorted(set(answer)) for answer in asked[::2]] == [
        ["a0", "a1"], ["a2", "a3"], ["a4", "a5"], ["a0", "a1"],
    ]  # fmt: skip


@pytest.mark.parametrize("shuffle", [True, False])
def test_the_order_of_an_epoch_is_trls(shuffle: bool) -> None:
    def sampler() -> RepeatSampler:
        return RepeatSampler(
            range(7), mini_repeat_count=2, batch_size=3, repeat_count=2, shuffle=shuffle, seed=5
        )

    trls, done = sampler(), 0
    ours = OrderOfEpoch(sampler(), lambda: done)
    orders = []
    for done in range(4):
        orders.append([*trls])
        assert [*OrderOfEpoch(sampler(), partial(int, done))] == orders[-1]
        assert [*ours] == orders[-1]
    assert len(ours) == len(trls)
    assert (len(set(map(tuple, orders))) > 1) is shuffle


def test_eval_metrics_are_means_over_completions(make_trainer: MakeTrainer) -> None:
    values = {"0": 1.0, "1": None, "2": 4.0, "3": 16.0, "4": None}

    def digit(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return [float(text_of(prompt)[0]) for prompt in prompts]

    def some(prompts: list[Any], **columns: Any) -> list[float | None]:
        return [values[text_of(prompt)[0]] for prompt in prompts]

    trainer = make_trainer(
        reward_funcs=[digit, some],
        reward_weights=[1.0, 0.5],
        eval_dataset=make_dataset(5),
        num_generations_eval=2,
        per_device_eval_batch_size=4,  # batches of 4, 4 and 2 completions
    )
    found = trainer.evaluate()
    assert found["eval_rewards/digit/mean"] == pytest.approx(10 / 5)
    assert found["eval_rewards/some/mean"] == pytest.approx(21 / 3)
    assert found["eval_reward"] == pytest.approx((10 + 0.5 * 21) / 5)
    assert found["eval_completions/mean_length"] == pytest.approx(6, abs=1)


def test_a_batch_without_a_score_does_not_count(make_trainer: MakeTrainer) -> None:
    def first(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        return [3.0 if "0+0" in text_of(prompt) else None for prompt in prompts]

    trainer = make_trainer(
        reward_funcs=first,
        eval_dataset=make_dataset(3),
        num_generations_eval=2,
        per_device_eval_batch_size=4,
    )
    assert trainer.evaluate()["eval_reward"] == pytest.approx(3.0)
