"""Copying is possible: the demo's chain, where a right draft is the answer, and nothing but it.

    question   7 +5 *3 -4 *9 +2 mod 16
    answer     12 4 0 0 2

A wrong draft says little: which of its values is wrong, the model must know by itself.
"""

import random

from igrpo_algo.cli.demo import chain
from igrpo_algo.cli.demo.model import CHAIN_WORDS
from igrpo_algo.cli.demo.workers import SHIPPED_WEIGHTS

from .task import Task


def score(text: str, problem: chain.Problem) -> float:
    """Give 1 for all five values, and nothing for less."""
    return float(chain.is_correct(text, problem.answer))


def teach(problem: chain.Problem, draft: str | None, rng: random.Random) -> str:
    """Answer as the demo's teacher does, whatever the draft."""
    return chain.Teacher().answer(problem, rng)


CHAIN = Task(
    "five operations modulo 16: a right draft can be copied",
    CHAIN_WORDS,
    chain.NUM_OPERATIONS + 1,
    chain.draw_problem,
    score,
    teach,
    SHIPPED_WEIGHTS,
)
