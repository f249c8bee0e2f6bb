"""A run's folder: the settings that the run was started with, and its checkpoints.

Commands hold the folder they write into with `igrpo_algo.files.sole_writer`.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..files import check_same_run
from .metrics_file import write_json

SETTINGS = "run.json"


class Checkpoint(NamedTuple):
    """A complete checkpoint."""

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
    """Raise ValueError if a folder's run had other settings; `free` ones may differ."""
    earlier, now = (
        {name: value for name, value in known.items() if name not in free}
        for known in (load_settings(output_dir), json.loads(json.dumps(settings)))
    )
    check_same_run(str(output_dir), earlier, now)


def digest(value: Any) -> str:
    """Hash a value, so that a run can be compared with an earlier one of the same settings."""
    text = json.dumps(value, default=str)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def weights_of(model: str) -> str | None:
    """Hash samples of a model folder's weights; None for a name on the hub.

    Training changes nearly every weight, so that 64 places of a file tell. Its time would not:
    weights that are copied or fetched again are the same.
    """
    kinds = (".safetensors", ".bin")
    files = [path for path in Path(model).glob("*") if path.suffix in kinds and path.is_file()]
    seen = hashlib.blake2b(digest_size=8)
    for path in sorted(files):
        size = path.stat().st_size
        seen.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for place in range(64):
                file.seek(size * place // 64)
                seen.update(file.read(4096))
    return seen.hexdigest() if files else None


def last_checkpoint(output_dir: Path) -> Checkpoint | None:
    """Find the last complete checkpoint, if there is one.

    The trainer writes `trainer_state.json` last. A folder without it, or with half of it, comes
    from a run that died while it saved, and is passed over.

    Raises:
        ValueError: A `trainer_state.json` is valid JSON but has no step.
    """
    whole = []
    for path in output_dir.glob("checkpoint-*"):
        try:
            state = json.loads((path / "trainer_state.json").read_bytes())
        except (OSError, ValueError):
            continue
        step = state.get("global_step") if isinstance(state, dict) else None
        if type(step) is not int:
            raise ValueError(
                f"{path}/trainer_state.json must hold an object with global_step, got {state!r:.80}"
            )
        whole.append(Checkpoint(step, path))
    return max(whole, default=None)
