"""A file of finished groups that a dying run cannot lose: one line of JSON for each.

A line is written whole, flushed and synced before its group is handed on. What a crash can leave
behind is a last line without an end, and that one is dropped on loading.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ..rollouts import Group
from ..sampling import Prompt


def load_journal(path: str | os.PathLike[str]) -> list[Group]:
    """Read the groups of a journal, in the order in which they finished.

    A last line that is torn (no line end) is ignored.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A whole line holds no group.
    """
    *lines, _torn = Path(path).read_bytes().split(b"\n")
    groups = []
    for number, line in enumerate(lines, 1):
        try:
            groups.append(Group.from_json(json.loads(line)))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"journal: line {number} of {os.fspath(path)} holds no group: {error!r}"
            ) from error
    return groups


def check_journal(
    finished: Sequence[Group], prompts: Sequence[Prompt], num_drafts: int, rounds: int
) -> None:
    """Raise ValueError unless the groups belong to a rollout of these prompts and sizes."""
    for group in finished:
        expected = prompts[group.index] if group.index < len(prompts) else None
        if group.drafts.prompt != expected:
            raise ValueError(
                f"journal belongs to other prompts: its group {group.index} has "
                f"{group.drafts.prompt!r}, this rollout {expected!r}"
            )
        sizes = len(group.drafts.completions), len(group.refinements)
        if sizes != (num_drafts, rounds):
            raise ValueError(
                f"journal has groups of (num_drafts, rounds) = {sizes}, "
                f"this rollout {(num_drafts, rounds)}"
            )


class Journal:
    """A journal open for writing; a context manager. A torn last line is cut off on opening.

    Args:
        path: The file; made if it is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = open(path, "a+b")  # noqa: SIM115 - closed on exit
        self._file.seek(0)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def append(self, group: Group) -> None:
        """Write a group, and return when it is on disk."""
        self._file.write(json.dumps(group.to_json()).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
