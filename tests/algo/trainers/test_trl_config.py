"""The configuration: its defaults, the paper's preset, JSON, and what it refuses."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import make_tokenizer, third_party
from transformers import HfArgumentParser

from igrpo_algo.drafts.random_tokens import RandomTokens
from igrpo_algo.drafts.rules import DraftRules, Fallback, Ties
from igrpo_algo.drafts.select import (
    select_best_wrong_draft,
    select_random_draft,
    select_worst_draft,
)
from igrpo_algo.drafts.text import DEFAULT_TEMPLATE, DraftTemplate
from igrpo_algo.trainers.trl import IGRPOConfig
from igrpo_algo.trainers.trl.draft_options import rules_of, template_of

pytestmark = third_party


def make(**options: Any) -> IGRPOConfig:
    return IGRPOConfig("out", bf16=False, report_to="none", **options)


def test_defaults_are_the_algorithm_of_the_paper() -> None:
    args = make()
    assert (args.num_drafts, args.num_refinements, args.num_generations) == (4, 4, 4)
    assert (args.loss_type, args.beta, args.scale_rewards) == ("grpo", 0.0, "group")
    assert (args.use_bias_correction_kl, args.num_iterations) == (False, 1)
    assert (args.draft_choice, args.all_drafts_failed) == ("best", "condition")
    assert (args.draft_dropout, args.draft_loss_coef, args.eval_with_draft) == (0.0, 0.0, False)
    assert template_of(args.draft_template) == DEFAULT_TEMPLATE


def test_the_preset_is_what_the_paper_reports() -> None:
    args = IGRPOConfig.paper("out", bf16=False, report_to="none")
    assert (args.num_drafts, args.num_refinements) == (4, 4)
    assert args.learning_rate == 1e-6
    assert args.lr_scheduler_type == "cosine_with_min_lr"
    assert args.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert args.get_warmup_steps(200) == 20
    assert (args.beta, args.temperature, args.entropy_coef) == (0.0, 0.7, 0.0)
    assert (args.loss_type, args.num_train_epochs) == ("grpo", 1)
    assert args.max_completion_length == 4096
    assert args.max_spliced_prompt_length == 5120
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    assert IGRPOConfig.paper("out", bf16=False, num_drafts=8, report_to="none").num_drafts == 8


def test_the_preset_decays_the_learning_rate_to_a_tenth() -> None:
    import torch
    from transformers import get_scheduler

    args = IGRPOConfig.paper("out", bf16=False, report_to="none")
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    scheduler = get_scheduler(args.lr_scheduler_type, optimizer, 10, 100, args.lr_scheduler_kwargs)
    rates = []
    for _ in range(100):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert max(rates) == pytest.approx(1e-6)
    assert rates[-1] == pytest.approx(1e-7)


def test_every_option_is_json(tmp_path: Path) -> None:
    template = DraftTemplate("<d>", "</d>", ("<d>", "</d>"))
    args = make(draft_template=template, draft_ties="shortest", max_draft_length=7)
    stored = json.loads(args.to_json_string())
    again = make(
        **{
            name: stored[name]
            for name in ("draft_template", "draft_ties", "max_draft_length", "num_generations")
        }
    )
    assert template_of(again.draft_template) == template
    assert (again.draft_ties, again.max_draft_length) == ("shortest", 7)


def test_options_come_from_a_command_line() -> None:
    (args,) = HfArgumentParser(IGRPOConfig).parse_args_into_dataclasses(
        [
            *("--output_dir", "out", "--bf16", "false", "--report_to", "none"),
            *("--num_drafts", "6", "--num_refinements", "2", "--draft_dropout", "0.25"),
            *("--draft_template", '{"before": "A", "after": "B"}'),
            *("--selection_reward", "judge", "--max_draft_length", "9"),
        ]
    )
    assert (args.num_drafts, args.num_generations, args.draft_dropout) == (6, 2, 0.25)
    assert template_of(args.draft_template) == DraftTemplate("A", "B")
    assert (args.selection_reward, args.max_draft_length) == ("judge", 9)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"num_drafts": -1}, ValueError, "num_drafts must be >= 0, got -1"),
    ({"num_drafts": 2.0}, TypeError, "num_drafts must be an int"),
    ({"num_refinements": 1}, ValueError, "num_refinements must be >= 2, got 1"),
    ({"num_generations": 1}, ValueError, "num_generations must be >= 2, got 1"),
    (
        {"num_generations": 8, "num_refinements": 4},
        ValueError,
        "one number, got {'num_refinements': 4, 'num_generations': 8}",
    ),
    (
        {"steps_per_generation": 2, "generation_batch_size": 24},
        ValueError,
        "generation_batch_size = 24 is not what steps_per_generation = 2 makes it, 16",
    ),
    ({"num_drafts": 0, "draft_dropout": 0.5}, ValueError, "draft_dropout would have no effect"),
    ({"num_drafts": 0, "eval_with_draft": True}, ValueError, "eval_with_draft would have no"),
    ({"num_drafts": 0, "success_reward": 0.5}, ValueError, "success_reward would have no"),
    ({"draft_keep": "head"}, ValueError, "draft_keep would have no effect: it needs max_draft_l"),
    ({"draft_choice": "random", "draft_ties": "shortest"}, ValueError, "draft_ties has no effect"),
    ({"reward_max": 1.0, "draft_choice": "worst"}, ValueError, "first best draft: leave out draft"),
    ({"reward_max": 1.0, "draft_loss_coef": 1.0}, ValueError, "needs reward_max=None"),
    ({"sampler_concurrency": 0}, ValueError, "sampler_concurrency must be >= 1"),
    ({"num_iterations": 0}, ValueError, "num_iterations must be >= 1, got 0"),
    ({"gradient_accumulation_steps": 0}, ValueError, "gradient_accumulation_steps must be >= 1"),
    ({"per_device_train_batch_size": 0}, ValueError, "per_device_train_batch_size must be >= 1"),
    ({"per_device_eval_batch_size": -1}, ValueError, "per_device_eval_batch_size must be >= 1"),
    ({"steps_per_generation": 0}, ValueError, "steps_per_generation must be >= 1, got 0"),
    ({"generation_batch_size": 0}, ValueError, "generation_batch_size must be >= 1, got 0"),
    ({"draft_choice": "first"}, ValueError, "draft_choice must be one of best, random, worst"),
    ({"draft_ties": "longest"}, ValueError, "draft_ties must be one of lowest_index"),
    ({"all_drafts_failed": "stop"}, ValueError, "all_drafts_failed must be one of condition"),
    ({"draft_keep": "middle"}, ValueError, "draft_keep must be one of tail, head"),
    ({"max_draft_length": 0}, ValueError, "max_draft_length must be >= 1"),
    ({"max_spliced_prompt_length": 0}, ValueError, "max_spliced_prompt_length must be >= 1"),
    ({"draft_dropout": 1.5}, ValueError, "draft_dropout must be <= 1"),
    ({"draft_loss_coef": -1.0}, ValueError, "draft_loss_coef must be >= 0"),
    ({"success_reward": float("nan")}, ValueError, "success_reward must be finite"),
    ({"reward_weights": [1, float("nan")]}, ValueError, r"reward_weights\[1\] must be finite"),
    ({"draft_template": "before"}, TypeError, "draft_template must be a dict"),
    ({"draft_template": {"before": "x"}}, TypeError, "after"),
    ({"num_drafts": 1, "draft_loss_coef": 1.0}, ValueError, "needs num_drafts >= 2"),
    ({"use_trl_loss": True, "draft_loss_coef": 1.0}, ValueError, "needs use_trl_loss=False"),
    ({"use_adaptive_entropy": True}, ValueError, "needs use_trl_loss=True"),
    ({"draft_choice": "none", "eval_with_draft": True}, ValueError, "eval_with_draft would have"),
    ({"draft_choice": "none", "draft_dropout": 0.1}, ValueError, "draft_dropout would have no"),
    ({"draft_choice": "none", "all_drafts_failed": "skip"}, ValueError, "all_drafts_failed would"),
    ({"strip_draft_thinking": "no"}, TypeError, "strip_draft_thinking must be True or False"),
    ({"eval_with_draft": 1}, TypeError, "eval_with_draft must be True or False, got int 1"),
    ({"selection_reward": 3}, TypeError, "selection_reward must be a string or None"),
    ({"draft_choice": ["best"]}, TypeError, "draft_choice must be a string, got list"),
    ({"draft_choice": "none", "max_draft_length": 9}, ValueError, "max_draft_length would have no"),
    ({"num_drafts": 1, "draft_ties": "random"}, ValueError, "draft_ties would .* with one draft"),
    ({"num_drafts": 1, "draft_choice": "worst"}, ValueError, "draft_choice would have no effect"),
    ({"draft_choice": "random", "selection_reward": "r"}, ValueError, "selection_reward has no"),
    (
        {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 3,
            "num_refinements": 6,
            "num_drafts": 4,
            "draft_loss_coef": 1.0,
        },
        ValueError,
        r"per_device_train_batch_size \* num_drafts .* got 2 \* 4 and 6",
    ),
    (
        {
            "eval_with_draft": True,
            "per_device_eval_batch_size": 2,
            "num_generations_eval": 4,
            "num_drafts": 3,
        },
        ValueError,
        r"got 2 \* 3 and 4",
    ),
    ({"use_vllm": True, "vllm_max_model_length": 1000}, ValueError, "max_spliced_prompt_length"),
    (
        {"use_vllm": True, "vllm_max_model_length": 1000, "max_spliced_prompt_length": 600},
        ValueError,
        "= 1112 exceeds vllm_max_model_length = 1000",
    ),
]


@pytest.mark.parametrize(
    ("options", "error", "message"), REFUSED, ids=lambda value: str(value)[:60]
)
def test_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("options", "size"),
    [({}, 4), ({"num_generations": 8}, 8), ({"num_refinements": 2}, 2),
     ({"num_generations": 2, "num_refinements": 2}, 2)],
)  # fmt: skip
def test_the_group_has_one_size_under_both_names(options: dict[str, int], size: int) -> None:
    args = make(**options)
    assert (args.num_generations, args.num_refinements) == (size, size)


def test_a_configuration_can_be_replaced_in_part() -> None:
    args = make(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert (args.steps_per_generation, args.generation_batch_size) == (2, 16)
    other = replace(args, gradient_accumulation_steps=4, num_generations=2)
    assert (other.steps_per_generation, other.generation_batch_size) == (4, 32)
    assert (other.num_refinements, other.num_generations) == (2, 2)
    assert replace(args, num_refinements=8).num_generations == 8
    given = replace(make(steps_per_generation=2, num_refinements=2), learning_rate=0.5)
    assert (given.steps_per_generation, given.generation_batch_size) == (2, 16)
    with pytest.raises(ValueError, match="one number"):
        replace(given, num_generations=4)


def test_a_stored_configuration_is_read_back() -> None:
    args = make(gradient_accumulation_steps=2, num_refinements=2)
    sizes = ("num_refinements", "num_generations", "steps_per_generation", "generation_batch_size")
    stored = {name: json.loads(args.to_json_string())[name] for name in sizes}
    assert stored == {name: getattr(args, name) for name in sizes}
    again = make(gradient_accumulation_steps=2, **stored)
    assert again.generation_batch_size == args.generation_batch_size


def test_without_drafts_it_is_plain_grpo() -> None:
    args = IGRPOConfig.paper("out", num_drafts=0, bf16=False, report_to="none")
    assert (args.num_drafts, args.num_refinements) == (0, 4)


def test_the_preset_without_a_shown_draft_has_no_options_of_one() -> None:
    args = IGRPOConfig.paper("out", draft_choice="none", bf16=False, report_to="none")
    assert (args.draft_template, args.max_spliced_prompt_length) == (None, None)


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, DraftRules(failed_below=1.0)),
        (
            {"draft_choice": "worst", "draft_ties": "shortest", "success_reward": 0.5},
            DraftRules(select_worst_draft, ties=Ties.SHORTEST, failed_below=0.5),
        ),
        (
            {"draft_choice": "random", "draft_dropout": 0.25},
            DraftRules(select_random_draft, ties=Ties.RANDOM, failed_below=1.0, dropout=0.25),
        ),
        ({"draft_choice": "none"}, DraftRules(failed_below=1.0, dropout=1.0)),
        ({"draft_choice": "random_tokens"}, DraftRules(failed_below=1.0)),
        (
            {"draft_choice": "best_wrong"},
            DraftRules(select_best_wrong_draft, failed_below=1.0),
        ),
        (
            {"all_drafts_right": "plain_prompt"},
            DraftRules(failed_below=1.0, when_solved=Fallback.PLAIN_PROMPT),
        ),
        (
            {"all_drafts_failed": "skip", "draft_ties": "random"},
            DraftRules(failed_below=1.0, when_failed=Fallback.SKIP, ties=Ties.RANDOM),
        ),
    ],
)
def test_options_about_drafts_as_rules(options: dict[str, Any], rules: DraftRules) -> None:
    made = rules_of(make(**options), make_tokenizer())
    assert replace(made, splice=rules.splice) == rules


def test_the_best_wrong_draft_is_below_the_reward_of_success() -> None:
    made = rules_of(make(draft_choice="best_wrong", success_reward=0.5), make_tokenizer())
    assert made.choose(torch.tensor([[0.7, 0.2, 0.4]]), seeds=[0]).index.item() == 2


def test_options_about_the_splice() -> None:
    tokenizer = make_tokenizer()
    assert rules_of(make(draft_choice="random_tokens"), tokenizer).splice.strip == RandomTokens(
        tokenizer
    )
    plain = rules_of(make(strip_draft_thinking=False), tokenizer).splice
    shown = rules_of(make(draft_choice="random_tokens", strip_draft_thinking=False), tokenizer)
    assert shown.splice.strip == RandomTokens(tokenizer, None)
    assert (plain.strip, plain.budget, plain.template) == (None, None, DEFAULT_TEMPLATE)
    assert {"<s>", "</s>"} <= set(plain.special_tokens)
    options = {"max_draft_length": 7, "max_spliced_prompt_length": 9, "draft_keep": "head"}
    budget = rules_of(make(**options), tokenizer, {"enable_thinking": False}).splice.budget
    assert (budget.max_draft_tokens, budget.max_prompt_tokens, budget.keep) == (7, 9, "head")
    assert budget.chat_template_kwargs == {"enable_thinking": False}


def test_drafts_that_straddle_ranks_unevenly_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two ranks of two rows: three drafts cannot be dealt in equal runs.
    monkeypatch.setattr(IGRPOConfig, "world_size", property(lambda self: 2))
    with pytest.raises(ValueError, match=r"steps_per_generation \* num_drafts .* got 2 \* 3 and 4"):
        make(per_device_train_batch_size=1, gradient_accumulation_steps=2, num_drafts=3)
    assert make(per_device_train_batch_size=1, gradient_accumulation_steps=2).num_drafts == 4
