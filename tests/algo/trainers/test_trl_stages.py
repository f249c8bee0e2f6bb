"""The two stages inside TRL's trainer, with what is sampled written out by hand."""

import asyncio
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from datasets import Dataset
from scripted import DRAFTS, REFINED, ScriptedSampler, chat, run_stages
from tiny_qwen import (
    SHORT_TEMPLATE,
    digit_reward,
    make_dataset,
    make_model,
    make_tokenizer,
    text_of,
    third_party,
)
from transformers import Qwen3ForSequenceClassification
from trl import GRPOTrainer

from igrpo_algo.advantages.baselines import maxrl, rloo
from igrpo_algo.advantages.of_groups import center_by_group, standardize_by_group

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def test_stage_two_is_drawn_from_the_prompt_with_the_best_draft(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, draft_template=SHORT_TEMPLATE)
    batch, sampler = run_stages(trainer, DRAFTS, REFINED)
    assert sampler.prompts[0] == [chat("0+0?")] * 4 + [chat("1+1?")] * 4
    assert sampler.prompts[1] == [chat("0+0?[b3]")] * 4 + [chat("1+1?[e0]")] * 4
    shown = [trainer._tokenizer.decode(ids[ids != 0]) for ids in batch["prompt_ids"]]
    assert shown == sampler.prompts[1]
    written = [trainer._tokenizer.decode(ids[ids != 0]) for ids in batch["completion_ids"]]
    assert written == REFINED


def test_advantages_are_over_the_refinements_alone(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward)
    batch, _ = run_stages(trainer, DRAFTS, REFINED)
    expected = []
    for group in ([1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]):
        mean = sum(group) / 4
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / 3)
        expected += [(r - mean) / (std + 1e-4) for r in group]
    # float32 arithmetic on numbers of order one
    torch.testing.assert_close(batch["advantages"], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_chat", [True, False])
def test_rewards_see_the_original_prompt_and_the_columns_in_both_stages(
    make_trainer: MakeTrainer, is_chat: bool
) -> None:
    calls: list[dict[str, Any]] = []

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        calls.append({"prompts": prompts, "answer": columns["answer"], "texts": completions})
        return digit_reward(completions)

    dataset = make_dataset(chat=is_chat)
    trainer = make_trainer(reward_funcs=reward, train_dataset=dataset)
    _, sampler = run_stages(trainer, DRAFTS, REFINED)
    for call, texts in zip(calls, (DRAFTS, REFINED), strict=True):
        assert call["prompts"] == [dataset[q]["prompt"] for q in (0, 1) for _ in range(4)]
        assert call["answer"] == ["a0"] * 4 + ["a1"] * 4
        assert [text_of(completion) for completion in call["texts"]] == texts
    assert all("b3" in prompt for prompt in sampler.prompts[1][:4])


def test_counts_of_the_stages_are_independent(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, num_drafts=3, num_refinements=4)
    batch, sampler = run_stages(trainer, ["1", "2", "0", "0", "0", "4"], REFINED)
    assert sampler.prompts[0] == [chat("0+0?")] * 3 + [chat("1+1?")] * 3
    assert len(batch["advantages"]) == 8
    assert "wrong: 2<" in sampler.prompts[1][0]
    assert "wrong: 4<" in sampler.prompts[1][7]


def test_several_rewards_are_weighted_and_none_is_left_out(make_trainer: MakeTrainer) -> None:
    def flat(completions: list[Any], **columns: Any) -> list[float | None]:
        return [None if "x" in text_of(c) else 1.0 for c in completions]

    async def length(completions: list[Any], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text_of(c))) for c in completions]

    trainer = make_trainer(
        reward_funcs=[digit_reward, flat, length],
        reward_weights=[1.0, 10.0, -1.0],
        draft_template=SHORT_TEMPLATE,
    )
    # 3+10-1, 9+0-2 (flat says None), 4+10-3, 0+10-1; then one draft that nobody can tell apart
    _, sampler = run_stages(
        trainer, ["3", "9x", "4aa", "0", "0", "0", "0", "0"], REFINED, questions=(0, 1)
    )
    assert sampler.prompts[1][0] == chat("0+0?[3]")


def test_evaluation_is_single_shot(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward)
    _, sampler = run_stages(trainer, REFINED, mode="eval")
    assert sampler.prompts == [[chat("0+0?")] * 4 + [chat("1+1?")] * 4]
    assert not any(name.startswith("igrpo/") for name in trainer._metrics["eval"])


def test_evaluation_with_a_draft(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        reward_funcs=digit_reward,
        eval_with_draft=True,
        draft_dropout=1.0,  # of training alone
        draft_template=SHORT_TEMPLATE,
    )
    _, sampler = run_stages(trainer, DRAFTS, REFINED, mode="eval")
    assert sampler.prompts[1] == [chat("0+0?[b3]")] * 4 + [chat("1+1?[e0]")] * 4
    assert trainer._metrics["eval"]["igrpo/best_draft_right"] == [0.5]


def test_the_prompt_of_the_data_set_is_left_as_it_was(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward)
    rows = [trainer.train_dataset[0] for _ in range(8)]
    before = [[dict(message) for message in row["prompt"]] for row in rows]
    trainer._generate_single_turn = ScriptedSampler([DRAFTS, REFINED])
    trainer.model.train()
    trainer._generate_and_score_completions(rows)
    assert [row["prompt"] for row in rows] == before


def test_a_reward_model_scores_both_stages(make_trainer: MakeTrainer) -> None:
    tokenizer, config = make_tokenizer(), make_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    judge = Qwen3ForSequenceClassification(config).eval()
    trainer = make_trainer(
        reward_funcs=judge, reward_processing_classes=tokenizer, draft_template=SHORT_TEMPLATE
    )
    batch, sampler = run_stages(trainer, DRAFTS, REFINED)

    def score(question: str, answer: str) -> float:
        text = f"<s>user:{question}</s><s>assistant:{answer}</s>"
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return judge(input_ids=ids).logits.item()

    for prompt, question in enumerate(["0+0?", "1+1?"]):
        rows = slice(4 * prompt, 4 * prompt + 4)
        scores = [score(question, draft) for draft in DRAFTS[rows]]
        best = DRAFTS[rows][scores.index(max(scores))]
        assert sampler.prompts[1][rows] == [chat(f"{question}[{best}]")] * 4
        rewards = torch.tensor([score(question, text) for text in REFINED[rows]])
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        # Padding changes float32 sums, and differences of the scores are a tenth of them.
        torch.testing.assert_close(batch["advantages"][rows], expected, rtol=1e-3, atol=1e-3)


def test_without_drafts_there_is_one_stage(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, num_drafts=0, log_completions=True)
    batch, sampler = run_stages(trainer, REFINED)
    assert sampler.prompts == [[chat("0+0?")] * 4 + [chat("1+1?")] * 4]
    assert len(batch["advantages"]) == 8
    assert not any(name.startswith("igrpo/") for name in trainer._metrics["train"])
    assert "draft" not in trainer._logs["extra"]


@pytest.mark.parametrize(
    "advantage", [rloo, maxrl, center_by_group, partial(standardize_by_group, ddof=0, eps=1e-6)]
)
def test_any_function_makes_the_advantages_of_both_stages(
    make_trainer: MakeTrainer, advantage: Any
) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, advantage=advantage, draft_loss_coef=1.0)
    batch, _ = run_stages(trainer, DRAFTS, REFINED)
    nan = float("nan")
    refined = advantage(torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 2.0]])).flatten()
    drafted = advantage(torch.tensor([[1.0, 3.0, 3.0, 0.0], [0.0, 0.0, nan, 0.0]])).flatten()
    assert batch["advantages"].tolist() == [*refined.tolist(), *drafted.tolist()]


@pytest.mark.parametrize(
    "options",
    [
        {"scale_rewards": "batch"},
        {"scale_rewards": "none"},
        {"multi_objective_aggregation": "normalize_then_sum"},
    ],
)
def test_options_about_advantages_mean_what_they_mean_in_trl(
    make_trainer: MakeTrainer, options: dict[str, str]
) -> None:
    def length(completions: list[Any], **columns: Any) -> list[float]:
        return [float(len(text_of(c))) for c in completions]

    found = []
    for kind in (GRPOTrainer, None):
        trainer = make_trainer(
            reward_funcs=[digit_reward, length], reward_weights=[1.0, 0.3], num_drafts=0, **options
        )
        trainer._generate_single_turn = ScriptedSampler(
            [["1", "x22", "3", "44", "0", "5", "66", "7"]]
        )
        trainer.model.train()
        rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
        generate = (kind or type(trainer))._generate_and_score_completions
        found.append(generate(trainer, rows)["advantages"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)  # float32 sums


def test_equal_rewards_have_no_advantage_at_all(make_trainer: MakeTrainer) -> None:
    def tenth(completions: list[Any], **columns: Any) -> list[float]:
        return [0.1] * len(completions)

    trainer = make_trainer(reward_funcs=tenth, num_drafts=0)
    batch, _ = run_stages(trainer, REFINED)
    assert not batch["advantages"].any()  # TRL leaves the rounding of the mean, over 1e-4


@pytest.mark.parametrize(
    "advantage", [lambda rewards: rewards[:, 0], lambda rewards: rewards * torch.inf]
)
def test_an_advantage_that_does_not_fit_is_named(make_trainer: MakeTrainer, advantage: Any) -> None:
    trainer = make_trainer(reward_funcs=digit_reward, num_drafts=0, advantage=advantage)
    with pytest.raises(ValueError, match=r"advantage must return finite values .*\[2, 4\]"):
        run_stages(trainer, REFINED)


def test_an_infinite_reward_is_named_in_either_stage(make_trainer: MakeTrainer) -> None:
    def steep(completions: list[Any], **columns: Any) -> list[float]:
        return [torch.inf if text_of(each) == "b3" else 0.0 for each in completions]

    trainer = make_trainer(reward_funcs=[digit_reward, steep], reward_weights=[1.0, 0.0])
    for stages in ([DRAFTS, REFINED], [REFINED, DRAFTS]):
        with pytest.raises(ValueError, match="reward function 'steep' must return finite numbers"):
            run_stages(trainer, *stages)


def test_prompts_are_encoded_as_samplers_encode_them(make_trainer: MakeTrainer) -> None:
    opened = [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "so "}]
    dataset = Dataset.from_list([{"prompt": opened}, {"prompt": opened}])
    trainer = make_trainer(reward_funcs=digit_reward, train_dataset=dataset)
    _, sampler = run_stages(trainer, DRAFTS, REFINED)
    assert sampler.prompts[0] == ["<s>user:1?</s><s>assistant:so "] * 8  # continued, not closed


def test_thinking_marks_that_are_tokens_reach_rewards_and_are_stripped(
    make_trainer: MakeTrainer,
) -> None:
    seen: list[str] = []

    def noted(completions: list[Any], **columns: Any) -> list[float | None]:
        seen.extend(text_of(c) for c in completions)
        return digit_reward(completions)

    trainer = make_trainer(reward_funcs=noted, draft_template=SHORT_TEMPLATE)
    tokenizer = trainer._tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    thought = tokenizer.convert_tokens_to_ids(["<think>", "n", "o", "</think>", "9", "</s>"])
    scripted = ScriptedSampler([["0"] * 7, REFINED])

    def draw(prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[Any, None]:
        if scripted.prompts:
            return scripted(prompt_ids)
        return [thought, *scripted(prompt_ids[1:])[0]], None

    trainer._generate_single_turn = draw
    trainer.model.train()
    trainer._generate_and_score_completions(
        [trainer.train_dataset[q] for q in (0, 1) for _ in "4444"]
    )
    assert seen[:2] == ["<think>no</think>9", "0"]
    assert scripted.prompts[1][0] == chat("0+0?[9]")
