"""Make an `IGRPOConfig` from preset, file, options and `--set`; later ones win."""

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from igrpo_kernels.checks import check_number

from ..prompts import check_chat_template_kwargs

if TYPE_CHECKING:
    from ..trainers.trl.config import IGRPOConfig

Settings = dict[str, Any]

GIVEN_ELSEWHERE = {
    "output_dir": "is given by --output-dir",
    "resume_from_checkpoint": "is given by --resume",
    **dict.fromkeys(("do_train", "do_predict"), "is decided by the command"),
}

# With these a run can be resumed and watched; the user's own settings win.
DEFAULTS: Settings = {"save_steps": 100, "save_total_limit": 2, "logging_steps": 1}
EVALUATING: Settings = {"eval_strategy": "steps", "eval_steps": 100}
WITHOUT_ACCELERATOR: Settings = {"use_cpu": True, "bf16": False}


def read_config_file(path: Path) -> Settings:
    """Read settings from a JSON or YAML file: a mapping from fields of `IGRPOConfig` to values."""
    text = path.read_text(encoding="utf-8")
    if path.suffix in (".yaml", ".yml"):
        import yaml  # type: ignore[import-untyped]

        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"{path}: not YAML: {error}") from error
    elif path.suffix == ".json":
        try:
            settings = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
    else:
        raise ValueError(f"{path}: a config is .json, .yaml or .yml")
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: wanted a mapping, got {type(settings).__name__}")
    return settings


def parse_assignments(assignments: Sequence[str]) -> Settings:
    """Read `key=value` pairs; a value is JSON, or else a string.

    Examples:
        >>> parse_assignments(["beta=1e-3", "use_vllm=true", "draft_choice=random"])
        {'beta': 0.001, 'use_vllm': True, 'draft_choice': 'random'}
    """
    settings: Settings = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not (equals and key.strip()):
            raise ValueError(f"--set wants key=value, got {assignment!r}")
        try:
            settings[key.strip()] = json.loads(text)
        except ValueError:
            settings[key.strip()] = text
    return settings


def build_config(
    output_dir: Path, *, paper: bool, evaluates: bool, settings: Mapping[str, Any]
) -> "IGRPOConfig":
    """Build the configuration; refuse unknown fields and values of the wrong type."""
    from ..trainers.trl.config import IGRPOConfig

    fields = {field.name: field for field in dataclasses.fields(IGRPOConfig) if field.init}
    for name, value in settings.items():
        if name not in fields:
            close = difflib.get_close_matches(name, fields, n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ""
            raise ValueError(f"IGRPOConfig has no field {name!r}{hint}")
        _check_type(name, value, fields[name].default)
    if (steps := settings.get("max_steps", -1)) != -1:  # which leaves it to the epochs
        check_number("max_steps", steps, at_least=1)
    check_chat_template_kwargs(settings.get("chat_template_kwargs"))
    for name in GIVEN_ELSEWHERE.keys() & settings.keys():
        raise ValueError(f"{name} {GIVEN_ELSEWHERE[name]}, not by --config or --set")
    of_evaluation = sorted(name for name in settings if "eval" in name.split("_"))
    if of_evaluation and not evaluates:
        raise ValueError(f"{', '.join(of_evaluation)} needs --eval-dataset")
    machine = {} if torch.accelerator.is_available() else WITHOUT_ACCELERATOR
    known = DEFAULTS | (EVALUATING if evaluates else {}) | machine | dict(settings)
    return (IGRPOConfig.paper if paper else IGRPOConfig)(str(output_dir), **known)


def _check_type(name: str, value: object, default: object) -> None:
    """Check a value against the type of its field's default, if that is a bool or a number."""
    wanted: tuple[type, ...] = (type(default),)
    if type(default) is float:
        wanted = (int, float)
    elif type(default) not in (bool, int):
        return
    if not isinstance(value, wanted) or (isinstance(value, bool) and type(default) is not bool):
        raise TypeError(f"{name} must be {' or '.join(t.__name__ for t in wanted)}, got {value!r}")
