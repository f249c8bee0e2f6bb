"""Several rounds of refinement: what each is drawn from, and the one loss over all of them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scripted import DRAFTS, REFINED, ScriptedSampler, chat, run_stages
from tiny_qwen import SHORT_TEMPLATE, digit_reward, make_tokenizer, third_party
from torch import Tensor

from igrpo_algo.prompts import encode_prompt
from igrpo_algo.rollouts.completions import Completion

pytestmark = third_party
MakeTrainer = Callable[..., Any]
TOKENIZER = make_tokenizer()

# The best so far: b3 and then s4 of the first question; e0 and then w2 of the second.
AGAIN = ["a0", "b1", "c0", "d0", "e1", "f5", "g", "h0"]
PROMPTS = [
    [chat("0+0?")] * 4 + [chat("1+1?")] * 4,
    [chat("0+0?[b3]")] * 4 + [chat("1+1?[e0]")] * 4,
    [chat("0+0?[s4]")] * 4 + [chat("1+1?[w2]")] * 4,
]


class Written:
    """Draws what is written for a prompt."""

    async def sample_one(self, prompt: Any, n: int, *, seed: int | None = None) -> list[Completion]:
        shown = TOKENIZER.decode(self.encode(prompt))
        for prompts, texts in zip(PROMPTS, (DRAFTS, REFINED, AGAIN), strict=True):
            if shown in prompts:
                found = texts[prompts.index(shown) :][:n]
                ids = [TOKENIZER.convert_tokens_to_ids([*text]) for text in found]
                return [
                    Completion(i, text, [-4.0] * len(i)) for i, text in zip(ids, found, strict=True)
                ]
        raise AssertionError(f"nothing is written for {shown}")

    def encode(self, prompt: Any) -> list[int]:
        return encode_prompt(prompt, TOKENIZER)


def decoded(ids: Tensor, mask: Tensor) -> list[str]:
    return [TOKENIZER.decode(row[kept.bool()]) for row, kept in zip(ids, mask, strict=True)]


def two_rounds(make_trainer: MakeTrainer, **options: Any) -> Any:
    known = {"reward_funcs": digit_reward, "draft_template": SHORT_TEMPLATE, "refinement_rounds": 2}
    return make_trainer(**known | options)


@pytest.mark.parametrize("route", ["TRL draws", "a sampler draws"])
def test_each_round_refines_the_best_so_far_and_is_trained(
    make_trainer: MakeTrainer, route: str
) -> None:
    options = {} if route == "TRL draws" else {"sampler": Written()}
    trainer = two_rounds(make_trainer, draft_loss_coef=1.0, **options)
    if options:
        trainer.model.train()
        rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
        batch = trainer._generate_and_score_completions(rows)
    else:
        batch, sampler = run_stages(trainer, DRAFTS, REFINED, AGAIN)
        assert sampler.prompts == PROMPTS
    prompts = decoded(batch["prompt_ids"], batch["prompt_mask"])
    assert prompts == PROMPTS[1] + PROMPTS[2] + PROMPTS[0]
    texts = REFINED + AGAIN + DRAFTS
    assert decoded(batch["completion_ids"], batch["completion_mask"]) == texts
    assert batch["is_draft"].tolist() == [False] * 16 + [True] * 8
    assert int(batch["num_items_in_batch"]) == sum(map(len, REFINED + AGAIN))
    rewards = torch.tensor([torch.nan if r is None else r for r in digit_reward(texts)]).view(6, 4)
    centered = rewards - rewards.nanmean(1, keepdim=True)
    assert torch.equal(batch["advantages"].sign(), centered.nan_to_num().sign().flatten())
    metrics = trainer._metrics["train"]
    uplift = [(10 / 4 - 7 / 4 + 0.5) / 2, (1 / 4 - 7 / 4 + 2.0) / 2]
    assert metrics["igrpo/uplift"] == pytest.approx(uplift)
    assert metrics["reward"] == pytest.approx([12 / 8, (1 + 6) / 7])


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
@pytest.mark.parametrize("coef", [0.0, 0.5])
def test_the_loss_is_one_mean_over_the_refinements_of_all_rounds(
    make_trainer: MakeTrainer, loss_type: str, coef: float
) -> None:
    """Two micro-batches against the rows one by one; the drafts have a mean of their own."""
    trainer = two_rounds(
        make_trainer,
        draft_loss_coef=coef,
        loss_type=loss_type,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    trainer._generate_single_turn = ScriptedSampler([DRAFTS, REFINED, AGAIN])
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 2
    rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
    micro_batches = [trainer._prepare_inputs(rows)]
    trainer._step = 1
    micro_batches.append(trainer._prepare_inputs(rows))
    size = 12 if coef else 8
    assert [len(batch["advantages"]) for batch in micro_batches] == [size, size]
    sum(trainer._compute_loss(trainer.model, batch) for batch in micro_batches).backward()
    found = trainer.model.lm_head.weight.grad.clone()
    trainer.model.zero_grad()

    terms: dict[bool, list[Tensor]] = {False: [], True: []}
    for batch in micro_batches:
        for row, advantage in enumerate(batch["advantages"]):
            asked = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
            answer = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
            logits = trainer.model(torch.cat([asked, answer])[None]).logits[0, len(asked) - 1 : -1]
            picked = logits.log_softmax(-1)[torch.arange(len(answer)), answer]
            is_draft = bool(batch["is_draft"][row]) if coef else False
            terms[is_draft].append(-advantage * picked)

    def mean(stage: list[Tensor]) -> Tensor:
        if loss_type == "dapo":
            return torch.cat(stage).mean()
        return torch.stack([term.mean() for term in stage]).mean()

    assert len(terms[False]) == 16
    (mean(terms[False]) + (coef * mean(terms[True]) if coef else 0.0)).backward()
    assert float(found.abs().max()) > 1e-3
    # Padded batches against single rows, in float32.
    torch.testing.assert_close(found, trainer.model.lm_head.weight.grad, rtol=1e-4, atol=2e-6)


def test_what_was_skipped_stays_out_of_the_pool(make_trainer: MakeTrainer) -> None:
    """w2 is right, and was drawn for a question that was to be skipped."""
    trainer = two_rounds(make_trainer, all_drafts_failed="skip")
    batch, sampler = run_stages(trainer, DRAFTS, REFINED, AGAIN)
    assert sampler.prompts[2] == [chat("0+0?[s4]")] * 4 + [chat("1+1?")] * 4
    assert not batch["advantages"].view(4, 4)[[1, 3]].any()


def test_evaluation_refines_once(make_trainer: MakeTrainer) -> None:
    trainer = two_rounds(make_trainer, eval_with_draft=True)
    batch, sampler = run_stages(trainer, DRAFTS, REFINED, mode="eval")
    assert sampler.prompts == PROMPTS[:2]
    assert len(batch["advantages"]) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refinement_rounds": 0}, "refinement_rounds must be >= 1, got 0"),
        ({"num_drafts": 0}, "refinement_rounds would have no effect with num_drafts=0"),
    ],
)
def test_rounds_that_cannot_be_are_refused(
    make_trainer: MakeTrainer, options: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(**{"refinement_rounds": 2} | options)
