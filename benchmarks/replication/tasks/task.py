"""What a task is: problems, a judge, and a teacher for the warm-up."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from igrpo_algo.cli.demo.chain import TEMPLATE
from igrpo_algo.drafts.text import DraftTemplate, splice_prompt
from igrpo_algo.thinking import strip_thinking

Message = dict[str, str]


class Problem(Protocol):
    @property
    def question(self) -> str: ...

    def __hash__(self) -> int: ...


def ask(problem: Problem) -> list[Message]:
    """Give the chat prompt of a problem."""
    return [{"role": "user", "content": problem.question}]


@dataclass(frozen=True)
class Task:
    """A task, for models that are trained from scratch within minutes or for pretrained ones.

    Attributes:
        title: What it is, in a line.
        words: What the tokenizer knows.
        answer_tokens: Most tokens of an answer, its end included.
        draw: Draws a problem.
        score: Judges an answer: 1 is right, what lies between 0 and 1 is partly right.
        teach: Writes an answer of the warm-up's teacher, who errs, for a problem and a draft.
        weights: Warmed weights that are there already.
        ask: Writes the chat prompt of a problem.
        template: The words around a draft.
        thinks: Whether answers think first. The warm-up then shows half of its drafts without
            their thinking and half of them whole, so that a model knows both.
    """

    title: str
    words: tuple[str, ...]
    answer_tokens: int
    draw: Callable[[random.Random], Any]
    score: Callable[[str, Any], float]
    teach: Callable[[Any, str | None, random.Random], str]
    weights: Path | None = None
    ask: Callable[[Any], list[Message]] = ask
    template: DraftTemplate = TEMPLATE
    thinks: bool = False

    def reward(
        self, completions: Sequence[list[Message]], problem: Sequence[Any], **columns: object
    ) -> list[float]:
        """Score chat completions as TRL calls rewards."""
        return [
            self.score(completion[-1]["content"], each)
            for completion, each in zip(completions, problem, strict=True)
        ]

    def draw_many(
        self, count: int, seed: int | str, exclude: frozenset[Any] = frozenset()
    ) -> list[Any]:
        """Draw `count` different problems, none of them in `exclude`."""
        rng, drawn = random.Random(seed), dict[Any, None]()
        while len(drawn) < count:
            if (problem := self.draw(rng)) not in exclude:
                drawn[problem] = None
        return list(drawn)

    def converse(
        self, rng: random.Random, *, exclude: frozenset[Any], draft_share: float
    ) -> list[Message]:
        """Draw a problem with the teacher's answer, and now and then with a draft of its own."""
        problem = self.draw(rng)
        while problem in exclude:
            problem = self.draw(rng)
        prompt, draft = self.ask(problem), None
        if rng.random() < draft_share:
            draft = self.teach(problem, None, rng)
            if self.thinks and rng.random() < 0.5:
                draft = strip_thinking(draft)
            prompt = splice_prompt(prompt, draft, template=self.template)
        return [*prompt, {"role": "assistant", "content": self.teach(problem, draft, rng)}]
