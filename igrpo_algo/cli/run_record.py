"""What a run was started with, kept in its folder so that only the same run goes on there."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .metrics_file import write_json

RECORD = "run.json"


def save_record(output_dir: Path, record: Mapping[str, Any]) -> None:
    """Keep the settings of a run in its folder."""
    write_json(output_dir / RECORD, record)


def check_record(
    output_dir: Path, record: Mapping[str, Any], *, free: Collection[str] = ()
) -> None:
    """Raise ValueError unless a folder's run was started with these settings, but for free ones."""
    path = output_dir / RECORD
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    now = json.loads(json.dumps(record))
    names = sorted((earlier.keys() | now.keys()) - set(free))
    changed = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in names
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{output_dir} holds a run with other settings ({'; '.join(changed)}): "
            "repeat them, or choose another --output-dir"
        )
