"""A file of finished prompts that survives the death of a run: a header, then a line per prompt.

Every line is JSON, written whole, flushed and synced before its rollout is yielded. A crash can
leave a last line without an end, which is dropped on loading.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from ..files import check_same_run, sole_writer
from ..prompts import Prompt
from .from_json import from_json, parse, to_json
from .records import Rollout

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Header:
    """Which rollout a journal belongs to, as far as JSON can say it.

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
            TypeError: A prompt has content that JSON cannot represent.
        """
        hashed = hashlib.blake2b(json.dumps(prompts).encode(), digest_size=16).hexdigest()
        return cls(len(prompts), num_drafts, num_refinements, rounds, seed, hashed)


def load_journal(path: str | os.PathLike[str]) -> list[Rollout]:
    """Read the rollouts of a journal, in the order in which they finished.

    A last line that is torn (no line end) is ignored.

    Args:
        path: The file that `stream_two_stage_rollout` was given.

    Returns:
        The rollouts; `Rollouts.of` sorts them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The first line is not a header; a later whole line is not a rollout, or its
            prompt does not exist or has a line already. The message names the line and the field.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with Journal(f"{folder}/j", Header.of(["q"], 1, 1, rounds=1, seed=0)):
        ...         load_journal(f"{folder}/j")
        []
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    header = _read_header(path, lines)
    finished: dict[int, Rollout] = {}
    for number, line in enumerate(lines[1:], 2):
        where = f"journal: line {number} of {os.fspath(path)}"
        rollout = _read(Rollout, line, where)
        if header is None or rollout.index not in range(header.num_prompts):
            count = 0 if header is None else header.num_prompts
            raise ValueError(f"{where} has index {rollout.index}, but there are {count} prompts")
        if rollout.index in finished:
            raise ValueError(f"{where} repeats index {rollout.index}")
        finished[rollout.index] = rollout
    return list(finished.values())


def check_journal(path: str | os.PathLike[str], header: Header) -> None:
    """Check that a rollout may continue a journal, if there is one.

    Raises:
        ValueError: The journal begins with another header, or with none.
    """
    if not Path(path).exists():
        return
    with open(path, "rb") as file:
        first = file.readline()
    written = _read_header(path, [first[:-1]] if first.endswith(b"\n") else [])
    if written is not None:
        check_same_run(f"journal: {os.fspath(path)}", asdict(written), asdict(header))


def _read_header(path: str | os.PathLike[str], lines: list[bytes]) -> Header | None:
    return _read(Header, lines[0], f"journal: line 1 of {os.fspath(path)}") if lines else None


def _read(kind: type[Kind], line: bytes, where: str) -> Kind:
    try:
        return cast(Kind, from_json(kind, parse(line), kind.__name__.lower()))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


class Journal:
    """A journal open for writing, by one process at a time; a context manager.

    On entering, a torn last line is cut off, and what the journal holds is read.

    Args:
        path: The file; made if it is not there.
        header: Its first line, written if there is none.

    Attributes:
        finished: The rollouts that it held on entering.

    Raises:
        BlockingIOError: Another run is writing it.
        ValueError: As in `load_journal` and `check_journal`.
    """

    def __init__(self, path: str | os.PathLike[str], header: Header) -> None:
        self.path, self.header = Path(path), header
        self.finished: list[Rollout] = []

    def __enter__(self) -> "Journal":
        with ExitStack() as stack:
            stack.enter_context(sole_writer(self.path))
            self._file = stack.enter_context(open(self.path, "a+b"))
            self._file.seek(0)
            end = self._file.read().rfind(b"\n") + 1
            self._file.truncate(end)
            if not end:
                self._write(asdict(self.header))
            check_journal(self.path, self.header)
            self.finished = load_journal(self.path)
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def append(self, rollout: Rollout) -> None:
        """Write a rollout, and return when it is on disk."""
        self._write(to_json(rollout))

    def _write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
