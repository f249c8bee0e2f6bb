"""Engines behind the trainer: a vLLM server as TRL asks it."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_qwen import (
    third_party,
)

from igrpo_algo.trainers.trl import IGRPOConfig
from igrpo_algo.trainers.trl.sampler import check_sampler_options

pytestmark = third_party
MakeTrainer = Callable[..., Any]


class FakeServer:
    """What TRL's client of a vLLM server does: it asks once for every group of rows."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[list[int]], int]] = []

    def sync_weights(self) -> None:
        pass

    def generate(
        self, prompts: list[list[int]], images: None, num_generations: int, profiler: Any
    ) -> tuple[None, list[list[int]], list[list[list[float]]], None]:
        distinct = prompts[::num_generations]
        self.asked.append((distinct, num_generations))
        ids = [[30 + (7 * row + 3 * len(self.asked)) % 40, 2] for row in range(len(prompts))]
        return None, ids, [[[-4.6], [-4.7]] for _ in prompts], None


@pytest.mark.parametrize("mode", ["sequence_mask", "token_truncate"])
def test_a_vllm_server_is_asked_for_the_prompts_that_are_trained_on(
    make_trainer: MakeTrainer, mode: str
) -> None:
    trainer = make_trainer(
        num_drafts=2,
        per_device_train_batch_size=16,
        draft_dropout=0.5,
        draft_loss_coef=0.5,
        max_steps=1,
    )
    trainer.use_vllm, trainer._last_loaded_step, server = True, -1, FakeServer()
    trainer.vllm_importance_sampling_mode = mode
    trainer.vllm_generation, compute, seen = server, trainer._compute_loss, []

    def listen(model: Any, inputs: dict[str, Any]) -> Any:
        seen.append(inputs)
        return compute(model, inputs)

    trainer._compute_loss = listen
    before = trainer.model.lm_head.weight.detach().clone()
    trainer.train()
    (questions, drafts), (spliced, refinements) = server.asked
    assert (drafts, refinements) == (2, 4)
    assert len(questions) == len(spliced) == 4
    batch = seen[0]
    assert len(batch["advantages"]) == 16 + 8
    asked = [ids for ids in spliced for _ in range(4)], [ids for ids in questions for _ in range(2)]
    for is_draft, expected in zip((False, True), asked, strict=True):
        rows = batch["prompt_ids"][batch["is_draft"] == is_draft].tolist()
        assert sorted([token for token in row if token != 0] for row in rows) == sorted(expected)
    width = 1 if mode == "sequence_mask" else 2
    assert batch["importance_sampling_ratio"].shape == (24, width)
    assert not torch.equal(trainer.model.lm_head.weight, before)


def test_log_probs_of_a_cut_distribution_are_warned_of_by_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    cut = {"use_vllm": True, "top_p": 0.9, "top_k": 5}
    for options, warns in (
        (cut, True),
        ({"use_vllm": True}, False),
        (cut | {"vllm_importance_sampling_correction": False}, False),
        ({"top_p": 0.9}, False),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            args = IGRPOConfig("out", bf16=False, report_to="none", use_cpu=True, **options)
            check_sampler_options(args, None)
        assert ["top_p, top_k cuts" in r.getMessage() for r in caplog.records] == [True] * warns
