"""JSON files that stay whole when a run is killed: metrics as lines, summaries as one document."""

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole

Record = dict[str, Any]


def write_json(path: Path, value: object) -> None:
    """Write one JSON document, whole or not at all; numbers that are not finite become null."""
    write_whole(path, json.dumps(_finite(value), indent=2).encode() + b"\n")


class MetricsFile:
    """A jsonl file that grows by whole lines.

    Each `append` rewrites the whole file (`write_whole`): a kill can tear even one line that is
    written in place. A torn last line, as other writers leave it, is cut off when the file
    is opened. Numbers that are not finite are written as null.

    Args:
        path: The file; it and its folder are made at the first `append`.

    Raises:
        ValueError: A line other than the last is not a JSON object.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = MetricsFile(Path(folder) / "metrics.jsonl")
        ...     file.append({"step": 1, "reward": float("nan")})
        ...     file.read()
        [{'step': 1, 'reward': None}]
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists():
            whole = path.read_bytes()
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(path, end)
            self.read()

    def read(self) -> list[Record]:
        """Return all rows."""
        if not self.path.exists():
            return []
        return [
            self._parse(line, number)
            for number, line in enumerate(self.path.read_bytes().splitlines(), 1)
        ]

    def append(self, *rows: Mapping[str, Any]) -> None:
        """Add rows in one piece: after a kill all of them are there, or none."""
        earlier = self.path.read_bytes() if self.path.exists() else b""
        write_whole(self.path, earlier + _lines(rows))

    def truncate(self, keep: Callable[[Record], bool]) -> None:
        """Drop the rows for which `keep` is false."""
        rows = self.read()
        kept = [row for row in rows if keep(row)]
        if len(kept) < len(rows):
            write_whole(self.path, _lines(kept))

    def _parse(self, line: bytes, number: int) -> Record:
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{self.path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{self.path}, line {number}: wanted an object, got {row!r}")
        return row


def _lines(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(_finite(row)) + "\n" for row in rows).encode()


def _finite(value: Any) -> Any:
    """Replace what JSON cannot represent: NaN and infinities by None, objects by their text."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
