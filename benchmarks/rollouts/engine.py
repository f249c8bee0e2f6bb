"""A simulated engine with continuous batching: a sampler in the time of its event loop.

Running sequences advance together, one token per step. A step of b sequences takes `Costs.step(b)`
seconds, and prompt tokens that no cache holds delay it by `Costs.prefill` each. Sequences beyond
`slots` wait in order of arrival, as in vLLM. Prompts are token ids: a question's are all its own
number, a draft's are all the draft's own.
"""

import asyncio
import heapq
import math
from bisect import bisect_left
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncGenerator, Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from igrpo_algo import Completion


@dataclass(frozen=True)
class Costs:
    """What an engine's work takes, in seconds.

    Attributes:
        batches: Batch sizes at which a step is known, ascending; straight lines elsewhere.
        steps: Time of a decode step at each.
        prefill: Time of a prompt token that the prefix cache does not hold.
        request: Time of a sequence that joins, whatever its length.
    """

    batches: tuple[int, ...]
    steps: tuple[float, ...]
    prefill: float
    request: float = 0.0

    def step(self, batch: int) -> float:
        right = min(max(bisect_left(self.batches, batch), 1), len(self.batches) - 1)
        x0, x1 = self.batches[right - 1 : right + 1]
        y0, y1 = self.steps[right - 1 : right + 1]
        return y0 + (y1 - y0) * (batch - x0) / (x1 - x0)


@dataclass(frozen=True)
class Workload:
    """The answers that P prompts would get, independent of when they are asked.

    Attributes:
        question: Tokens of a question.
        lengths: Tokens of the completions of each prompt, in the order in which they are begun.
        success: Whether each is right.
        num_drafts: From which one on the lengths are those of Stage 2.
    """

    question: int
    lengths: Sequence[Sequence[int]]
    success: Sequence[Sequence[bool]]
    num_drafts: int

    @property
    def prompts(self) -> list[list[int]]:
        return [[index] * self.question for index in range(len(self.lengths))]

    def refines(self, prompt: list[int]) -> bool:
        return len(prompt) > self.question


class Draw(NamedTuple):
    """A completion that will be drawn: its prompt, its number there, its length and its text."""

    index: int
    number: int
    length: int
    text: str


class Dealer:
    """Hands out a workload's completions in the order in which they are begun."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self._begun: Counter[tuple[int, bool]] = Counter()

    def __call__(self, prompt: list[int]) -> Draw:
        index, refines = prompt[0], self.workload.refines(prompt)
        number = self._begun[index, refines] + refines * self.workload.num_drafts
        self._begun[index, refines] += 1
        text = str(int(self.workload.success[index][number]))
        return Draw(index, number, self.workload.lengths[index][number], text)


class PrefixCache:
    """Pieces of text whose keys and values are kept, least recently used ones dropped first."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.used = capacity, 0
        self._held: OrderedDict[Hashable, int] = OrderedDict()

    def holds(self, piece: Hashable) -> bool:
        return piece in self._held

    def put(self, piece: Hashable, tokens: int) -> None:
        self.used += tokens - self._held.pop(piece, 0)
        self._held[piece] = tokens
        while self.used > self.capacity:
            self.used -= self._held.popitem(last=False)[1]


@dataclass(order=True)
class _Sequence:
    end: float  # number of the step with which it is done
    draw: Draw
    prompt: list[int] = field(compare=False)
    done: "asyncio.Future[Completion]" = field(compare=False)


class SimulatedEngine:
    """A sampler with `sample_one` and `stream_one`, whose work takes the loop's seconds.

    Args:
        costs: What its work takes.
        slots: Most sequences that run at a time.
        workload: Lengths and rewards of what it draws.
        cache_tokens: Tokens of finished text that the prefix cache keeps.
        block: Tokens of a block of it; only whole ones count, and never a prompt's last token.

    Attributes:
        tokens: Tokens drawn, those of cancelled sequences included.
        prompt_tokens: Tokens of all prompts.
        cached_tokens: Those of them that needed no prefill.
        steps: Steps done.
        refined: The same two numbers of Stage 2 alone.
    """

    def __init__(
        self,
        costs: Costs,
        slots: int,
        workload: Workload,
        cache_tokens: float = math.inf,
        block: int = 16,
    ) -> None:
        self.costs, self.slots, self.workload = costs, slots, workload
        self.cache, self.block = PrefixCache(cache_tokens), block
        self.refined = (0, 0)
        self.tokens = self.prompt_tokens = self.cached_tokens = 0
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._deal = Dealer(workload)
        self.steps = self._at = self._debt = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def sample_one(
        self, prompt: list[int], n: int, *, seed: int | None = None
    ) -> list[Completion]:
        drawn = {position: c async for position, c in self.stream_one(prompt, n, seed=seed)}
        return [drawn[position] for position in range(n)]

    async def stream_one(
        self, prompt: list[int], n: int, *, seed: int | None = None
    ) -> AsyncGenerator[tuple[int, Completion], None]:
        loop = asyncio.get_running_loop()
        ready: asyncio.Queue[tuple[int, Completion]] = asyncio.Queue()
        asked = []
        for position in range(n):
            asked.append(_Sequence(0, self._deal(prompt), prompt, loop.create_future()))
            asked[-1].done.add_done_callback(
                lambda done, p=position: done.cancelled() or ready.put_nowait((p, done.result()))
            )
        self._waiting.extend(asked)
        self._advance()
        try:
            for _ in range(n):
                yield await ready.get()
        finally:
            self._cancel([sequence for sequence in asked if not sequence.done.done()])

    def _cancel(self, gone: list[_Sequence]) -> None:
        if not gone:
            return
        self._account()
        for sequence in gone:
            sequence.done.cancel()
            if sequence in self._waiting:
                self._waiting.remove(sequence)
            else:
                self._running.remove(sequence)
                self.tokens += int(sequence.draw.length - (sequence.end - self.steps))
        heapq.heapify(self._running)
        self._advance()

    def _account(self) -> None:
        """Move the running sequences on to the present."""
        now = asyncio.get_running_loop().time()
        elapsed = now - self._at
        self._at = now
        paid = min(self._debt, elapsed)
        self._debt -= paid
        if self._running:
            self.steps += (elapsed - paid) / self.costs.step(len(self._running))

    def _advance(self) -> None:
        """Finish requests that are done, admit waiting ones, return when the next is done."""
        self._account()
        while self._running and self._running[0].end <= self.steps + 1e-6:
            self._finish(heapq.heappop(self._running))
        while self._waiting and len(self._running) < self.slots:
            self._admit(self._waiting.popleft())
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            steps = max(self._running[0].end - self.steps, 0.0)
            wait = self._debt + steps * self.costs.step(len(self._running))
            self._timer = asyncio.get_running_loop().call_later(wait, self._advance)

    def _admit(self, sequence: _Sequence) -> None:
        prompt, draw, workload = sequence.prompt, sequence.draw, self.workload
        pieces: dict[Hashable, int] = {draw.index: workload.question}
        if workload.refines(prompt):
            pieces[draw.index, prompt[-1]] = len(prompt) - workload.question
        known = 0
        for piece, tokens in pieces.items():
            known += tokens * self.cache.holds(piece)
            self.cache.put(piece, tokens)
        known = min(known, len(prompt) - 1) // self.block * self.block
        self.prompt_tokens += len(prompt)
        self.cached_tokens += known
        if workload.refines(prompt):
            self.refined = self.refined[0] + len(prompt), self.refined[1] + known
        self._debt += self.costs.request + (len(prompt) - known) * self.costs.prefill
        sequence.end = math.ceil(self.steps - 1e-6) + draw.length
        heapq.heappush(self._running, sequence)

    def _finish(self, sequence: _Sequence) -> None:
        draw = sequence.draw
        self.tokens += draw.length
        self.cache.put((draw.index, draw.number), draw.length)
        sequence.done.set_result(Completion([draw.number] * draw.length, draw.text))


class WholeGroups:
    """A sampler that hands a group out when its longest completion is done, for comparison."""

    def __init__(self, engine: SimulatedEngine) -> None:
        self.sample_one = engine.sample_one
