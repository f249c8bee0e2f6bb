"""Slots: how many at a time, who goes first, and what cancellation gives back."""

import asyncio
import random

import pytest
from manual_engine import settle

from igrpo_algo.rollouts.slots import Slots


class Office:
    """Requests by name; each holds its slots until it is let go."""

    def __init__(self, capacity):
        self.slots = Slots(capacity)
        self.began = []
        self.gates = {}
        self.tasks = {}

    async def ask(self, name, wanted, rank):
        self.gates[name] = asyncio.Event()

        async def hold():
            async with self.slots.take(wanted, rank=(rank,)):
                self.began.append(name)
                await self.gates[name].wait()

        self.tasks[name] = asyncio.create_task(hold())
        await settle()

    async def end(self, name):
        self.gates[name].set()
        await settle()


def test_drafts_go_before_refinements_that_waited_longer():
    async def main():
        office = Office(1)
        await office.ask("running", 1, 0)
        await office.ask("refine", 1, 1)
        await office.ask("draft", 1, 0)
        await office.ask("draft too", 1, 0)
        for name in ("running", "draft", "draft too", "refine"):
            assert office.began[-1] == name
            await office.end(name)
        assert office.slots.free == 1

    asyncio.run(main())


def test_nobody_overtakes_who_is_first_in_line():
    async def main():
        office = Office(4)
        await office.ask("running", 3, 1)
        await office.ask("wide draft", 4, 0)
        await office.ask("narrow refine", 1, 1)
        assert office.began == ["running"]
        await office.end("running")
        assert office.began == ["running", "wide draft"]
        await office.end("wide draft")
        assert office.began[-1] == "narrow refine"
        await office.end("narrow refine")

    asyncio.run(main())


def test_more_than_all_slots_waits_for_all():
    async def main():
        office = Office(2)
        await office.ask("running", 1, 0)
        await office.ask("huge", 10, 0)
        assert office.began == ["running"]
        await office.end("running")
        assert office.slots.free == 0
        await office.end("huge")
        assert office.slots.free == 2

    asyncio.run(main())


def test_cancelled_while_waiting_lets_the_next_one_through():
    async def main():
        office = Office(2)
        await office.ask("running", 1, 0)
        await office.ask("wide", 2, 0)
        await office.ask("narrow", 1, 1)
        office.tasks["wide"].cancel()
        await settle()
        assert office.began == ["running", "narrow"]
        await office.end("running")
        await office.end("narrow")
        assert office.slots.free == 2

    asyncio.run(main())


def test_cancelled_while_holding_or_just_granted_gives_back():
    async def main():
        office = Office(1)
        await office.ask("running", 1, 0)
        await office.ask("next", 1, 0)
        office.tasks["running"].cancel()
        await settle()
        assert office.began == ["running", "next"]
        await office.ask("granted", 1, 0)
        office.gates["next"].set()
        await asyncio.sleep(0)  # "next" gives its slot to "granted", which has not run yet
        assert office.slots.free == 0
        assert office.began[-1] == "next"
        office.tasks["granted"].cancel()
        await settle()
        assert office.slots.free == 1

    asyncio.run(main())


def test_an_error_in_the_block_gives_back():
    async def main():
        slots = Slots(1)
        with pytest.raises(KeyError):
            async with slots.take(1, rank=(0,)):
                raise KeyError("engine")
        assert slots.free == 1

    asyncio.run(main())


def test_never_more_than_capacity_and_always_all_back():
    async def main():
        slots, held, most = Slots(5), 0, 0
        rng = random.Random(0)

        async def request(wanted, rank, turns):
            nonlocal held, most
            async with slots.take(wanted, rank=(rank,)):
                held += min(wanted, 5)
                most = max(most, held)
                for _ in range(turns):
                    await asyncio.sleep(0)
                held -= min(wanted, 5)

        tasks = [
            asyncio.create_task(request(rng.randint(1, 7), rng.randint(0, 2), rng.randint(1, 9)))
            for _ in range(200)
        ]
        await asyncio.gather(*tasks)
        assert (most, slots.free) == (5, 5)

    asyncio.run(main())


def test_capacity_is_at_least_one():
    with pytest.raises(ValueError, match="capacity must be >= 1, got 0"):
        Slots(0)
