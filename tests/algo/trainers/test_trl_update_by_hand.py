"""Whole training runs with a KL to a reference, against the method written down once more.

Nothing of the library is in `by_hand` but the text of the splice: one forward pass per sequence,
the formulas of the paper, plain SGD.
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from tiny_qwen import SHORT_TEMPLATE, early_letters, make_model, make_tokenizer, third_party
from torch import Tensor, nn

from igrpo_algo.prompts import encode_prompt
from igrpo_algo.rollouts.completions import Completion

pytestmark = third_party
TOKENIZER = make_tokenizer()
END, LONGEST, TEMPERATURE, BETA, RATE = TOKENIZER.eos_token_id, 6, 0.7, 0.5, 0.1
# What takes part in an update: how often a batch is used, which loss, what is masked, how much of
# the drafts' loss; `adapter` has its reference in the model without it.
RUNS: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "use_trl_loss": True, "mask_truncated_completions": True},
    {"loss_type": "dapo", "draft_loss_coef": 0.5},
    {"loss_type": "dapo", "mask_truncated_completions": True},
    {"loss_type": "dapo", "mask_truncated_completions": True, "use_trl_loss": True},
    {"loss_type": "dr_grpo", "mask_truncated_completions": True, "use_trl_loss": True},
    {"loss_type": "dr_grpo", "draft_loss_coef": 2.0, "mask_truncated_completions": True},
    {"loss_type": "grpo", "draft_loss_coef": 1.0, "adapter": True},
    {"loss_type": "dapo", "use_trl_loss": True, "adapter": True},
]


def draw(prompt: str, place: int) -> list[int]:
    """Draw what a checksum says: 1 to 6 letters, and an end if they leave room for it."""
    number = zlib.crc32(f"{prompt} {place}".encode())
    letters = [chr(65 + number // 7**k % 26) for k in range(1 + number % LONGEST)]
    return TOKENIZER.convert_tokens_to_ids([*letters, "</s>"][:LONGEST])


class Drawn:
    """Draws by the checksum, and keeps the plain prompts in their order."""

    def __init__(self) -> None:
        self.questions: list[str] = []

    def encode(self, prompt: Any) -> list[int]:
        return encode_prompt(prompt, TOKENIZER)

    def sync_weights(self, weights: dict[str, Tensor]) -> None:
        pass

    async def sample_one(self, prompt: Any, n: int, *, seed: int | None = None) -> list[Completion]:
        text = TOKENIZER.decode(self.encode(prompt))
        if "[" not in text:
            self.questions.append(text)
        rows = [draw(text, place) for place in range(n)]
        return [Completion(ids, TOKENIZER.decode(ids, True)) for ids in rows]


class Row(NamedTuple):
    prompt: list[int]
    answer: list[int]
    advantage: float
    old: Tensor
    reference: Tensor


def logprobs(model: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
    logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    chosen = (logits / TEMPERATURE).log_softmax(-1)
    return chosen[torch.arange(len(answer)), torch.tensor(answer)]


def rewards(answers: list[list[int]]) -> list[float]:
    return early_letters([TOKENIZER.decode(answer, skip_special_tokens=True) for answer in answers])


def rows_of(question: str, model: nn.Module, reference: Callable[..., Tensor]) -> list[Row]:
    """Draw a group of four, and write down all that the policy of this moment says of it."""
    answers = [draw(question, place) for place in range(4)]
    scores = torch.tensor(rewards(answers))
    advantages = (scores - scores.mean()) / (scores.std() + 1e-4)
    prompt = TOKENIZER(question, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        return [
            Row(prompt, a, float(each), logprobs(model, prompt, a), reference(model, prompt, a))
            for a, each in zip(answers, advantages, strict=True)
        ]


def stage_loss(model: nn.Module, rows: list[Row], options: dict[str, Any], beta: float) -> Tensor:
    means, sums, tokens = [], [], 0
    for row in rows:
        logps = logprobs(model, row.prompt, row.answer)
        ratio = (logps - row.old).exp()
        gain = torch.minimum(ratio * row.advantage, ratio.clamp(0.8, 1.2) * row.advantage)
        apart = row.reference - logps
        loss = -gain + beta * (apart.exp() - apart - 1)
        cut = options.get("mask_truncated_completions", False) and row.answer[-1] != END
        means.append(loss.mean() * (not cut))
        sums.append(loss.sum() * (not cut))
        tokens += len(row.answer) * (not cut)
    if options["loss_type"] == "grpo":
        return torch.stack(means).mean()
    return torch.stack(sums).sum() / (
        tokens if options["loss_type"] == "dapo" else LONGEST * len(rows)
    )


def by_hand(
    model: nn.Module,
    reference: Callable[..., Tensor],
    questions: list[str],
    options: dict[str, Any],
    beta: float,
) -> list[Tensor]:
    """Two updates on each two questions; what is trained at the end."""
    trained = [p for p in model.parameters() if p.requires_grad]
    coef = options.get("draft_loss_coef", 0.0)
    for start in range(0, len(questions), 2):
        drafts, refined = [], []
        for question in questions[start : start + 2]:
            first = rows_of(question, model, reference)
            scores = rewards([row.answer for row in first])
            best = first[scores.index(max(scores))].answer
            drafts += first
            draft = TOKENIZER.decode(best, skip_special_tokens=True)
            spliced = question.replace("?", f"?[{draft}]")
            refined += rows_of(spliced, model, reference)
        for _ in range(2):
            loss = stage_loss(model, refined, options, beta)
            if coef:
                loss = loss + coef * stage_loss(model, drafts, options, beta)
            gradients = torch.autograd.grad(loss, trained)
            with torch.no_grad():
                for weight, gradient in zip(trained, gradients, strict=True):
                    weight -= RATE * gradient
    return [weight.detach().clone() for weight in trained]


def move_away(model: nn.Module, scale: float) -> None:
    """Take what is trained off its start, which is the reference: a KL of zero has no gradient."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += scale * torch.randn_like(weight)


@pytest.mark.parametrize("options", RUNS, ids=lambda each: "-".join(map(str, each)))
def test_updates_with_a_kl_are_those_by_hand(
    make_trainer: Callable[..., Any], saved_model: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    adapter = options.pop("adapter", False)
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    sampler = Drawn()
    trainer = make_trainer(
        model=saved_model,
        beta=BETA,
        sampler=sampler,
        temperature=TEMPERATURE,
        draft_template=SHORT_TEMPLATE,
        num_iterations=2,
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=LONGEST,
        optim="sgd",
        learning_rate=RATE,
        max_grad_norm=0.0,
        vllm_importance_sampling_correction=False,
        **({"peft_config": lora} if adapter else {}),
        **options,
    )
    move_away(trainer.model, 0.3 if adapter else 0.1)
    start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    ours = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    assert len(sampler.questions) == 4

    base = make_model(seed=1).eval()

    def reference(_: nn.Module, prompt: list[int], answer: list[int]) -> Tensor:
        return logprobs(base, prompt, answer)

    def again(beta: float) -> list[Tensor]:
        trainer.model.load_state_dict(start)
        return by_hand(trainer.model.eval(), reference, sampler.questions, options, beta)

    with_kl, without = again(BETA), again(0.0)
    apart = max(float((a - b).abs().max()) for a, b in zip(with_kl, without, strict=True))
    assert apart > 1e-4
    # Four updates in float32, of padded batches here and of single rows there.
    for mine, hand in zip(ours, with_kl, strict=True):
        torch.testing.assert_close(mine, hand, rtol=1e-5, atol=1e-6)
