"""For a pretrained model: word problems of two to six operations, worked out step by step.

    question   Tom has 4 bags with 6 apples in each bag. He finds 5 more. He gives 8 away. How many
               apples does Tom have?
    answer     The bags hold 4 * 6 = 24 apples. With 5 more: 24 + 5 = 29. Without 8: 29 - 8 = 21.
               The answer is 21.

The number of operations is the level. The pilot's problems had two, and after 40 steps of GRPO nine
of ten were right: they can show a collapse, but no gain. A slip in one of six steps spoils the
answer; a draft shows every step, so that a slip can be found. The task "words" mixes the levels:
the lowest, half of the problems, gives a weak model something to learn from, the others room above.

Worked examples stand before each question, the same for both stages; one of them corrects a draft.
"""

import random
import re
from dataclasses import dataclass
from functools import lru_cache, partial

from igrpo_algo.drafts.text import DEFAULT_TEMPLATE, DraftTemplate, splice_prompt

from .task import Message, Task

PEOPLE = {"Tom": "He", "Anna": "She", "Ben": "He", "Mia": "She", "Sam": "He", "Lily": "She"}
THINGS = ("apples", "books", "coins", "pens", "cards", "stamps", "shells", "marbles")
LEVELS = (2, 3, 4, 5, 6)
MIX = (2, 2, 2, 2, 3, 4, 5, 6)  # of the task "words": level 3 is out of SmolLM2's reach at first
MOST = 200  # a number never grows beyond
LARGEST = 19  # that is added or taken away
SAID = {"+": "With {} more:", "-": "Without {}:", "*": "{} times as many:", "/": "Shared by {}:"}
TOKENS_PER_STEP, TOKENS_OF_THE_END = 20, 16
EXAMPLES_SEED = 5
NUMBER = re.compile(r"-?\d+")


@dataclass(frozen=True)
class WordProblem:
    """Bags of things, and what happens to them.

    Attributes:
        person: Who has them.
        thing: What they are.
        bags: How many bags.
        each: How many in each.
        steps: What follows: "+", "-", "*" or "/", and by how many.
    """

    person: str
    thing: str
    bags: int
    each: int
    steps: tuple[tuple[str, int], ...]

    @property
    def question(self) -> str:
        """The problem in words."""
        told = [f"{self.person} has {self.bags} bags with {self.each} {self.thing} in each bag."]
        told += [_tell(PEOPLE[self.person], *step) for step in self.steps]
        return " ".join([*told, f"How many {self.thing} does {self.person} have?"])

    @property
    def values(self) -> list[int]:
        """What the person has after each operation.

        Examples:
            >>> WordProblem("Tom", "apples", 4, 6, (("+", 5), ("-", 8), ("/", 3))).values
            [24, 29, 21, 7]
        """
        values = [self.bags * self.each]
        for sign, number in self.steps:
            values.append(_apply(values[-1], sign, number))
        return values


def _apply(value: int, sign: str, number: int) -> int:
    return {"+": value + number, "-": value - number, "*": value * number, "/": value // number}[
        sign
    ]


def _tell(pronoun: str, sign: str, number: int) -> str:
    if sign == "*":
        return f"Then the number of them grows {number} times."
    if sign == "/":
        return f"{pronoun} shares them equally among {number} people, and is one of them."
    return f"{pronoun} finds {number} more." if sign == "+" else f"{pronoun} gives {number} away."


def draw(rng: random.Random, levels: tuple[int, ...] = LEVELS) -> WordProblem:
    """Draw a problem of one of the levels; every number on the way is whole and above 0."""
    person, thing = rng.choice(list(PEOPLE)), rng.choice(THINGS)
    bags, each = rng.randint(2, 9), rng.randint(2, 9)
    value, steps = bags * each, []
    for _ in range(rng.choice(levels) - 1):
        step = rng.choice(_possible(value, rng))
        value = _apply(value, *step)
        steps.append(step)
    return WordProblem(person, thing, bags, each, tuple(steps))


def _possible(value: int, rng: random.Random) -> list[tuple[str, int]]:
    """Give a step of each kind that is possible now."""
    steps = [("+", rng.randint(1, LARGEST))] if value + LARGEST <= MOST else []
    steps += [("-", rng.randint(1, min(value - 1, LARGEST)))] if value > 1 else []
    steps += [("*", number) for number in (2, 3) if value * number <= MOST][:1]
    return steps + [("/", number) for number in (4, 3, 2) if value % number == 0][:1]


def write_answer(problem: WordProblem, slip: int | None = None) -> str:
    """Work a problem out; with `slip`, that operation is off by ten and the others go on from it.

    Examples:
        >>> write_answer(WordProblem("Tom", "apples", 4, 6, (("+", 5),)))
        'The bags hold 4 * 6 = 24 apples. With 5 more: 24 + 5 = 29. The answer is 29.'
        >>> write_answer(WordProblem("Tom", "apples", 4, 6, (("+", 5),)), slip=0)
        'The bags hold 4 * 6 = 34 apples. With 5 more: 34 + 5 = 39. The answer is 39.'
    """
    value = problem.bags * problem.each + (10 if slip == 0 else 0)
    lines = [f"The bags hold {problem.bags} * {problem.each} = {value} {problem.thing}."]
    for index, (sign, number) in enumerate(problem.steps, 1):
        after = _apply(value, sign, number) + (10 if index == slip else 0)
        lines.append(f"{SAID[sign].format(number)} {value} {sign} {number} = {after}.")
        value = after
    return " ".join([*lines, f"The answer is {value}."])


def score(text: str, problem: WordProblem) -> float:
    """Give 1 where the last number of the text is the answer.

    Examples:
        >>> problem = WordProblem("Tom", "apples", 4, 6, (("+", 5),))
        >>> score("24 + 5 = 29. The answer is 29.", problem), score("29 or 28", problem)
        (1.0, 0.0)
    """
    numbers = NUMBER.findall(text.replace(",", ""))
    return float(bool(numbers) and numbers[-1] == str(problem.values[-1]))


@lru_cache
def worked_examples(
    level: int, template: DraftTemplate | None = DEFAULT_TEMPLATE
) -> tuple[Message, ...]:
    """Give three problems of a level with their answers, the same for every prompt.

    With a template the last one shows a draft with a slip, which its answer corrects.
    """
    rng = random.Random(EXAMPLES_SEED)
    messages: list[Message] = []
    for drafted in (False, False, template is not None):
        problem = draw(rng, (level,))
        asked = [{"role": "user", "content": problem.question}]
        if drafted and template is not None:
            wrong = write_answer(problem, slip=len(problem.steps) // 2)
            asked = splice_prompt(asked, wrong, template=template)
        messages += [*asked, {"role": "assistant", "content": write_answer(problem)}]
    return tuple(messages)


def ask(problem: WordProblem, template: DraftTemplate | None = DEFAULT_TEMPLATE) -> list[Message]:
    """Give the chat prompt of a problem: worked examples of its level, then the question."""
    examples = worked_examples(1 + len(problem.steps), template)
    return [*examples, {"role": "user", "content": problem.question}]


def teach(problem: WordProblem, draft: str | None, rng: random.Random) -> str:
    """Answer with a slip in two of five problems, whatever the draft."""
    slip = rng.randrange(len(problem.values)) if rng.random() < 0.4 else None
    return write_answer(problem, slip)


def make_task(levels: tuple[int, ...]) -> Task:
    """Make the task of these levels."""
    told = " ".join(map(str, sorted({*levels})))
    return Task(
        f"word problems of {told} operations, for a pretrained model",
        (),
        TOKENS_PER_STEP * max(levels) + TOKENS_OF_THE_END,
        partial(draw, levels=levels),
        score,
        teach,
        ask=ask,
        template=DEFAULT_TEMPLATE,
    )


WORD_TASKS = {"words": make_task(MIX)} | {f"words-{level}": make_task((level,)) for level in LEVELS}
