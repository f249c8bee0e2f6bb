"""The forms of a step over prompts with completions: shared, padded and packed."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.cases import DTYPES
from benchmarks.models import random_qwen3
from igrpo_algo.shared_prompt.packing import SharedPromptRow, pack_shared_prompt
from igrpo_algo.trainers.transformers import enable_shared_prompt, shared_prompt_hidden
from igrpo_kernels import Clip, SequenceMean, linear_policy_loss

QUESTION = 0.25  # of a completion


@dataclass(frozen=True)
class Case:
    """One model and its batch; `draft` and `spread` are in lengths of a completion."""

    prompts: int = 1
    refinements: int = 8
    draft: float = 1.0
    tokens: int = 256
    spread: float = 0.0
    width: int = 512
    layers: int = 4
    vocabulary: int = 4096
    dtype: str = "fp32"
    device: str = "cpu"
    threads: int = 1


@dataclass(frozen=True)
class Problem:
    model: PreTrainedModel
    prompts: list[list[int]]
    completions: list[list[list[int]]]
    advantages: Tensor


def make_problem(case: Case) -> Problem:
    model = random_qwen3(
        width=case.width,
        layers=case.layers,
        vocabulary=case.vocabulary,
        positions=16 * case.tokens,
        device=case.device,
        dtype=DTYPES[case.dtype],
    )
    enable_shared_prompt(model)  # which is transformers' "sdpa" for the other forms
    shares = torch.linspace(1 - case.spread, 1 + case.spread, case.refinements)

    def ids(count: float) -> list[int]:
        return torch.randint(1, case.vocabulary, (round(count),)).tolist()

    groups = range(case.prompts)
    prompts = [ids((QUESTION + case.draft) * case.tokens) for _ in groups]
    completions = [[ids(share * case.tokens) for share in shares.tolist()] for _ in groups]
    advantages = torch.where(torch.arange(case.refinements) % 2 == 0, 1.0, -1.0)
    return Problem(model, prompts, completions, advantages.repeat(case.prompts).to(case.device))


def loss_of(problem: Problem, inputs: dict[str, Tensor]) -> Tensor:
    return linear_policy_loss(
        **inputs,
        weight=problem.model.lm_head.weight,
        advantages=problem.advantages,
        surrogate=Clip(),
        aggregate=SequenceMean(),
    ).loss


def shared(problem: Problem) -> Tensor:
    (row,) = pack_shared_prompt(problem.prompts, problem.completions)
    row = row.to(problem.model.device)
    return loss_of(problem, row.loss_inputs(shared_prompt_hidden(problem.model, row)))


def sequences(problem: Problem) -> Iterator[tuple[list[int], list[int]]]:
    """Each completion with its prompt."""
    for prompt, tails in zip(problem.prompts, problem.completions, strict=True):
        yield from ((prompt, tail) for tail in tails)


def packed(problem: Problem) -> Tensor:
    """Sequences in one row, as prompts without completions where attention is concerned."""
    pairs = list(sequences(problem))
    (row,) = pack_shared_prompt([prompt for prompt, _ in pairs], [[tail] for _, tail in pairs])
    alone = tuple((sum(group),) for group in row.lengths)
    apart: SharedPromptRow = replace(row, lengths=alone).to(problem.model.device)
    return loss_of(problem, apart.loss_inputs(shared_prompt_hidden(problem.model, apart)))


def padded(problem: Problem) -> Tensor:
    device, first = problem.model.device, len(problem.prompts[0])
    prompts, tails = zip(*sequences(problem), strict=True)
    targets = torch.nn.utils.rnn.pad_sequence([torch.tensor(tail) for tail in tails], True)
    lengths = torch.tensor([len(tail) for tail in tails])
    mask = torch.arange(targets.shape[1]) < lengths[:, None]
    ids = torch.cat([torch.tensor(prompts), targets], 1).to(device)
    hidden = problem.model.get_decoder()(ids, use_cache=False).last_hidden_state
    rows = {"hidden": hidden[:, first - 1 : -1], "targets": targets.to(device)}
    return loss_of(problem, {**rows, "mask": mask.to(device)})


FORMS: dict[str, Callable[[Problem], Tensor]] = {
    "shared": shared,
    "padded": padded,
    "packed": packed,
}
