"""Search with a checkable near miss: add or subtract each number, so that the last value is right.

    question   7 2 3 1 3 1 to 1            (7, then +-2 +-3 +-1 +-3 +-1, modulo 8)
    answer     1 6 7 2 1

A greedy answer ends beside its target. As a draft it tells how far beside, and turning the sign of
one number may mend it: it helps, and gives nothing away. Modulo 12, with numbers up to 5, the short
warm-up did not teach the sums, and 80 steps moved GRPO by less than two points.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from igrpo_algo.cli.demo.chain import read_values, write_values
from igrpo_algo.cli.demo.model import write_words

from .task import Task

MODULUS, NUMBERS, LARGEST = 8, 5, 3
SLIP = 0.02  # how often the teacher writes any value in the place of a sum
FORESIGHT = 0.5  # how often the teacher looks ahead, and how often it looks at a draft


@dataclass(frozen=True)
class Signs:
    """A start, the numbers to add or subtract, and where to arrive."""

    start: int
    numbers: tuple[int, ...]
    target: int

    @property
    def question(self) -> str:
        return f"{self.start} {' '.join(map(str, self.numbers))} to {self.target}"


def draw(rng: random.Random) -> Signs:
    """Draw a problem that can be solved."""
    start = rng.randrange(MODULUS)
    numbers = tuple(rng.randint(1, LARGEST) for _ in range(NUMBERS))
    signs = [rng.choice((1, -1)) for _ in numbers]
    return Signs(start, numbers, walk(start, numbers, signs)[-1])


def walk(start: int, numbers: Sequence[int], signs: Sequence[int]) -> list[int]:
    """Give the values on the way.

    Examples:
        >>> walk(7, (2, 3, 1), (1, -1, 1))
        [1, 6, 7]
    """
    values, value = [], start
    for number, sign in zip(numbers, signs, strict=True):
        value = (value + sign * number) % MODULUS
        values.append(value)
    return values


def read_signs(text: str, problem: Signs) -> list[int] | None:
    """Give the sign of each step that an answer takes; None if it takes any other step.

    Examples:
        >>> problem = Signs(7, (2, 3, 1), 7)
        >>> read_signs("1 6 7", problem), read_signs("1 5 6", problem)
        ([1, -1, 1], None)
    """
    values = read_values(text)
    if values is None or len(values) != len(problem.numbers):
        return None
    signs = []
    for before, number, after in zip(
        [problem.start, *values], problem.numbers, values, strict=False
    ):
        steps = {(before + number) % MODULUS: 1, (before - number) % MODULUS: -1}
        if after not in steps:
            return None
        signs.append(steps[after])
    return signs


def score(text: str, problem: Signs) -> float:
    """Give 1 for right steps that end at the target."""
    arrived = read_signs(text, problem) is not None and read_values(text)
    return float(bool(arrived) and arrived[-1] == problem.target)


def mend(problem: Signs, signs: Sequence[int]) -> list[int] | None:
    """Turn at most one sign so that the walk arrives; None if no single one does it."""
    turned = [[-s if i == k else s for i, s in enumerate(signs)] for k in range(len(signs))]
    for candidate in [list(signs), *turned]:
        if walk(problem.start, problem.numbers, candidate)[-1] == problem.target:
            return candidate
    return None


def teach(problem: Signs, draft: str | None, rng: random.Random) -> str:
    """Answer with any signs, the last now and then the one that arrives; or mend the draft."""
    signs = [rng.choice((1, -1)) for _ in problem.numbers]
    if rng.random() < FORESIGHT:
        if draft is None:
            last = [[*signs[:-1], sign] for sign in (signs[-1], -signs[-1])]
            ends = [walk(problem.start, problem.numbers, each)[-1] for each in last]
            signs = last[ends.index(problem.target)] if problem.target in ends else signs
        elif (drafted := read_signs(draft, problem)) is not None:
            signs = mend(problem, drafted) or signs
    values = walk(problem.start, problem.numbers, signs)
    return write_values([rng.randrange(MODULUS) if rng.random() < SLIP else v for v in values])


SIGNS = Task(
    "add or subtract five numbers to arrive at a target: a near miss helps",
    write_words(MODULUS, " to"),
    NUMBERS + 1,
    draw,
    score,
    teach,
)
