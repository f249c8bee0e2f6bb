"""The tasks, each in a file of its own."""

from .chain import CHAIN
from .packing import PACKING
from .signs import SIGNS
from .task import Task, ask
from .thinking import THINKING
from .words import WORD_TASKS

TASKS: dict[str, Task] = {
    "chain": CHAIN,
    "signs": SIGNS,
    "packing": PACKING,
    "thinking": THINKING,
}
"""For models that are trained from scratch."""

ALL_TASKS = TASKS | WORD_TASKS

__all__ = ["ALL_TASKS", "TASKS", "WORD_TASKS", "Task", "ask"]
