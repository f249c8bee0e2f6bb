"""Single flight: many callers ask for the same result, and one call makes it for all.

For trainers that call once per sample (verl, OpenRLHF, slime): the first call of a group runs
Stage 1, and its siblings await the same draft.
"""

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from igrpo_kernels.checks import check_count

Result = TypeVar("Result")


@dataclass(eq=False)
class _Flight(Generic[Result]):
    task: asyncio.Task[Result] = field(init=False)
    waiting: int = 0
    waits_for: list["_Flight[Any]"] = field(default_factory=list)

    def leads_to(self, other: "_Flight[Any] | None") -> bool:
        """Whether this one cannot end before the other one does."""
        return self is other or any(each.leads_to(other) for each in self.waits_for)


# The flight whose coroutine runs here, to find one that would wait for itself.
_ABOARD: ContextVar[_Flight[Any] | None] = ContextVar("aboard", default=None)


class SingleFlight(Generic[Result]):
    """Runs one coroutine per key, however many callers ask for it.

    - The first caller of a key starts the coroutine; callers that come while it runs, or while its
      result is kept, get the same result (the same object).
    - An exception reaches every caller that was waiting, and is not kept: the next one tries again.
    - Cancelling a caller does not cancel the others; when the last one that waits is cancelled, so
      is the coroutine, and the next caller starts again.
    - The results of the last `keep` finished keys are kept; what is running is never dropped. A
      key whose result was dropped starts again, so a sibling that comes later gets another draft:
      let `keep` be at least the number of groups in a training step.

    The key must contain the training step, as in (step, prompt id): the same prompt in the next
    epoch would otherwise get the draft of an old policy.

    One event loop at a time, as anything in asyncio.

    Args:
        keep: Finished results to keep, at least 1.

    Raises:
        ValueError: `keep` is below 1.

    Examples:
        >>> async def main(step):
        ...     flight, calls = SingleFlight(), []
        ...     async def draft():
        ...         calls.append("Stage 1")
        ...         return "the best draft"
        ...     drafts = await asyncio.gather(*(flight.do((step, "q"), draft) for _ in range(2)))
        ...     return drafts, calls
        >>> asyncio.run(main(step=0))
        (['the best draft', 'the best draft'], ['Stage 1'])
    """

    def __init__(self, *, keep: int = 1024) -> None:
        self._keep = check_count("keep", keep)
        self._running: dict[Hashable, _Flight[Result]] = {}
        self._finished: dict[Hashable, Result] = {}

    async def do(self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Return the key's result; call `start` and run its coroutine only if nobody has.

        Args:
            key: What names the group, training step included.
            start: Makes the coroutine. Not called where the key is running or kept.

        Returns:
            What the coroutine returned.

        Raises:
            RuntimeError: The coroutine that makes the key's result asks for it, directly or through
                other keys: it would wait for itself.
        """
        if key in self._finished:
            return self._finished[key]
        aboard = _ABOARD.get()
        flight = self._running.get(key) or self._take_off(key, start)
        if flight.leads_to(aboard):
            raise RuntimeError(f"the result for {key!r} cannot wait for itself")
        waits_for = aboard.waits_for if aboard is not None else []
        waits_for.append(flight)
        flight.waiting += 1
        try:
            return await asyncio.shield(flight.task)
        finally:
            waits_for.remove(flight)
            flight.waiting -= 1
            if not flight.waiting and not flight.task.done():
                self._remove(key, flight)
                flight.task.cancel()

    def forget(self, key: Hashable) -> None:
        """Drop a kept result; one still running reaches only those that wait for it now."""
        self._finished.pop(key, None)
        self._running.pop(key, None)

    def _take_off(
        self, key: Hashable, start: Callable[[], Coroutine[Any, Any, Result]]
    ) -> _Flight[Result]:
        flight: _Flight[Result] = _Flight()
        context = copy_context()
        context.run(_ABOARD.set, flight)
        flight.task = asyncio.create_task(start(), context=context)
        self._running[key] = flight
        flight.task.add_done_callback(lambda _: self._land(key, flight))
        return flight

    def _land(self, key: Hashable, flight: _Flight[Result]) -> None:
        current = self._remove(key, flight)
        if flight.task.cancelled() or flight.task.exception() is not None or not current:
            return
        self._finished[key] = flight.task.result()
        while len(self._finished) > self._keep:
            del self._finished[next(iter(self._finished))]

    def _remove(self, key: Hashable, flight: _Flight[Result]) -> bool:
        """Take the flight off the key, unless it was forgotten and another has taken its place."""
        current = self._running.get(key) is flight
        if current:
            del self._running[key]
        return current
