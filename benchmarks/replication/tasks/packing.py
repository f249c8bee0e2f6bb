"""A graded reward: take or leave each of six weights, and come as near to a limit as one can.

    question   3 7 2 9 4 6 in 17
    answer     3 3 5 5 9 15                (the load after each: took 3, 2, 4 and 6)

The reward is the load as a share of the best possible one; too heavy a load is worth nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from igrpo_algo.cli.demo.chain import read_values, write_values
from igrpo_algo.cli.demo.model import write_words

from .task import Task

WEIGHTS, HEAVIEST = 6, 9
SLIP = 0.02  # how often the teacher writes any load in the place of a sum
FORESIGHT = 0.5  # how often the teacher takes whatever still fits, or looks at a draft


@dataclass(frozen=True)
class Packing:
    """The weights, in their order, and the limit."""

    weights: tuple[int, ...]
    limit: int

    @property
    def question(self) -> str:
        return f"{' '.join(map(str, self.weights))} in {self.limit}"


def draw(rng: random.Random) -> Packing:
    """Draw weights, and a limit that some of them fit in."""
    weights = tuple(rng.randint(1, HEAVIEST) for _ in range(WEIGHTS))
    return Packing(weights, rng.randint(max(weights), 2 * sum(weights) // 3 + 1))


@lru_cache(maxsize=1 << 16)
def best_load(problem: Packing) -> int:
    """Give the heaviest load within the limit.

    Examples:
        >>> best_load(Packing((5, 4, 3), 8)), best_load(Packing((5, 4), 8))
        (8, 5)
    """
    loads = {0}
    for weight in problem.weights:
        loads |= {load + weight for load in loads if load + weight <= problem.limit}
    return max(loads)


def score(text: str, problem: Packing) -> float:
    """Give the load's share of the best one; 0 if it is too heavy or a step is neither."""
    loads = read_values(text)
    if loads is None or len(loads) != len(problem.weights) or loads[-1] > problem.limit:
        return 0.0
    before = [0, *loads[:-1]]
    taken = [after - load for load, after in zip(before, loads, strict=True)]
    if any(step not in (0, weight) for step, weight in zip(taken, problem.weights, strict=True)):
        return 0.0
    return loads[-1] / best_load(problem)


def pack(problem: Packing, wanted: Sequence[bool]) -> list[int]:
    """Take in turn what is wanted and still fits; give the load after each weight."""
    loads, load = [], 0
    for weight, want in zip(problem.weights, wanted, strict=True):
        load += weight if want and load + weight <= problem.limit else 0
        loads.append(load)
    return loads


def teach(problem: Packing, draft: str | None, rng: random.Random) -> str:
    """Take each weight with even odds, or greedily; or exchange one weight of a draft."""
    looks = rng.random() < FORESIGHT
    wanted = [rng.random() < (0.8 if looks else 0.5) for _ in problem.weights]
    loads = pack(problem, wanted)
    drafted = read_values(draft) if draft is not None and looks else None
    if drafted is not None and len(drafted) == len(problem.weights):
        kept = [after != load for load, after in zip([0, *drafted[:-1]], drafted, strict=True)]
        one_changed = [[w != (i == k) for i, w in enumerate(kept)] for k in range(len(kept))]
        loads = max((pack(problem, each) for each in [kept, *one_changed]), key=lambda x: x[-1])
    heaviest = sum(problem.weights)
    return write_values([rng.randint(0, heaviest) if rng.random() < SLIP else v for v in loads])


PACKING = Task(
    "take or leave six weights, near to a limit: the reward is graded",
    write_words(WEIGHTS * HEAVIEST, " in"),
    WEIGHTS + 1,
    draw,
    score,
    teach,
)
