"""One run: an arm's steps, through the library's own values."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_constant_schedule_with_warmup

from benchmarks.replication.arms import Arm
from benchmarks.replication.tasks import Task
from igrpo_algo import DraftRules, Rollouts, TextSplice, training_batch, two_stage_rollout
from igrpo_algo.batch import DRAFTS
from igrpo_algo.engines.static import StaticSampler
from igrpo_algo.seeds import derive_seed
from igrpo_algo.trainers.trl.config import IGRPOConfig
from igrpo_algo.trainers.trl.draft_options import rules_of
from igrpo_algo.trainers.trl.loss_options import aggregate_of, surrogate_of, with_denominator
from igrpo_kernels import linear_policy_loss
from igrpo_kernels.surrogates import Cispo

SAMPLER = StaticSampler
WARMUP_STEPS = 5
BATCH_SIZE = 1024
MICRO_TOKENS = 16_384  # of a forward pass, padding included


@dataclass(frozen=True)
class Settings:
    """What all arms of a sweep share.

    Attributes:
        steps: Batches; each is sampled from the model as it stands.
        prompts: Different problems of a batch.
        learning_rate: Of AdamW; constant after five steps.
        evaluations: On held-out problems during training, besides the one before it and the last.
        held_out: Problems that nothing trains on.
        samples: Answers to each of them at the end.
        rounds: Of draft-then-refine at the end.
        warm_up_steps: Of the supervised warm-up.
    """

    steps: int = 80
    prompts: int = 16
    learning_rate: float = 3e-4
    evaluations: int = 4
    held_out: int = 500
    samples: int = 4
    rounds: int = 4
    warm_up_steps: int = 600

    @property
    def evaluation_steps(self) -> list[int]:
        """Steps after which the held-out problems are answered, the last step left out."""
        every = self.steps / (self.evaluations + 1)
        return sorted({round(every * i) for i in range(1, self.evaluations + 1)} - {0, self.steps})


@dataclass(frozen=True)
class Step:
    """What a step sampled, and how many tokens it trained on."""

    rollouts: Rollouts
    trained_tokens: int


def configure(arm: Arm, settings: Settings, task: Task) -> IGRPOConfig:
    """Give an arm's configuration: without `question_coef`, what `IGRPOTrainer` would train."""
    shows_drafts = arm.num_drafts and arm.options.get("draft_choice") != "none"
    splice: dict[str, Any] = {"draft_template": task.template} if shows_drafts else {}
    return IGRPOConfig(
        "runs/replication",
        per_device_train_batch_size=settings.prompts * arm.num_refinements,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=WARMUP_STEPS,
        max_completion_length=task.answer_tokens,
        beta=0.0,
        bf16=False,
        report_to="none",
        **splice,
        **arm.options,
    )


def splice_of(arm: Arm, settings: Settings, task: Task, tokenizer: Any) -> TextSplice:
    """Give how an arm is shown drafts when it is measured: as in training, but real ones."""
    kept = {name: arm.options[name] for name in ("strip_draft_thinking",) if name in arm.options}
    splice = rules_of(configure(Arm("", kept), settings, task), tokenizer).splice
    assert isinstance(splice, TextSplice)
    return splice


def build_sampler(
    model: Any, tokenizer: Any, task: Task, *, temperature: float = 1.0
) -> StaticSampler:
    """Build what draws all completions of a run."""
    return SAMPLER(
        model,
        tokenizer,
        max_new_tokens=task.answer_tokens,
        temperature=temperature,
        batch_size=BATCH_SIZE,
    )


def train(
    model: Any, sampler: StaticSampler, task: Task, arm: Arm,
    settings: Settings, seed: int, held_out: frozenset[Any],
) -> Iterator[Step]:  # fmt: skip
    """Train a model in place; yield what each step sampled."""
    args = configure(arm, settings, task)
    rules = rules_of(args, sampler.tokenizer) if args.num_drafts else DraftRules()
    problems = task.draw_many(settings.steps * settings.prompts, seed + 1, held_out)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)
    schedule = get_constant_schedule_with_warmup(optimizer, WARMUP_STEPS)
    for step in range(settings.steps):
        batch = problems[step * settings.prompts : (step + 1) * settings.prompts]
        rollouts = two_stage_rollout(
            [task.ask(problem) for problem in batch],
            sampler,
            task.reward,
            num_drafts=args.num_drafts,
            num_refinements=args.num_refinements,
            rounds=args.refinement_rounds,
            columns={"problem": batch},
            rules=rules,
            seed=derive_seed(seed, step),
        )
        tokens, pad = 0, sampler.tokenizer.pad_token_id
        for _ in range(args.num_iterations):
            tokens += accumulate_gradients(
                model, rollouts, args, pad=pad, question_coef=arm.question_coef
            )
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        schedule.step()
        yield Step(rollouts, tokens)


def accumulate_gradients(
    model: Any, rollouts: Rollouts, args: IGRPOConfig, *, pad: int, question_coef: float = 0.0
) -> int:
    """Add the gradient of refinements + draft_loss_coef * drafts + question_coef * all under q.

    Under the question a token of a refinement weighs as much as its probability there over that
    under the spliced prompt, where it was drawn, and no more than 1.

    Returns:
        The tokens that the gradient came from.
    """
    rounds = tuple(range(1, 1 + args.refinement_rounds))
    tokens = 0
    for weight, surrogate, stages, under_question in (
        (1.0, surrogate_of(args), rounds, False),
        (args.draft_loss_coef, surrogate_of(args), (DRAFTS,), False),
        (question_coef, Cispo(1.0), (DRAFTS, *rounds), True),
    ):
        if not weight:
            continue
        batch = training_batch(rollouts, stages=stages, under_question=under_question)
        batch = batch.keep(batch.advantages != 0)
        tokens += sum(len(completion.token_ids) for completion in batch.completions)
        for micro in batch.padded(pad, max_tokens=MICRO_TOKENS):
            micro = micro.to(model.device)
            hidden = model.get_decoder()(**micro.model_inputs()).last_hidden_state
            loss = linear_policy_loss(
                **micro.loss_inputs(hidden),
                weight=model.get_output_embeddings().weight,
                surrogate=surrogate,
                aggregate=with_denominator(
                    aggregate_of(args),
                    sequences=micro.step_sequences,
                    tokens=torch.tensor(float(micro.step_tokens)),
                ),
                temperature=args.temperature,
            ).loss
            if not loss.isfinite():
                raise DivergenceError("the loss is not finite")
            (weight * loss).backward()
    return tokens


class DivergenceError(ArithmeticError):
    """A run whose numbers left the finite ones."""
