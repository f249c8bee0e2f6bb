"""Find a reward by the name that a user typed."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from igrpo_kernels.checks import check_callable, describe

from .formatting import format_reward, opened_format_reward
from .matching import exact_match_reward, math_reward

BUILT_IN_REWARDS: Mapping[str, Callable[..., Any]] = {
    "math": math_reward,
    "exact": exact_match_reward,
    "format": format_reward,
    "format-opened": opened_format_reward,
}


def load_reward(name: str) -> Callable[..., Any]:
    """Return a built-in reward by its name, or any Python callable by `module:function`.

    The module is imported as `python -m` imports it: from the current directory too. The name runs
    code, so take it from the user only, never from a model or a data set.

    Args:
        name: "math", "exact", "format", "format-opened", or "package.module:function".

    Returns:
        The callable.

    Raises:
        ImportError: The module cannot be imported.
        TypeError: The name is that of something that can't be called.
        ValueError: The name is not built in and has no colon, or the module has no such attribute.

    Examples:
        >>> load_reward("format") is format_reward
        True
        >>> load_reward("igrpo_algo.rewards:math_reward").__name__
        'math_reward'
    """
    if not isinstance(name, str):
        raise TypeError(f"reward must be a string, got {describe(name)}")
    if name in BUILT_IN_REWARDS:
        return BUILT_IN_REWARDS[name]
    module_name, colon, path = name.partition(":")
    if not (module_name and colon and path):
        raise ValueError(
            f"reward must be one of {', '.join(BUILT_IN_REWARDS)} or module:function, got {name!r}"
        )
    target: Any = _import_from_here(module_name)
    for part in path.split("."):
        if not hasattr(target, part):
            raise ValueError(f"reward {name!r}: {module_name} has no attribute {path!r}")
        target = getattr(target, part)
    return check_callable(f"reward {name!r}", target)


def _import_from_here(module_name: str) -> object:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"reward module {module_name!r} could not be imported from {here}: {error}"
        ) from error
