"""The fields of a dataclass hold what their annotations say: one check for all of them."""

import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from igrpo_kernels.checks import describe

_NAMES: dict[Any, str] = {
    str: "a string",
    bool: "True or False",
    int: "an int",
    float: "a number",
    list: "a list",
    tuple: "a tuple",
    Collection: "a collection",
    Mapping: "a mapping",
    Callable: "callable",
    types.NoneType: "None",
}


def check_fields(record: Any) -> None:
    """Raise TypeError unless each field of a dataclass has the type that it declares.

    A field `list[int]` must be a list, of whatever: the entries are not looked at. A bool is not a
    number and text is not a collection; an int is a number, and NaN is one too. `Any` and literals
    are left to checks of their own, and so are protocols, unless of something that is called.

    Examples:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Point:
        ...     x: float | None
        ...     def __post_init__(self):
        ...         check_fields(self)
        >>> Point(True)
        Traceback (most recent call last):
        TypeError: x must be a number or None, got bool True
    """
    for name, kinds in _declared(record.__class__).items():
        value = getattr(record, name)
        taken_for_another = any(isinstance(value, k) and k not in kinds for k in (bool, str, bytes))
        if taken_for_another or not isinstance(value, kinds):
            named = [kind for kind in kinds if not (kind is int and float in kinds)]
            wanted = " or ".join(_NAMES.get(kind, f"a {kind.__name__}") for kind in named)
            raise TypeError(f"{name} must be {wanted}, got {describe(value)}")


@cache
def _declared(record: type) -> dict[str, tuple[Any, ...]]:
    """Return the types of each field, as `isinstance` takes them."""
    hints = get_type_hints(record)
    found = {field.name: _outermost(hints[field.name]) for field in fields(record)}
    return {name: kinds for name, kinds in found.items() if kinds}


def _outermost(hint: Any) -> tuple[Any, ...]:
    """Return the types that a hint allows, without their parameters; none if it can't be told."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [_outermost(part) for part in get_args(hint)]
        return tuple(dict.fromkeys(kind for part in parts for kind in part)) if all(parts) else ()
    kind = get_origin(hint) or hint
    if getattr(kind, "_is_protocol", False):
        return (Callable,) if "__call__" in vars(kind) else ()
    if kind is Any or not isinstance(kind, type):
        return ()
    return (int, float) if kind is float else (kind,)
