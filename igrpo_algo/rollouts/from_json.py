"""Records as JSON: written from dataclasses, and read back by their types.

Input is not trusted: anything that is not a record raises a ValueError that names the field.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from igrpo_kernels.checks import describe

Reader = Callable[[Any, str], Any]


def to_json(value: Any) -> Any:
    """Return a value of dataclasses and plain types in the types of JSON; NaN becomes null.

    Lists of numbers, of which a record has long ones, are not copied.
    """
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, dict):
        return {key: to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        kinds = set(map(type, value))
        if kinds <= {int} or (kinds == {float} and not any(map(math.isnan, value))):
            return value
        return [to_json(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def parse(text: str | bytes) -> Any:
    """Parse JSON strictly: NaN and infinities are not JSON, and nesting has a limit.

    Raises:
        ValueError: The text is not JSON.
    """
    try:
        return json.loads(text, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def from_json(
    kind: Any, value: Any, where: str, readers: Mapping[tuple[type, str], Reader] | None = None
) -> Any:
    """Read a value as a type: a dataclass, a list, a union, a float (null is NaN), a plain type.

    Args:
        kind: The type.
        value: What was parsed.
        where: What errors call the value.
        readers: By dataclass and field, how to read that field in place of its type.

    Returns:
        A value of the type.

    Raises:
        ValueError: The value is of another type; a field is missing, unknown or refused.

    Examples:
        >>> from_json(list[float], [1.5, None], "rewards")
        [1.5, nan]
        >>> from_json(list[int], [1, "2"], "token_ids")
        Traceback (most recent call last):
        ValueError: token_ids[1] must be int, got str '2'
    """
    if is_dataclass(kind):
        return _read_record(kind, value, where, readers or {})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return _read_union(arguments, value, where, readers)
    if origin is list and isinstance(value, list):
        (each,) = arguments
        if each in (int, float) and {type(item) for item in value} <= {each}:
            return value  # long lists of numbers: one look at all of them
        return [from_json(each, item, f"{where}[{i}]", readers) for i, item in enumerate(value)]
    if kind is float:
        if value is None:
            return math.nan  # the one object of it, so that records compare equal
        if type(value) in (int, float):
            return float(value)
    elif type(value) is (origin or kind):
        return value
    raise ValueError(f"{where} must be {_name(kind)}, got {describe(value)}")


def _read_record(
    kind: Any, value: Any, where: str, readers: Mapping[tuple[type, str], Reader]
) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object, got {describe(value)}")
    hints, known = get_type_hints(kind), {field.name: field for field in fields(kind)}
    for name in value.keys() - known.keys():
        raise ValueError(f"{where} has an unknown field {name!r}")
    read = {}
    for name, field in known.items():
        if name in value:
            reader = readers.get((kind, name))
            inner = f"{where}.{name}"
            read[name] = (
                from_json(hints[name], value[name], inner, readers)
                if reader is None
                else reader(value[name], inner)
            )
        elif field.default is MISSING:
            raise ValueError(f"{where} lacks the field {name!r}")
    try:
        return kind(**read)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _read_union(
    kinds: tuple[Any, ...],
    value: Any,
    where: str,
    readers: Mapping[tuple[type, str], Reader] | None,
) -> Any:
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    if len(others) == 1:
        return from_json(others[0], value, where, readers)
    for kind in others:
        try:
            return from_json(kind, value, where, readers)
        except ValueError:
            continue
    names = " or ".join(map(_name, others))
    raise ValueError(f"{where} must be {names}, got {describe(value)}")


def _name(kind: Any) -> str:
    return str(kind if get_args(kind) else kind.__name__)


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
