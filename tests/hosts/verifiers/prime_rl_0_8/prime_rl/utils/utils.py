# Copied word for word from src/prime_rl/utils/utils.py of prime-rl 0.8.0 at 559b44772e, Apache-2.0
# (github.com/PrimeIntellect-ai/prime-rl): one function.
import importlib
from typing import Any


def import_object(dotted_path: str) -> Any:
    """Import an object from a dotted path like 'my_module.submodule.MyClass'."""
    module_path, _, name = dotted_path.rpartition(".")
    module = importlib.import_module(module_path)
    return getattr(module, name)
