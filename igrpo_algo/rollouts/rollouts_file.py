"""The file of `Rollouts.save`: token ids and log-probs as tensors, the rest as JSON beside them.

Nothing unpickles. A file that holds something else is a ValueError that names file and field.
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.checks import describe

from ..files import check_path, write_whole
from ..flat import flat_tensor
from .completions import Completion
from .from_json import from_json, parse, to_json
from .records import Rollout, Rollouts, Stage

FORMAT = "igrpo rollouts 1"
DTYPES = {
    "prompt_ids": torch.int64,
    "token_ids": torch.int64,
    "logprobs": torch.float64,
    "json": torch.uint8,
}


def save_rollouts(rollouts: Sequence[Rollout], path: str | os.PathLike[str]) -> None:
    """Write one safetensors file: the whole of it or nothing.

    The JSON has the number of tokens where token ids were, and whether there were log-probs.

    Raises:
        TypeError: A prompt has content that JSON cannot represent, such as an image.
    """
    from safetensors.torch import save

    path = check_path("path", path)
    rows: dict[str, list[list[Any]]] = {"prompt_ids": [], "token_ids": [], "logprobs": []}
    records = [to_json(rollout) for rollout in rollouts]
    for stage in (stage for r in records for stage in (r["drafts"], *r["refinements"])):
        if stage["prompt_ids"] is not None:
            stage["prompt_ids"] = _move(stage["prompt_ids"], rows["prompt_ids"])
        for completion in stage["completions"]:
            completion["token_ids"] = _move(completion["token_ids"], rows["token_ids"])
            known = completion["logprobs"] is not None
            _move(completion["logprobs"] or [], rows["logprobs"])
            completion["logprobs"] = known
    tensors = {name: flat_tensor(each, DTYPES[name]) for name, each in rows.items()}
    text = json.dumps(records, allow_nan=False).encode()
    tensors["json"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    write_whole(path, save(tensors, metadata={"format": FORMAT}))


def load_rollouts(path: str | os.PathLike[str]) -> Rollouts:
    """Read what `save_rollouts` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds something else.
    """
    path = check_path("path", path)
    try:
        tensors = _read_tensors(path)
        numbers = _Numbers(tensors)
        readers = {
            (Stage, "prompt_ids"): numbers.prompt_ids,
            (Completion, "token_ids"): numbers.token_ids,
            (Completion, "logprobs"): numbers.logprobs,
        }
        records = parse(bytes(tensors["json"].numpy()))
        rollouts = from_json(list[Rollout], records, "rollouts", readers)
        numbers.check_all_taken()
        return Rollouts(rollouts)
    except ValueError as error:
        raise ValueError(f"path: {os.fspath(path)}: {error}") from error


def _move(row: list[Any], to: list[list[Any]]) -> int:
    to.append(row)
    return len(row)


def _read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            if (found := (file.metadata() or {}).get("format")) != FORMAT:
                raise ValueError(f"holds no rollouts: its format is {found!r}, not {FORMAT!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"is not a safetensors file: {error}") from error
    if tensors.keys() != DTYPES.keys():
        raise ValueError(f"must hold the tensors {sorted(DTYPES)}, got {sorted(tensors)}")
    for name, tensor in tensors.items():
        if tensor.dtype != DTYPES[name] or tensor.dim() != 1:
            wanted = str(DTYPES[name]).removeprefix("torch.")
            raise ValueError(f"{name} must be {wanted} in one axis, got {describe(tensor)}")
    return tensors


class _Numbers:
    """The tensors of a file, handed out from the front to the records that count them."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._rows = {name: tensors[name].tolist() for name in DTYPES if name != "json"}
        self._taken = dict.fromkeys(self._rows, 0)
        self._latest = 0

    def prompt_ids(self, count: Any, where: str) -> list[int] | None:
        return None if count is None else self._take("prompt_ids", count, where)

    def token_ids(self, count: Any, where: str) -> list[int]:
        ids = self._take("token_ids", count, where)
        self._latest = len(ids)
        return ids

    def logprobs(self, known: Any, where: str) -> list[float] | None:
        known = from_json(bool, known, where)
        return self._take("logprobs", self._latest, where) if known else None

    def check_all_taken(self) -> None:
        for name, rows in self._rows.items():
            if self._taken[name] < len(rows):
                raise ValueError(f"{name} holds {len(rows)}, the records {self._taken[name]}")

    def _take(self, name: str, count: Any, where: str) -> list[Any]:
        begin, rows = self._taken[name], self._rows[name]
        if from_json(int, count, where) < 0:
            raise ValueError(f"{where} must be a number of tokens, got {count}")
        if begin + count > len(rows):
            raise ValueError(f"{where} wants {count} of {name}, and {len(rows) - begin} are left")
        self._taken[name] += count
        return rows[begin : begin + count]
