"""What a two-stage run logs: metrics, warnings, the table of completions."""

import itertools
import logging
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from scripted import DRAFTS, REFINED, run_stages
from tiny_qwen import (
    SHORT_TEMPLATE,
    digit_reward,
    make_tokenizer,
    text_of,
    third_party,
)

from igrpo_algo.advantages.of_groups import center_by_group
from igrpo_algo.drafts.random_tokens import RandomTokens

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def test_metrics_of_both_stages(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, max_draft_length=2)
    refined = ["b3", "b3", "r3", "s4", "t0", "u0", "v0", "w0"]
    run_stages(trainer, ["a1", "b3", "c2", "d0", "eee0", "f", "g0", "h0"], refined)
    values = {k: v for k, (v,) in trainer._metrics["train"].items() if k.startswith("igrpo/")}
    expected = {
        "igrpo/draft_reward": 6 / 7,
        "igrpo/best_draft_reward": 1.5,
        "igrpo/best_draft_right": 0.5,
        "igrpo/right_after_right_draft": 1.0,
        "igrpo/right_after_wrong_draft": 0.0,
        "igrpo/uplift": ((3 + 3 + 3 + 4) / 4 - 6 / 4 + 0) / 2,
        "igrpo/draft_zero_std": 0.5,
        "igrpo/refinement_zero_std": 0.5,
        "igrpo/copied": 0.25,
        "igrpo/draft_length": 2.0,
        "igrpo/draft_tokens_cut": 1.0,  # "eee0" lost two tokens, "b3" none
        "igrpo/plain_prompts": 0.0,
    }
    assert values == pytest.approx(expected, rel=1e-6)


def test_what_repeats_the_random_tokens_is_a_copy_and_their_draft_is_none(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, draft_choice="random_tokens")
    shown = RandomTokens(make_tokenizer())("b3")
    run_stages(trainer, ["b3"] * 8, [shown, "b3", "b3", "b3"] * 2)
    assert trainer._metrics["train"]["igrpo/copied"] == [0.25]


def test_metrics_of_trl_are_those_of_stage_two(make_trainer: MakeTrainer) -> None:
    def noted(completions: list[Any], log_metric: Any, **columns: Any) -> list[float | None]:
        log_metric("longest", float(max(len(text_of(c)) for c in completions)))
        return digit_reward(completions)

    trainer = make_trainer(reward_funcs=noted)
    run_stages(trainer, ["long draft 3"] * 8, REFINED)
    metrics = trainer._metrics["train"]
    assert metrics["reward"] == [pytest.approx(12 / 8)]
    assert metrics["completions/mean_length"] == [2.0]
    assert metrics["longest"] == [2.0]
    assert text_of(trainer._logs["completion"][0]) == "p1"  # TRL 1.14 logs the text
    assert len(trainer._logs["completion"]) == 8


def test_tokens_of_both_stages_are_counted(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, draft_template=SHORT_TEMPLATE)
    _, sampler = run_stages(trainer, DRAFTS, REFINED)
    encode = trainer._tokenizer
    prompts = [text for stage in sampler.prompts for text in stage]
    tokens = sum(len(encode(text)["input_ids"]) for text in [*prompts, *DRAFTS, *REFINED])
    assert trainer._metrics["train"]["num_tokens"] == [tokens]


def test_copies_are_warned_of_once(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    def messages() -> list[str]:
        return [
            r.getMessage() for r in caplog.records if r.name == "igrpo_algo.trainers.trl.trainer"
        ]

    trainer = make_trainer(reward_funcs=digit_reward)
    with caplog.at_level(logging.WARNING, logger="igrpo_algo.trainers.trl.trainer"):
        run_stages(trainer, DRAFTS, ["b3"] * 4 + ["x0"] * 4)
        assert not messages()  # a half is not more than a half
        for _ in range(2):
            run_stages(trainer, DRAFTS, ["b3"] * 4 + ["e0"] + ["x0"] * 3)
    assert [message[:4] for message in messages()] == ["62% "]


def test_a_resumed_run_remembers_what_was_logged_before(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    before = {"eval_loss": "none", "igrpo/draft_reward": 0.9, "igrpo/uplift": -0.8}
    before["igrpo/right_after_wrong_draft"] = None  # NaN, in a checkpoint
    trainer.state.log_history = [before] * 10  # said then: the template breaks the model
    said = [trainer._watch.see({"draft_reward": 0.1, "uplift": -0.8}) for _ in range(10)]
    assert ["forgets the plain question" in text for texts in said for text in texts] == [True]


def test_the_table_of_completions_has_a_column_of_drafts(make_trainer: MakeTrainer) -> None:
    def noted(completions: list[Any], log_extra: Any, **columns: Any) -> list[float | None]:
        log_extra("text", [text_of(c) for c in completions])
        return digit_reward(completions)

    trainer = make_trainer(
        reward_funcs=noted,
        log_completions=True,
        draft_template=SHORT_TEMPLATE,
        per_device_train_batch_size=16,  # rows that the table keeps
    )
    path = f"{trainer.args.output_dir}/completions/completions_00000.parquet"
    run_stages(trainer, ["a", "b3", "c3", "d0", "e", "f", "g", "h"], REFINED)
    trainer.log({})
    assert pandas.read_parquet(path)["text"].tolist() == REFINED
    run_stages(trainer, REFINED[::-1], mode="eval")
    trainer.log({})
    table = pandas.read_parquet(path)
    assert table["draft"].fillna("none").tolist() == ["b3"] * 4 + ["none"] * 12
    assert table["text"].tolist() == REFINED + REFINED[::-1]


def test_a_rewards_own_column_of_drafts_stands_beside_ours(make_trainer: MakeTrainer) -> None:
    def noted(completions: list[Any], log_extra: Any, **columns: Any) -> list[float | None]:
        log_extra("draft", [text_of(c)[:1] for c in completions])
        return digit_reward(completions)

    trainer = make_trainer(
        reward_funcs=noted,
        log_completions=True,
        draft_template=SHORT_TEMPLATE,
        per_device_train_batch_size=16,
    )
    run_stages(trainer, DRAFTS, REFINED)
    run_stages(trainer, REFINED, mode="eval")
    trainer.log({})
    table = pandas.read_parquet(f"{trainer.args.output_dir}/completions/completions_00000.parquet")
    assert table["draft"].tolist() == [text[0] for text in REFINED * 2]
    assert table["igrpo/draft"].fillna("none").tolist() == ["b3"] * 4 + ["e0"] * 4 + ["none"] * 8


def test_the_table_shows_the_advantages_that_are_trained_on(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        reward_funcs=digit_reward,
        advantage=center_by_group,
        per_device_train_batch_size=16,  # rows that the table keeps
    )
    batch, _ = run_stages(trainer, DRAFTS, REFINED)
    assert batch["advantages"].tolist() == [-1.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5, 1.5]
    assert [*trainer._logs["advantages"]] == batch["advantages"].tolist()


class Collapsed:
    """A policy that repeats its draft, and draws digits where it is shown none."""

    def __init__(self) -> None:
        self.tokenizer = make_tokenizer()
        self.digits = itertools.cycle("00100000")

    def __call__(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[Any, None]:
        prompts = [self.tokenizer.decode(ids) for ids in prompt_ids]
        texts = [re.search(r"\[(.)\]", prompt) for prompt in prompts]
        drawn = [found[1] if found else next(self.digits) for found in texts]
        return [self.tokenizer.convert_tokens_to_ids([text]) for text in drawn], None


def test_a_run_that_collapses_is_warned_of(
    make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, draft_template=SHORT_TEMPLATE, max_steps=12)
    trainer._generate_single_turn = Collapsed()
    with caplog.at_level(logging.WARNING, logger="igrpo_algo.trainers.trl.trainer"):
        trainer.train()
    ours = [r.getMessage() for r in caplog.records if r.name == "igrpo_algo.trainers.trl.trainer"]
    assert len(ours) == 3
    assert "100% of the refinements repeat their draft" in ours[0]
    assert "100% of the groups of refinements had equal rewards" in ours[1]
    assert "100% after a right draft and in 0% after a wrong one" in ours[2]
    assert all("draft_loss_coef" in warning for warning in ours)
    logs = [log for log in trainer.state.log_history if "reward" in log]
    known = [log["igrpo/right_after_right_draft"] for log in logs]
    assert {share for share in known if share is not None} == {1.0}


def test_a_batch_of_two_rounds_is_watched_once(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        reward_funcs=digit_reward, draft_template=SHORT_TEMPLATE, refinement_rounds=2
    )
    seen: list[dict[str, float]] = []
    trainer._watch = SimpleNamespace(see=lambda metrics: seen.append(metrics) or [])
    run_stages(trainer, DRAFTS, REFINED, DRAFTS)
    rounds = trainer._metrics["train"]["igrpo/uplift"]
    assert len(rounds) == 2
    assert [metrics["uplift"] for metrics in seen] == [sum(rounds) / 2]
