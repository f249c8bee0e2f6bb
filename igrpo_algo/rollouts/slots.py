"""Slots of an engine, given to waiting requests by stage: drafts first.

With a barrier between the stages, the slots idle while the longest draft ends; a queue that prefers
refinements leaves the longest drafts for last. Drafts first keeps the slots full to the end.
"""

import asyncio
import heapq
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count

from igrpo_kernels.checks import check_count


class Slots:
    """Lends at most `capacity` slots at a time; the waiting request of lowest rank goes first.

    Equal ranks go in the order of their asking. Whoever is first in line waits until enough slots
    are free for it, and nobody overtakes. A request for more than `capacity` waits for all slots.

    Args:
        capacity: Slots to lend, at least 1.

    Raises:
        ValueError: `capacity` is below 1.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = self.free = check_count("capacity", capacity)
        self._waiting: list[tuple[tuple[int, ...], int, int, asyncio.Future[None]]] = []
        self._tickets = count()

    @asynccontextmanager
    async def take(self, wanted: int, *, rank: tuple[int, ...]) -> AsyncIterator["Lease"]:
        """Hold `wanted` slots for the length of the block, or until the lease gives some back."""
        wanted = min(wanted, self.capacity)
        lease = Lease(self, wanted)
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (rank, next(self._tickets), wanted, granted))
        self._grant()
        try:
            await granted
            yield lease
        finally:
            if granted.done() and not granted.cancelled():
                lease.keep(0)
            self._grant()

    def _grant(self) -> None:
        while self._waiting:
            _, _, wanted, granted = self._waiting[0]
            if not granted.cancelled():
                if wanted > self.free:
                    return
                self.free -= wanted
                granted.set_result(None)
            heapq.heappop(self._waiting)


@dataclass
class Lease:
    """Slots that a request holds."""

    slots: Slots
    held: int

    def keep(self, most: int) -> None:
        """Give back what is held above `most`."""
        if self.held > most:
            self.slots.free += self.held - most
            self.held = most
            self.slots._grant()
