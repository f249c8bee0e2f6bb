"""What is trained of the two stages, and under which prompt: against two losses by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_trl import loss_and_gradients
from scripted import ScriptedSampler
from tiny_qwen import digit_reward, make_model, make_tokenizer, third_party
from torch import Tensor

pytestmark = third_party
MakeTrainer = Callable[..., Any]


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
