"""Held-out accuracy of the demo's model: single-shot, and draft-then-refine."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from ...drafts.text import splice_prompt
from ...engines.transformers import TransformersSampler
from ...rollouts.completions import Completion
from ...rollouts.sampling import sample_group
from . import chain

MAX_ANSWER_TOKENS = chain.NUM_OPERATIONS + 1
BATCH_SIZE = 1024


@dataclass(frozen=True)
class Evaluation:
    """What sampled answers to held-out problems say about a model.

    Attributes:
        correct: Whether each problem's answer was right.
        refined: Whether its refinement was.
        entropy: Mean over all sampled tokens of -log p, an unbiased estimate of the model's entropy
            in nats per token.
        length: Mean length of an answer in tokens, its end included.
    """

    correct: list[bool]
    refined: list[bool]
    entropy: float
    length: float

    @property
    def accuracy(self) -> float:
        """Rate of right answers, single-shot."""
        return fmean(self.correct)

    @property
    def refined_accuracy(self) -> float:
        """Rate of right refinements."""
        return fmean(self.refined)


def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[chain.Problem],
    *,
    seed: int,
) -> Evaluation:
    """Sample an answer to each problem at temperature 1, and then a refinement of that answer.

    The refinement is draft-then-refine as at test time: there is no reward, so no draft is chosen.
    """
    sampler = TransformersSampler(
        model, tokenizer, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=BATCH_SIZE
    )
    prompts = [chain.ask(problem) for problem in problems]
    answers = sample_group(prompts, sampler, 1, seed=seed).flat
    spliced = [
        splice_prompt(prompt, draft.text, template=chain.TEMPLATE)
        for prompt, draft in zip(prompts, answers, strict=True)
    ]
    refinements = sample_group(spliced, sampler, 1, seed=seed + 1).flat
    return summarize(answers, refinements, problems)


def summarize(
    answers: Sequence[Completion],
    refinements: Sequence[Completion],
    problems: Sequence[chain.Problem],
) -> Evaluation:
    """Judge one answer per problem, and its refinement."""
    logprobs = torch.tensor([value for answer in answers for value in answer.logprobs or ()])
    return Evaluation(
        correct=_are_correct(answers, problems),
        refined=_are_correct(refinements, problems),
        entropy=-logprobs.mean().item(),
        length=fmean(len(answer.token_ids) for answer in answers),
    )


def _are_correct(answers: Sequence[Completion], problems: Sequence[chain.Problem]) -> list[bool]:
    return [
        chain.is_correct(answer.text, problem.answer)
        for answer, problem in zip(answers, problems, strict=True)
    ]
