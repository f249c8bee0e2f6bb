"""A prompt and the completions drawn from it, laid out so that the prompt is computed once.

Stage 2 trains G refinements under one q' = question + draft. As G sequences, q' goes through the
model G times; here it stands in the row once, and the refinements after it all continue it. What
the rows run through is `igrpo_algo.trainers.transformers`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.checks import (
    check_count,
    check_integral,
    check_rank,
    check_shape,
    check_tensor,
    describe,
)

from ..rollouts.completions import Completion

Ids = Sequence[int] | Tensor


@dataclass(frozen=True, eq=False)
class SharedPromptRow:
    """One row of S tokens: each prompt once, followed by its completions.

    The L completion tokens among them are what a loss sees, as B packed sequences; a completion's
    first token is predicted from the last position of the prompt, which all of them share.

    Attributes:
        input_ids: Tokens of the row. Shape [1, S], int64.
        position_ids: Their positions; each completion continues at its prompt's length.
            Shape [1, S], int64.
        lengths: For each prompt, its tokens and then those of each of its completions.
        index: Which completion each sequence is, counted through all prompts in the order given.
            Shape [B], int64.
        count: Completions of all rows together.
        cu_seqlens: Offsets of the completions among the L tokens. Shape [B + 1], int32.
        targets: The L completion tokens. Shape [L], int64.
        predictors: The position in the row that predicts each target. Shape [L], int64.

    Examples:
        >>> (row,) = pack_shared_prompt([[5, 6]], [[[7, 8], [9]]])
        >>> row.input_ids, row.position_ids
        (tensor([[5, 6, 7, 8, 9]]), tensor([[0, 1, 2, 3, 2]]))
        >>> row.targets, row.predictors
        (tensor([7, 8, 9]), tensor([1, 2, 1]))
    """

    input_ids: Tensor
    position_ids: Tensor
    lengths: tuple[tuple[int, ...], ...]
    index: Tensor
    count: int
    cu_seqlens: Tensor
    targets: Tensor
    predictors: Tensor

    def to(self, device: torch.device | str) -> "SharedPromptRow":
        """Move the tensors; `lengths` stays, so that no layer waits for the device."""
        moved: dict[str, Any] = {
            name: value.to(device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def model_inputs(self) -> dict[str, Any]:
        """Give the keyword arguments of a transformers model that `enable_shared_prompt` was given.

        The attention mask among them is empty and of four axes, which transformers hands on as it
        is: no [S, S] mask is made, and attention that knows no `shared_prompt` fails on it.
        """
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": torch.empty(1, 1, 0, 0, device=self.input_ids.device),
            "use_cache": False,
            "shared_prompt": self,
        }

    def loss_inputs(self, hidden: Tensor) -> dict[str, Tensor]:
        """Give `hidden`, `targets` and `cu_seqlens` as `linear_policy_loss` takes them.

        The hidden state of a prompt's last position stands before each of its completions, and
        gets the sum of their gradients.

        Args:
            hidden: Last hidden states of the row. Shape [1, S, H] or [S, H].

        Raises:
            TypeError: `hidden` is no tensor.
            ValueError: `hidden` is not one row of S positions.
        """
        check_tensor("hidden", hidden)
        size = self.input_ids.shape[1]
        if hidden.shape[:-1] not in ((1, size), (size,)):
            raise ValueError(
                f"hidden must have shape [1, S, H] or [S, H] with S = {size}, "
                f"got {list(hidden.shape)}"
            )
        rows = hidden.reshape(size, hidden.shape[-1]).index_select(0, self.predictors)
        return {"hidden": rows, "targets": self.targets, "cu_seqlens": self.cu_seqlens}

    def per_completion(self, values: Tensor) -> Tensor:
        """Pick this row's values, such as advantages, from those of all completions.

        Args:
            values: One per completion, prompt-major. Shape [P, G], or flat.

        Returns:
            Shape [B].

        Raises:
            TypeError: `values` is no tensor.
            ValueError: `values` does not hold one value per completion of all rows.
        """
        flat = check_tensor("values", values).flatten()
        check_shape("values", flat, [self.count], "[P, G] or [P * G], in all")
        return flat[self.index.to(flat.device)]

    def per_token(self, values: Tensor) -> Tensor:
        """Pick this row's values, such as sampler log-probs, from a padded tensor of all tokens.

        Args:
            values: One row per completion, prompt-major, padded on the right, as of
                `rollouts.refinements.padded()`. Shape [P * G, T].

        Returns:
            Shape [L].

        Raises:
            TypeError: `values` is no tensor.
            ValueError: `values` does not hold one row per completion of all rows, or is too short.
        """
        check_rank("values", check_tensor("values", values), 2, "[P * G, T]")
        sizes = [size for group in self.lengths for size in group[1:]]
        if len(values) != self.count or max(sizes) > values.shape[1]:
            raise ValueError(
                f"values must have shape [P * G, T] = [{self.count}, at least {max(sizes)}], "
                f"got {list(values.shape)}"
            )
        columns = torch.arange(values.shape[1], device=values.device)
        taken = columns < torch.tensor(sizes, device=values.device)[:, None]
        return values[self.index.to(values.device)][taken]


def pack_shared_prompt(
    prompt_ids: Sequence[Ids],
    completions: Sequence[Sequence[Completion | Ids]],
    *,
    max_tokens: int | None = None,
) -> list[SharedPromptRow]:
    """Lay each prompt once and its completions after it, in rows of at most `max_tokens`.

    Rows are filled in the order given. A prompt whose completions do not fit into a row of their
    own is laid again in the next one; others stay whole. A completion without tokens keeps its
    place in `index` and `cu_seqlens`.

    Each row is a micro-batch: with `SequenceMean(denominator=row.count)` the losses of the rows add
    up to that of all completions. Without `max_tokens` there is one row, whose completion tokens
    stand in the order of `rollouts.refinements.packed()`.

    Args:
        prompt_ids: P prompts (q', the draft spliced in), as token ids; none may be empty.
        completions: For each prompt its completions, such as `rollouts.refinements.completions`.
        max_tokens: Most tokens of a row, prompts included; None: no limit.

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
    if len(prompt_ids) != len(completions):
        raise ValueError(
            f"completions must hold one list per prompt = {len(prompt_ids)}, got {len(completions)}"
        )
    if len(prompt_ids) == 0:
        raise ValueError("prompt_ids must hold at least one prompt, got none")
    limit = math.inf if max_tokens is None else check_count("max_tokens", max_tokens)
    rows: list[list[_Group]] = [[]]
    index = 0
    for number, (prompt, drawn) in enumerate(zip(prompt_ids, completions, strict=True)):
        name = f"completions[{number}]"
        if isinstance(drawn, str) or not isinstance(drawn, Sequence):
            raise TypeError(f"{name} must be a list of completions, got {describe(drawn)}")
        if not drawn:
            raise ValueError(f"{name} must hold at least one completion, got none")
        ids = _token_ids(f"prompt_ids[{number}]", prompt)
        if not ids:
            raise ValueError(f"prompt_ids[{number}] must have at least one token, got none")
        tails = [_token_ids(f"{name}[{at}]", tail) for at, tail in enumerate(drawn)]
        for group in _split(_Group(ids, tails, index), limit, number):
            if sum(map(len, [*rows[-1], group])) > limit:
                rows.append([])
            rows[-1].append(group)
        index += len(tails)
    return [_lay_out(row, index) for row in rows]


@dataclass(frozen=True)
class _Group:
    """A prompt and some of its completions, the first of which is number `first` of all."""

    prompt: list[int]
    tails: list[list[int]]
    first: int

    def __len__(self) -> int:
        return len(self.prompt) + sum(map(len, self.tails))


def _split(group: _Group, limit: float, number: int) -> Iterator[_Group]:
    """Cut a group that no row can hold into groups that fit, each with the whole prompt."""
    start, size = 0, len(group.prompt)
    for at, tail in enumerate(group.tails):
        if len(group.prompt) + len(tail) > limit:
            raise ValueError(
                f"max_tokens must hold prompt_ids[{number}] and completions[{number}]"
                f"[{at}] = {len(group.prompt)} + {len(tail)} tokens, got {limit}"
            )
        if size + len(tail) > limit:
            yield _Group(group.prompt, group.tails[start:at], group.first + start)
            start, size = at, len(group.prompt)
        size += len(tail)
    yield _Group(group.prompt, group.tails[start:], group.first + start)


def _lay_out(groups: list[_Group], count: int) -> SharedPromptRow:
    ids: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    predictors: list[int] = []
    for group in groups:
        last = len(ids) + len(group.prompt) - 1
        ids += group.prompt
        positions += range(len(group.prompt))
        for tail in group.tails:
            predictors += [last, *range(len(ids), len(ids) + len(tail) - 1)][: len(tail)]
            positions += range(len(group.prompt), len(group.prompt) + len(tail))
            targets += tail
            ids += tail
    tails = [tail for group in groups for tail in group.tails]
    index = [group.first + at for group in groups for at in range(len(group.tails))]
    return SharedPromptRow(
        input_ids=torch.tensor([ids], dtype=torch.int64),
        position_ids=torch.tensor([positions], dtype=torch.int64),
        lengths=tuple((len(group.prompt), *map(len, group.tails)) for group in groups),
        index=torch.tensor(index, dtype=torch.int64),
        count=count,
        cu_seqlens=torch.tensor([0, *accumulate(map(len, tails))], dtype=torch.int32),
        targets=torch.tensor(targets, dtype=torch.int64),
        predictors=torch.tensor(predictors, dtype=torch.int64),
    )


def _token_ids(name: str, value: Any) -> list[int]:
    if isinstance(value, Completion):
        value = value.token_ids
    if isinstance(value, Tensor):
        return check_rank(name, check_integral(name, value), 1, "[T]").tolist()
    is_ids = isinstance(value, Sequence) and not isinstance(value, str)
    if not is_ids or not all(type(token) is int for token in value):
        raise TypeError(f"{name} must be token ids (a sequence of ints), got {describe(value)}")
    return list(value)
