"""Thinking first: the demo's chain, with all values but the last, the answer, as thinking.

    question   7 +5 *3 -4 *9 +2 mod 16
    answer     <think>12 4 0 0</think>2

Only what follows the thinking is judged. Stripped of it, a right draft is one number that can be
copied, with thoughts or without; a wrong one says nothing of where it went wrong. With its thinking
kept, a draft is the chain's: every value can be looked at.
"""

import random

from igrpo_algo.cli.demo import chain
from igrpo_algo.cli.demo.model import CHAIN_WORDS
from igrpo_algo.thinking import THINKING_MARKS, text_after_thinking

from .task import Task

OPEN, CLOSE = THINKING_MARKS[0]
FORESIGHT = 0.5  # how often the teacher looks at a draft


def answer_of(text: str) -> list[int] | None:
    """Give the values behind the thinking; None where there are none.

    Examples:
        >>> answer_of("<think>12 4 0 0</think>2"), answer_of("2"), answer_of("<think>12 4")
        ([2], [2], None)
    """
    return chain.read_values(text_after_thinking(text) or "")


def score(text: str, problem: chain.Problem) -> float:
    """Give 1 for the last value and nothing else behind the thinking."""
    return float(answer_of(text) == chain.read_values(problem.answer)[-1:])


def teach(problem: chain.Problem, draft: str | None, rng: random.Random) -> str:
    """Think as the demo's teacher answers; or think twice, and say what agrees with a draft."""
    looks = draft is not None and rng.random() < FORESIGHT
    texts = [think(problem, rng) for _ in range(2 if looks else 1)]
    agreeing = (text for text in texts if looks and answer_of(text) == answer_of(draft or ""))
    return next(agreeing, texts[0])


def think(problem: chain.Problem, rng: random.Random) -> str:
    """Write the demo's teacher's values, all but the last as thinking."""
    values, _, last = chain.Teacher().answer(problem, rng).rpartition(" ")
    return f"{OPEN}{values}{CLOSE}{last}"


THINKING = Task(
    "five operations modulo 16, thought through first: a right draft's number can be copied",
    (*CHAIN_WORDS, OPEN, CLOSE),
    chain.NUM_OPERATIONS + 3,
    chain.draw_problem,
    score,
    teach,
    thinks=True,
)
