"""A run's folder: the settings it was started with, and its checkpoints.

Whoever writes into one holds it by `igrpo_algo.files.sole_writer`.
"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .metrics_file import write_json

SETTINGS = "run.json"


class Checkpoint(NamedTuple):
    """A checkpoint that was written to its end."""

    step: int
    path: Path


def save_settings(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings of a run in its folder."""
    write_json(output_dir / SETTINGS, settings)


def load_settings(output_dir: Path) -> dict[str, Any]:
    """Read the settings that a folder's run was started with.

    Raises:
        ValueError: The file is not there or broken.
    """
    path = output_dir / SETTINGS
    try:
        settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: wanted an object, got {settings!r}")
    return settings


def check_settings(
    output_dir: Path, settings: Mapping[str, Any], *, free: Collection[str] = ()
) -> None:
    """Raise ValueError unless a folder's run was started with these settings, but for free ones."""
    earlier, now = load_settings(output_dir), json.loads(json.dumps(settings))
    changed = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in sorted((earlier.keys() | now.keys()) - set(free))
        if earlier.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(
            f"{output_dir} holds a run with other settings ({'; '.join(changed)}): "
            "repeat them, or choose another --output-dir"
        )


def last_checkpoint(output_dir: Path) -> Checkpoint | None:
    """Find the last checkpoint that was written to its end, if any.

    The trainer writes `trainer_state.json` last: a folder without it, or with half of it, was left
    by a run that died while saving, and is passed over.

    Raises:
        ValueError: A `trainer_state.json` is whole and says no step.
    """
    whole = []
    for path in output_dir.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        step = state.get("global_step") if isinstance(state, dict) else None
        if type(step) is not int:
            raise ValueError(f"{path}/trainer_state.json says no global_step, got {state!r:.80}")
        whole.append(Checkpoint(step, path))
    return max(whole, default=None)
