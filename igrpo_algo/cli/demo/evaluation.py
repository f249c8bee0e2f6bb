"""Held-out accuracy of the demo's model: single-shot, and draft-then-refine."""

from collections.abc import Sequence
from dataclasses import dataclass

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
    """What one sampled answer to each held-out problem says about a model.

    Attributes:
        correct: Whether the answer to each problem was right.
        entropy: Mean over all sampled tokens of -log p, an unbiased estimate of the model's entropy
            in nats per token.
        length: Mean length of an answer in tokens, its end included.
    """

    correct: list[bool]
    entropy: float
    length: float

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return sum(self.correct) / len(self.correct)


def evaluate(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[chain.Problem],
    *,
    seed: int,
    refine: bool = False,
) -> Evaluation:
    """Sample one answer to each problem at temperature 1.

    With `refine`, a first answer is sampled, spliced into the question as a draft (nothing selects
    it: at test time there is no reward), and the second answer counts.
    """
    sampler = TransformersSampler(
        model, tokenizer, max_new_tokens=MAX_ANSWER_TOKENS, batch_size=BATCH_SIZE
    )
    prompts = [chain.ask(problem) for problem in problems]
    answers = sample_group(prompts, sampler, 1, seed=seed).flat
    if refine:
        prompts = [
            splice_prompt(prompt, draft.text, template=chain.TEMPLATE)
            for prompt, draft in zip(prompts, answers, strict=True)
        ]
        answers = sample_group(prompts, sampler, 1, seed=seed + 1).flat
    return summarize(answers, problems)


def summarize(answers: Sequence[Completion], problems: Sequence[chain.Problem]) -> Evaluation:
    """Judge one answer per problem."""
    logprobs = torch.tensor([value for answer in answers for value in answer.logprobs or ()])
    lengths = [len(answer.token_ids) for answer in answers]
    return Evaluation(
        correct=[
            chain.is_correct(answer.text, problem.answer)
            for answer, problem in zip(answers, problems, strict=True)
        ],
        entropy=-logprobs.mean().item(),
        length=sum(lengths) / len(lengths),
    )
