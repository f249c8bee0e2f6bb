"""iGRPO in a training loop of your own: draft, choose, refine, learn.

    python examples/own_loop.py Qwen/Qwen3-0.6B

`two_stage_rollout` samples both stages and `training_batch` makes the step's batch of them. The
loss takes hidden states, so the logits never exist as a whole; micro-batches add up to the step.
"""

import sys
from collections.abc import Iterable, Iterator

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from igrpo_algo import DraftRules, Rollouts, training_batch, two_stage_rollout
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_kernels import Clip, SequenceMean, linear_policy_loss

Messages = list[dict[str, str]]


def train(
    model: PreTrainedModel,
    sampler: TransformersSampler,
    batches: Iterable[tuple[list[Messages], list[str]]],
    rules: DraftRules = DraftRules(),
    *,
    learning_rate: float = 1e-6,
    max_tokens: int = 16384,
) -> Iterator[Rollouts]:
    """Take one step on each batch of prompts and answers, and yield its rollouts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate)
    for step, (prompts, answers) in enumerate(batches):
        rollouts = two_stage_rollout(
            prompts, sampler, ends_with_answer, columns={"answer": answers}, rules=rules, seed=step
        )
        batch = training_batch(rollouts)
        batch = batch.keep(batch.advantages != 0)  # the others have no gradient
        for micro in batch.padded(pad_token_id=0, max_tokens=max_tokens):
            micro = micro.to(model.device)
            hidden = model.get_decoder()(**micro.model_inputs()).last_hidden_state
            linear_policy_loss(
                **micro.loss_inputs(hidden),
                weight=model.get_output_embeddings().weight,
                surrogate=Clip(0.2, 0.2),
                aggregate=SequenceMean(micro.step_sequences),
            ).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield rollouts


def ends_with_answer(
    prompts: list[Messages], completions: list[Messages], answer: list[str]
) -> list[float]:
    """Give 1 for a completion that ends with the answer, and 0 for any other."""
    texts = [completion[0]["content"].rstrip(". ") for completion in completions]
    return [float(text.endswith(right)) for text, right in zip(texts, answer, strict=True)]


def main(name: str) -> None:
    """Train a model of the hub on products, eight at a time."""
    model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map="auto")
    sampler = TransformersSampler(
        model, AutoTokenizer.from_pretrained(name), max_new_tokens=512, batch_size=32
    )
    factors = [(17 * n + 3, 29 * n + 7) for n in range(64)]
    questions = [[{"role": "user", "content": f"What is {a} * {b}?"}] for a, b in factors]
    answers = [str(a * b) for a, b in factors]
    batches = [(questions[n : n + 8], answers[n : n + 8]) for n in range(0, 64, 8)]
    for step, rollouts in enumerate(train(model, sampler, batches)):
        drafts, refinements = rollouts.draft_rewards.mean(), rollouts.refinement_rewards.mean()
        print(f"step {step}: drafts {drafts:.2f}, refinements {refinements:.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
