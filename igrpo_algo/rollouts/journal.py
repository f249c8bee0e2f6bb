"""A file of finished groups that a dying run cannot lose: a header, then a line for each group.

Every line is JSON, written whole, flushed and synced before its group is handed on. What a crash
can leave behind is a last line without an end, and that one is dropped on loading.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .records import Group
from .sampling import Prompt


@dataclass(frozen=True)
class Header:
    """Which rollout a journal belongs to, as far as that can be written down.

    Functions (sampler, reward, splice, select) cannot be compared, so they are not in it.

    Attributes:
        num_prompts: P.
        num_drafts: N.
        num_refinements: G.
        rounds: Rounds of refinement.
        seed: The rollout's.
        prompts: Hash of the prompts.
    """

    num_prompts: int
    num_drafts: int
    num_refinements: int
    rounds: int
    seed: int | None
    prompts: str

    @classmethod
    def of(
        cls,
        prompts: Sequence[Prompt],
        num_drafts: int,
        num_refinements: int,
        rounds: int,
        seed: int | None,
    ) -> "Header":
        """Describe a rollout.

        Raises:
            TypeError: A prompt holds what JSON cannot say.
        """
        hashed = hashlib.blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest()
        return cls(len(prompts), num_drafts, num_refinements, rounds, seed, hashed)


def load_journal(path: str | os.PathLike[str]) -> list[Group]:
    """Read the groups of a journal, in the order in which they finished.

    A last line that is torn (no line end) is ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The first line is no header, a later whole line holds no group, or one of a
            prompt that the rollout does not have or that another line has already.
    """
    return _read(path)[1]


def resume_journal(path: str | os.PathLike[str], header: Header) -> list[Group]:
    """Read the groups of a journal that this rollout may go on with; none if there is no file.

    Raises:
        ValueError: The journal is broken, or its header is another one.
    """
    if not Path(path).exists():
        return []
    written, groups = _read(path)
    for name in [field.name for field in fields(header)] if written is not None else []:
        had, has = getattr(written, name), getattr(header, name)
        if had != has:
            raise ValueError(
                f"journal belongs to another rollout: {os.fspath(path)} has {name} = {had!r}, "
                f"this one {has!r}"
            )
    return groups


def _read(path: str | os.PathLike[str]) -> tuple[Header | None, list[Group]]:
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    if not lines:
        return None, []
    try:
        header = Header(**json.loads(lines[0]))
    except (ValueError, TypeError) as error:
        raise ValueError(f"journal: line 1 of {os.fspath(path)} is no header: {error!r}") from error
    groups: dict[int, Group] = {}
    for number, line in enumerate(lines[1:], 2):
        where = f"journal: line {number} of {os.fspath(path)}"
        try:
            group = Group.from_json(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{where} holds no group: {error!r}") from error
        if group.index not in range(header.num_prompts):
            raise ValueError(
                f"{where} has index {group.index}, but there are {header.num_prompts} prompts"
            )
        if group.index in groups:
            raise ValueError(f"{where} repeats index {group.index}")
        groups[group.index] = group
    return header, list(groups.values())


class Journal:
    """A journal open for writing; a context manager. A torn last line is cut off on opening.

    Args:
        path: The file; made if it is not there.
        header: Its first line, written if there is none.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115 - closed on exit
        self._file.seek(0)
        end = self._file.read().rfind(b"\n") + 1
        self._file.truncate(end)
        if not end:
            self._write(asdict(header))

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, group: Group) -> None:
        """Write a group, and return when it is on disk."""
        self._write(group.to_json())

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
