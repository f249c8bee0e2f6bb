"""The tasks, each in a file of its own."""

from .chain import CHAIN
from .packing import PACKING
from .signs import SIGNS
from .task import Task, ask

TASKS: dict[str, Task] = {"chain": CHAIN, "signs": SIGNS, "packing": PACKING}

__all__ = ["TASKS", "Task", "ask"]
