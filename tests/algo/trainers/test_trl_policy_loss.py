"""Our loss inside the run against TRL's own, and both stages against two losses by hand."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from scripted import ScriptedSampler
from tiny_qwen import digit_reward, make_model, make_tokenizer, third_party
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

from igrpo_kernels import Clip, FixedLength, Reinforce, Sum, TokenMean

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def loss_and_gradients(trainer: Any, compute: Any, inputs: dict[str, Any]) -> list[Tensor]:
    loss = compute(trainer.model, inputs)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


def newly_logged(trainer: Any, compute: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    """Return what a loss returned and what it logged, which is taken back."""
    metrics = trainer._metrics["train"]
    before = {name: len(values) for name, values in metrics.items()}
    result = compute()
    found = {
        name: values.pop()
        for name, values in list(metrics.items())
        if len(values) > before.get(name, 0)
    }
    return result, found


def compare_with_trl(trainer: Any) -> list[dict[str, float]]:
    """Train with our loss; at each micro-batch demand TRL's value, gradient and metrics."""
    ours, compared, largest = trainer._compute_loss, [], []

    def theirs(*args: Any) -> Tensor:
        return GRPOTrainer._compute_loss(trainer, *args)

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        (mine, my_metrics), (other, other_metrics) = (
            newly_logged(trainer, partial(loss_and_gradients, trainer, compute, inputs))
            for compute in (ours, theirs)
        )
        largest.append(max(float(gradient.abs().max()) for gradient in other[1:]))
        # The sums run in another order: float32 rounding of gradients of order 0.1.
        for mine_each, other_each in zip(mine, other, strict=True):
            torch.testing.assert_close(mine_each, other_each, rtol=1e-5, atol=2e-7)
        # Every advantage is far from zero here, so the means over the others are those over all.
        my_metrics = {k.removesuffix("/nonzero_advantage"): v for k, v in my_metrics.items()}
        assert my_metrics.keys() == other_metrics.keys() | {"ratio"}
        del my_metrics["ratio"]
        assert my_metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-7, nan_ok=True)
        compared.append(other_metrics)
        return ours(model, inputs)

    trainer._compute_loss = both
    trainer.train()
    assert max(largest) > 1e-4
    assert all(len(each) == len(compared[0]) or "entropy_coef" in each for each in compared)
    return compared


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    """A folder to load the reference model from."""
    make_model(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def off_policy(**options: Any) -> dict[str, Any]:
    """Two epochs over each generation, and two accumulation steps: ratios differ from 1."""
    return {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "generation_kwargs": {"suppress_tokens": [0, 1, 3, *range(12, 99)]},  # one in 9 is the end
        **options,
    }


LOSSES: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.03},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_type": "dapo", "steps_per_generation": 4},
    {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 24},
    {"loss_type": "cispo", "epsilon_high": 1.01},
    {"loss_type": "sapo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "vespo"},
    {"loss_type": "grpo", "entropy_coef": 0.1},
    {"loss_type": "grpo", "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    {"loss_type": "dapo", "off_policy_mask_threshold": 0.001},
]

SIDES = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
CLIPS = {f"clip_ratio/{name}" for name in SIDES}
METRICS = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), {"entropy"} | CLIPS),
    "cispo": {"entropy", "cispo_clip_ratio"},
    "vespo": {"entropy", "vespo/phi_seq_mean"},
    "sapo": {"entropy"},
}


@pytest.mark.parametrize(
    "options", LOSSES, ids=lambda options: "-".join(map(str, options.values()))
)
def test_equals_trl_in_loss_and_gradient(
    make_trainer: MakeTrainer, options: dict[str, Any]
) -> None:
    compared = compare_with_trl(make_trainer(**off_policy(**options)))
    assert len(compared) == 4
    assert {name for each in compared for name in each} >= METRICS[options["loss_type"]]
    if "entropy_coef" in options:
        assert {"policy_loss", "entropy_coef"} <= {name for each in compared for name in each}


def test_what_is_clipped_is_logged_as_by_trl(make_trainer: MakeTrainer) -> None:
    options = off_policy(loss_type="dapo", epsilon=0.01, max_steps=4)
    compared = compare_with_trl(make_trainer(**options))
    for name in ("low_mean", "high_mean", "region_mean", "high_max"):
        assert any(each[f"clip_ratio/{name}"] > 0 for each in compared)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dapo", "use_bias_correction_kl": True},
        {"loss_type": "sapo", "use_bias_correction_kl": True},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    ],
)
def test_equals_trl_with_a_kl_to_a_reference(
    make_trainer: MakeTrainer, saved_model: str, options: dict[str, Any]
) -> None:
    trainer = make_trainer(model=saved_model, beta=0.05, **off_policy(**options))
    assert len(compare_with_trl(trainer)) == 4
    steps = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert steps[-1] > 1e-4


def test_reference_log_probs_are_those_under_the_spliced_prompt(
    make_trainer: MakeTrainer, saved_model: str
) -> None:
    trainer = make_trainer(model=saved_model, reward_funcs=digit_reward, beta=0.1)
    trainer._generate_single_turn = ScriptedSampler([["a7"] * 8, ["b2"] * 8])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    tokenizer, template = make_tokenizer(), trainer.rules.splice.template
    prompt = f"<s>user:0+0?{template.before}a7{template.after}</s><s>assistant:"
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = tokenizer("b2", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = make_model(seed=1)(torch.tensor([prompt_ids + answer])).logits[0]
    expected = logits[-3:-1].log_softmax(-1)[torch.arange(2), torch.tensor(answer)]
    # The same model in float32, once padded and once not.
    torch.testing.assert_close(
        batch["ref_per_token_logps"], expected.expand(8, 2), rtol=1e-5, atol=1e-5
    )


def test_trl_loss_on_request(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(use_trl_loss=True, loss_type="dapo", max_steps=1)
    trainer.train()
    assert "ratio" not in trainer.state.log_history[0]  # a metric of our loss alone


def test_a_surrogate_and_an_aggregate_take_the_place_of_the_loss_type(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(
        surrogate=Reinforce(), aggregate=Sum(denominator=7.0), reward_funcs=digit_reward
    )
    trainer._generate_single_turn = ScriptedSampler([["0"] * 8, ["1", "22", "0", "5"] * 2])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    trainer.current_gradient_accumulation_steps = 3
    loss = trainer._compute_loss(trainer.model, batch)
    mask = batch["completion_mask"]
    with torch.no_grad():
        logprobs, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
            torch.cat([batch["prompt_mask"], mask], 1),
            mask.shape[1],
        )
    expected = sum(
        -float(batch["advantages"][b]) * float(logprobs[b, t]) / 7
        for b in range(8)
        for t in range(mask.shape[1])
        if mask[b, t]
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_drafts_trained_too_add_their_own_loss(make_trainer: MakeTrainer, loss_type: str) -> None:
    """Gradient of the accumulated micro-batches = refinements' GRPO + coef * drafts' GRPO."""
    coef = 0.5
    trainer = make_trainer(
        reward_funcs=digit_reward,
        draft_loss_coef=coef,
        num_drafts=2,
        num_refinements=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        loss_type=loss_type,
        max_completion_length=5,
    )
    drafts = ["a1", "b3 x", "c", "d0yyy"]
    refined = ["p1", "q2zz", "r3", "s", "t0", "u9u", "v0", "w2"]
    tokenizer = trainer._tokenizer
    trainer._generate_single_turn = ScriptedSampler([drafts, refined])
    trainer.model.train()
    rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
    batches = [trainer._prepare_inputs(rows)]
    trainer._step = 1
    batches.append(trainer._prepare_inputs(rows))
    trainer.current_gradient_accumulation_steps = 2
    assert [len(batch["advantages"]) for batch in batches] == [6, 6]
    total = [
        sum(parts)
        for parts in zip(
            *(loss_and_gradients(trainer, trainer._compute_loss, batch) for batch in batches),
            strict=True,
        )
    ]

    def group_advantages(rewards: list[float | None], size: int) -> list[float]:
        result = []
        for start in range(0, len(rewards), size):
            known = [r for r in rewards[start : start + size] if r is not None]
            mean = sum(known) / len(known)
            count = max(len(known) - 1, 1)
            std = (sum((r - mean) ** 2 for r in known) / count) ** 0.5
            result += [
                0.0 if r is None else (r - mean) / (std + 1e-4)
                for r in rewards[start : start + size]
            ]
        return result

    def stage_loss(prompts: list[str], texts: list[str], size: int) -> Tensor:
        advantages = group_advantages(digit_reward(texts), size)
        terms = []
        for prompt, text, advantage in zip(prompts, texts, advantages, strict=True):
            ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            answer = tokenizer(text, add_special_tokens=False)["input_ids"]
            logits = trainer.model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
            picked = logits.log_softmax(-1)[torch.arange(len(answer)), torch.tensor(answer)]
            terms.append(-advantage * (picked - picked.detach()).exp())
        tokens = sum(len(term) for term in terms)
        if loss_type == "grpo":
            return sum((term.mean() for term in terms), torch.tensor(0.0)) / len(terms)
        divisor = tokens if loss_type == "dapo" else len(terms) * 5
        return sum((term.sum() for term in terms), torch.tensor(0.0)) / divisor

    asked, refine = trainer._generate_single_turn.prompts
    by_hand = stage_loss(refine, refined, 4) + coef * stage_loss(asked, drafts, 2)
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = [by_hand.detach(), *torch.autograd.grad(by_hand, parameters)]
    for ours, hand in zip(total, expected, strict=True):
        # One padded batch against twelve forward passes in float32.
        torch.testing.assert_close(ours, hand, rtol=1e-4, atol=2e-6)


def test_drafts_are_not_trained_by_default(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(reward_funcs=digit_reward)
    trainer._generate_single_turn = ScriptedSampler([["0"] * 8, ["1", "2", "3", "4"] * 2])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    assert len(batch["advantages"]) == 8
    assert "is_draft" not in batch


def test_given_values_keep_their_own_denominator(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(surrogate=Clip(0.1, 0.3), aggregate=FixedLength(10, denominator=3))
    assert trainer.surrogate == Clip(0.1, 0.3)
    trainer.model.eval()
    weights = trainer._weights_of(torch.ones(8, 2), 8, torch.tensor(40))
    assert float(weights) == pytest.approx(1 / (10 * 3))


def test_token_mean_counts_one_accumulation_window_trl_5890(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        surrogate=Clip(),
        aggregate=TokenMean(),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        steps_per_generation=8,
    )
    mask, generated = torch.ones(4, 5), torch.tensor(40)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    assert float(trainer._weights_of(mask, 4, generated)) == pytest.approx(8 / (40 * 2))
    trainer.model.eval()
    assert float(trainer._weights_of(mask, 4, generated)) == pytest.approx(1 / 40)


@pytest.mark.parametrize(
    ("loss_type", "by_token"), [("grpo", True), ("grpo", False), ("vespo", True)]
)
def test_weights_of_vllm_samples_are_those_of_trl(
    make_trainer: MakeTrainer, loss_type: str, by_token: bool
) -> None:
    """The correction that TRL computes where vLLM sampled, on a batch made up here."""
    trainer = make_trainer(loss_type=loss_type, max_steps=1)
    ours = trainer._compute_loss

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        trainer.use_vllm = True
        shape = inputs["completion_ids"].shape if by_token else (8, 1)
        inputs["importance_sampling_ratio"] = torch.rand(shape) + 0.5
        inputs["importance_sampling_ratio"][0] = 0.0
        mine = loss_and_gradients(trainer, ours, inputs)
        theirs = loss_and_gradients(
            trainer, lambda *args: GRPOTrainer._compute_loss(trainer, *args), inputs
        )
        trainer.use_vllm = False
        for mine_each, theirs_each in zip(mine, theirs, strict=True):
            torch.testing.assert_close(mine_each, theirs_each, rtol=1e-5, atol=2e-7)
        seen.append(float(max(gradient.abs().max() for gradient in mine[1:])))
        return ours(model, inputs)

    seen: list[float] = []
    trainer._compute_loss = both
    trainer.train()
    assert seen[0] > 1e-3


def test_the_balancing_loss_of_experts_is_added(make_trainer: MakeTrainer) -> None:
    config = Qwen3MoeConfig(
        **make_model().config.to_dict()
        | {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "router_aux_loss_coef": 0.5,
            "output_router_logits": False,
        }
    )
    trainer = make_trainer(model=Qwen3MoeForCausalLM(config), **off_policy(max_steps=1))
    compared = compare_with_trl(trainer)
    assert len(compared) == 2
    assert all(each["aux_loss"] > 0 for each in compared)


def rows_run(trainer: Any) -> list[int]:
    """Count the rows that each forward of the loss runs."""
    counts, forward = [], trainer.model.forward

    def counted(*args: Any, **options: Any) -> Any:
        if "head" in options and torch.is_grad_enabled():
            counts.append(len(options["input_ids"]))
        return forward(*args, **options)

    trainer.model.forward = counted
    return counts


# Rewards of two groups: the first of equal ones, whose advantages are zero.
EQUAL_AND_UNEQUAL = ["1", "1", "1", "1", "0", "2", "3", "4"]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo"])
def test_completions_of_zero_advantage_are_not_computed(
    make_trainer: MakeTrainer, loss_type: str
) -> None:
    found = {}
    for skip in (False, True):
        trainer = make_trainer(
            reward_funcs=digit_reward, loss_type=loss_type, skip_zero_advantages=skip
        )
        trainer._generate_single_turn = ScriptedSampler([["0"] * 8, EQUAL_AND_UNEQUAL])
        trainer.model.train()
        rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
        trainer.current_gradient_accumulation_steps = 1
        counts = rows_run(trainer)
        found[skip] = loss_and_gradients(trainer, trainer._compute_loss, batch)
        assert counts == [4 if skip else 8]
        logged = trainer._metrics["train"]
        assert logged["clip_ratio/low_mean"] == [0.0]
        assert ("entropy" in logged, "entropy/nonzero_advantage" in logged) == (not skip, skip)
    assert max(float(gradient.abs().max()) for gradient in found[False][1:]) > 1e-3
    for mine, other in zip(found[True], found[False], strict=True):
        # Other batch sizes: float32 rounding of gradients of order 0.1.
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=2e-7)


def test_where_nothing_teaches_one_row_is_run_for_a_gradient_of_zero(
    make_trainer: MakeTrainer,
) -> None:
    trainer = make_trainer(reward_funcs=digit_reward)
    trainer._generate_single_turn = ScriptedSampler([["0"] * 8, ["1"] * 8])
    trainer.model.train()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[0]] * 8)
    trainer.current_gradient_accumulation_steps = 1
    counts = rows_run(trainer)
    loss, *gradients = loss_and_gradients(trainer, trainer._compute_loss, batch)
    assert counts == [1]
    assert math.isnan(trainer._metrics["train"]["entropy/nonzero_advantage"][0])  # not logged
    assert float(loss) == 0.0
    assert not any(gradient.any() for gradient in gradients)


def test_entropy_is_that_of_all_completions_or_says_of_which(make_trainer: MakeTrainer) -> None:
    """By hand, over the logits: of all 8 completions, and of the 4 whose advantages teach."""
    found = {}
    for skip in (False, True):
        trainer = make_trainer(reward_funcs=digit_reward, skip_zero_advantages=skip)
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(30)  # far enough from uniform
        trainer._generate_single_turn = ScriptedSampler([["0"] * 8, EQUAL_AND_UNEQUAL])
        trainer.model.train()
        rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
        trainer.current_gradient_accumulation_steps = 1
        trainer._compute_loss(trainer.model, batch)
        name = "entropy/nonzero_advantage" if skip else "entropy"
        (found[skip],) = trainer._metrics["train"][name]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = trainer.model(ids, attention_mask=mask).logits[:, -2]
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    assert found[False] == pytest.approx(float(entropy.mean()), rel=1e-5)
    assert found[True] == pytest.approx(float(entropy[4:].mean()), rel=1e-5)
    assert abs(found[True] / found[False] - 1) > 1e-4


@pytest.mark.parametrize("beyond", [{"beta": 0.1}, {"entropy_coef": 0.1}])
def test_what_needs_all_completions_gets_them(
    make_trainer: MakeTrainer, saved_model: str, beyond: dict[str, float]
) -> None:
    trainer = make_trainer(
        model=saved_model, reward_funcs=lambda completions, **_: [1.0] * len(completions), **beyond
    )
    counts = rows_run(trainer)
    trainer.train()
    assert counts == [8, 8]
