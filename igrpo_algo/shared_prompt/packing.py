"""A prompt and the completions drawn from it, laid out so that the prompt is computed once.

Stage 2 trains G refinements under one q' = question + draft. As G sequences, q' goes through the
model G times; here it is in the row once, and all refinements continue it.
`igrpo_algo.trainers.transformers` runs such rows.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_count,
    check_integral,
    check_list,
    check_rank,
    describe,
)

from ..layouts import PackedRow, Tails, fill, lay_in_row
from ..rollouts.completions import Completion


@dataclass(frozen=True, eq=False)
class SharedPromptRow(PackedRow):
    """One row of S tokens: each prompt once, followed by its completions.

    A completion's first token is predicted from the last position of the prompt, which all of its
    completions share: its hidden state stands before each of them in `loss_inputs`, and gets the
    sum of their gradients.

    Attributes:
        input_ids: Tokens of the row. Shape [1, S], int64.
        position_ids: Their positions; each completion continues at its prompt's length.
            Shape [1, S], int64.
        index: Which completion each sequence is, counted through all prompts in the order given.
            Shape [B], int64.
        cu_seqlens: Offsets of the completions among the L tokens. Shape [B + 1], int32.
        targets: The L completion tokens. Shape [L], int64.
        predictors: The position in the row that predicts each target. Shape [L], int64.
        lengths: For each prompt, its tokens and then those of each of its completions.

    Examples:
        >>> (row,) = pack_shared_prompt([[5, 6]], [[[7, 8], [9]]])
        >>> row.input_ids, row.position_ids
        (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 3, 2]]))
        >>> row.targets, row.predictors
        (tensor([7, 8, 9]), tensor([1, 2, 1]))
    """

    lengths: tuple[tuple[int, ...], ...]

    def model_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments of a model on which `enable_shared_prompt` was called.

        The attention mask is empty and has four axes, so transformers passes it on as it is: no
        [S, S] mask is made, and attention that does not take `shared_prompt` fails on it.
        """
        mask = torch.empty(1, 1, 0, 0, device=self.input_ids.device)
        return super().model_inputs() | {"attention_mask": mask, "shared_prompt": self}


def pack_shared_prompt(
    prompt_ids: Sequence[Sequence[int] | Tensor],
    completions: Sequence[Sequence[Completion | Sequence[int] | Tensor]],
    *,
    max_tokens: int | None = None,
) -> list[SharedPromptRow]:
    """Lay each prompt once and its completions after it, in rows of at most `max_tokens`.

    Rows are filled in the order given. A prompt whose completions do not fit into a row of their
    own is laid again in the next one; others stay whole. A completion without tokens keeps its
    place in `index` and `cu_seqlens`.

    `TrainingBatch.shared_prompt` makes micro-batches of the rows: with advantages, log-probs, and
    the denominator by which their losses add up. Without `max_tokens` there is one row, whose
    completion tokens have the order of `rollouts.refinements.packed()`.

    Args:
        prompt_ids: P prompts (q', the draft spliced in), as token ids; none may be empty.
        completions: For each prompt its completions, such as `rollouts.refinements.completions`.
        max_tokens: Maximum tokens of a row, prompts included; None: no limit.

    Returns:
        The rows, on the CPU.

    Raises:
        TypeError: Something else than token ids or completions came.
        ValueError: A prompt has no tokens or no completions, the numbers of prompts and of lists
            of completions differ, or a prompt and one of its completions exceed `max_tokens`.

    Examples:
        >>> rows = pack_shared_prompt([[5, 6], [5]], [[[7, 8], [9]], [[7], []]], max_tokens=6)
        >>> [row.input_ids.tolist() for row in rows]
        [[[5, 6, 7, 8, 9]], [[5, 7]]]
        >>> rows[1].index, rows[1].cu_seqlens
        (tensor([2, 3]), tensor([0, 1, 1], dtype=torch.int32))
    """
    for name, value in (("prompt_ids", prompt_ids), ("completions", completions)):
        check_list(name, value)
    if len(prompt_ids) != len(completions):
        raise ValueError(
            f"completions must hold one list per prompt = {len(prompt_ids)}, got {len(completions)}"
        )
    if len(prompt_ids) == 0:
        raise ValueError("prompt_ids must hold at least one prompt, got none")
    limit = math.inf if max_tokens is None else check_count("max_tokens", max_tokens)
    groups: list[Tails] = []
    index = 0
    for number, (prompt, drawn) in enumerate(zip(prompt_ids, completions, strict=True)):
        name = f"completions[{number}]"
        if not check_list(name, drawn):
            raise ValueError(f"{name} must hold at least one completion, got none")
        ids = _token_ids(f"prompt_ids[{number}]", prompt)
        if not ids:
            raise ValueError(f"prompt_ids[{number}] must have at least one token, got none")
        tails = [_token_ids(f"{name}[{at}]", tail) for at, tail in enumerate(drawn)]
        groups += _split(Tails(ids, tails, index), limit, number)
        index += len(tails)
    rows = fill([len(group) for group in groups], max_tokens)
    return [_lay_out([groups[i] for i in row]) for row in rows]


def _lay_out(groups: list[Tails]) -> SharedPromptRow:
    lengths = tuple((len(group.prompt), *map(len, group.completions)) for group in groups)
    return SharedPromptRow(**lay_in_row(groups), lengths=lengths)


def _split(group: Tails, limit: float, number: int) -> Iterator[Tails]:
    """Cut a group that no row can hold into groups that fit, each with the whole prompt."""
    start, size = 0, len(group.prompt)
    for at, tail in enumerate(group.completions):
        if len(group.prompt) + len(tail) > limit:
            raise ValueError(
                f"max_tokens must hold prompt_ids[{number}] and completions[{number}]"
                f"[{at}] = {len(group.prompt)} + {len(tail)} tokens, got {limit}"
            )
        if size + len(tail) > limit:
            yield Tails(group.prompt, group.completions[start:at], group.first + start)
            start, size = at, len(group.prompt)
        size += len(tail)
    yield Tails(group.prompt, group.completions[start:], group.first + start)


def _token_ids(name: str, value: Any) -> list[int]:
    if isinstance(value, Completion):
        value = value.token_ids
    if isinstance(value, Tensor):
        return check_rank(name, check_integral(name, value), 1, "[T]").tolist()
    is_ids = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_ids or not all(type(token) is int for token in value):
        raise TypeError(f"{name} must be token ids (a sequence of ints), got {describe(value)}")
    return list(value)
