"""A verifiable task: a chain of five operations modulo 16, every intermediate value written out.

    question   7 +5 *3 -4 *9 +2 mod 16
    answer     12 4 0 0 2

The 16 values and 23 operations make 368 facts. A teacher that errs on a fixed 40 % of them writes
the warm-up's answers, so that the warmed model is right now and then and has something to learn.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass

from ...drafts.text import DraftTemplate

MODULUS = 16
NUM_OPERATIONS = 5
HELD_OUT_SEED = 0
OPERATIONS = (
    *(f"+{b}" for b in range(1, 9)),
    *(f"-{b}" for b in range(1, 9)),
    *(f"*{b}" for b in range(3, 16, 2)),  # odd factors only: each operation permutes the values
)
TEMPLATE = DraftTemplate(before="\ndraft:\n", after="\nrefine:")
"""The words around a draft: few, since the model is small and knows no others."""


def apply_operation(value: int, operation: str) -> int:
    """Return `value` after one operation, modulo 16.

    Examples:
        >>> apply_operation(12, "*3")
        4
    """
    sign, operand = operation[0], int(operation[1:])
    results = {"+": value + operand, "-": value - operand, "*": value * operand}
    return results[sign] % MODULUS


@dataclass(frozen=True)
class Problem:
    """A start value and the operations to apply to it, left to right.

    Examples:
        >>> problem = Problem(7, ("+5", "*3", "-4", "*9", "+2"))
        >>> problem.question
        '7 +5 *3 -4 *9 +2 mod 16'
        >>> problem.answer
        '12 4 0 0 2'
    """

    start: int
    operations: tuple[str, ...]

    @property
    def question(self) -> str:
        """The text that the user message holds."""
        return f"{self.start} {' '.join(self.operations)} mod {MODULUS}"

    @property
    def answer(self) -> str:
        """All intermediate values, the last one the result."""
        value, values = self.start, []
        for operation in self.operations:
            value = apply_operation(value, operation)
            values.append(value)
        return write_values(values)


def write_values(values: list[int]) -> str:
    """Return the values as an answer writes them."""
    return " ".join(map(str, values))


def read_values(text: str) -> list[int] | None:
    """Return the values that a completion wrote, or None if it is not a list of numbers.

    Examples:
        >>> read_values("12 4 0"), read_values("12 mod"), read_values("")
        ([12, 4, 0], None, None)
    """
    words = text.split()
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        return None
    return [int(word) for word in words]


def is_correct(text: str, answer: str) -> bool:
    """Say whether a completion wrote every value of the answer, and nothing else.

    Examples:
        >>> is_correct("12 4 0 0 2", "12 4 0 0 2"), is_correct("2", "12 4 0 0 2")
        (True, False)
    """
    values = read_values(text)
    return values is not None and values == read_values(answer)


def chain_reward(
    completions: list[list[dict[str, str]]], answer: list[str], **columns: object
) -> list[float]:
    """Return 1.0 where a chat completion is correct and 0.0 elsewhere, as TRL calls rewards."""
    return [
        float(is_correct(completion[-1]["content"], known))
        for completion, known in zip(completions, answer, strict=True)
    ]


def draw_problem(rng: random.Random) -> Problem:
    """Draw one problem uniformly."""
    return Problem(rng.randrange(MODULUS), tuple(rng.choices(OPERATIONS, k=NUM_OPERATIONS)))


def draw_problems(
    count: int, *, seed: int, exclude: frozenset[Problem] = frozenset()
) -> list[Problem]:
    """Draw `count` different problems, none of them in `exclude`.

    Examples:
        >>> held_out = draw_problems(100, seed=0)
        >>> training = draw_problems(1000, seed=1, exclude=frozenset(held_out))
        >>> len(set(training)), set(training) & set(held_out)
        (1000, set())
    """
    rng = random.Random(seed)
    drawn: dict[Problem, None] = {}
    while len(drawn) < count:
        problem = draw_problem(rng)
        if problem not in exclude:
            drawn[problem] = None
    return list(drawn)


def held_out_problems(count: int = 1000) -> list[Problem]:
    """Return the problems that neither the warm-up nor any run trains on."""
    return draw_problems(count, seed=HELD_OUT_SEED)


@dataclass(frozen=True)
class Teacher:
    """Writes answers, with errors: on a fixed share of the facts it is mostly wrong.

    A weak fact comes out right with probability `weak_accuracy`; of its errors `stuck_share` repeat
    one fixed wrong value, the rest are uniform. The other facts come out right with probability
    `strong_accuracy`. After an error the chain continues from the wrong value.
    """

    seed: int = 0
    weak_share: float = 0.4
    weak_accuracy: float = 0.35
    strong_accuracy: float = 0.97
    stuck_share: float = 0.6

    def answer(self, problem: Problem, rng: random.Random) -> str:
        """Return the teacher's answer to a problem; `rng` decides where it errs."""
        return write_values(list(self._values(problem, rng)))

    def _values(self, problem: Problem, rng: random.Random) -> Iterator[int]:
        value = problem.start
        for operation in problem.operations:
            value = self._next_value(value, operation, rng)
            yield value

    def _next_value(self, value: int, operation: str, rng: random.Random) -> int:
        fact = random.Random(f"{self.seed} {value} {operation}")
        weak = fact.random() < self.weak_share
        right = apply_operation(value, operation)
        if rng.random() < (self.weak_accuracy if weak else self.strong_accuracy):
            return right
        error = fact if weak and rng.random() < self.stuck_share else rng
        return (right + error.randrange(1, MODULUS)) % MODULUS


def ask(problem: Problem) -> list[dict[str, str]]:
    """Return the chat prompt of a problem."""
    return [{"role": "user", "content": problem.question}]
