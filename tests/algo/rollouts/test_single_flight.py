"""Single flight: one call, many callers; errors, cancellation and the bound on what is kept."""

import asyncio
from functools import partial

import pytest
from manual_engine import settle

from igrpo_algo.rollouts.single_flight import SingleFlight


class Calls:
    """A coroutine function that counts its calls and ends when it is let go."""

    def __init__(self):
        self.count = 0
        self.cancelled = 0
        self.go = asyncio.Event()

    async def __call__(self):
        self.count += 1
        number = self.count
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number


def test_siblings_share_one_call():
    async def main():
        flight, calls = SingleFlight(), Calls()
        waiting = [asyncio.create_task(flight.do("q", calls)) for _ in range(8)]
        other = asyncio.create_task(flight.do("other", calls))
        await settle()
        assert calls.count == 2
        calls.go.set()
        assert await asyncio.gather(*waiting, other) == [1] * 8 + [2]
        assert await flight.do("q", calls) == 1
        assert calls.count == 2

    asyncio.run(main())


def test_an_error_reaches_all_and_is_not_kept():
    async def main():
        flight, started = SingleFlight(), []

        async def fails():
            started.append(1)
            await asyncio.sleep(0)
            raise KeyError("engine")

        results = await asyncio.gather(
            *(flight.do("q", fails) for _ in range(3)), return_exceptions=True
        )
        assert [type(r) for r in results] == [KeyError] * 3
        assert len(started) == 1

        async def works():
            return "draft"

        assert await flight.do("q", works) == "draft"

    asyncio.run(main())


def test_a_cancelled_caller_leaves_the_others():
    async def main():
        flight, calls = SingleFlight(), Calls()
        first, second = (asyncio.create_task(flight.do("q", calls)) for _ in range(2))
        await settle()
        first.cancel()
        await settle()
        assert first.cancelled()
        assert calls.cancelled == 0
        calls.go.set()
        assert await second == 1

    asyncio.run(main())


def test_the_last_caller_cancelled_ends_the_call_and_the_next_starts_anew():
    async def main():
        flight, calls = SingleFlight(), Calls()
        callers = [asyncio.create_task(flight.do("q", calls)) for _ in range(2)]
        await settle()
        for caller in callers:
            caller.cancel()
        await settle()
        assert calls.cancelled == 1
        calls.go.set()
        assert await flight.do("q", calls) == 2

    asyncio.run(main())


def test_nobody_joins_a_call_that_is_being_cancelled():
    async def main():
        flight, ended = SingleFlight(), []

        async def slow_to_end():
            try:
                await asyncio.Event().wait()
            finally:
                await settle()
                ended.append("old")

        caller = asyncio.create_task(flight.do("q", slow_to_end))
        await settle()
        caller.cancel()
        await asyncio.wait([caller])
        assert not ended

        async def works():
            return "new"

        assert await flight.do("q", works) == "new"
        await settle()
        await settle()
        assert ended == ["old"]
        assert await flight.do("q", works) == "new"

    asyncio.run(main())


def test_a_forgotten_call_that_ends_late_does_not_replace_the_new_result():
    async def main():
        flight, old, new = SingleFlight(), Calls(), Calls()
        first = asyncio.create_task(flight.do("q", old))
        await settle()
        flight.forget("q")
        new.count = 10
        new.go.set()
        assert await flight.do("q", new) == 11
        old.go.set()
        assert await first == 1
        await settle()
        assert await flight.do("q", new) == 11

    asyncio.run(main())


def test_a_coroutine_that_cancels_itself_cancels_its_callers_and_is_not_kept():
    async def main():
        flight = SingleFlight()

        async def quits():
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await flight.do("q", quits)

        async def works():
            return 1

        assert await flight.do("q", works) == 1

    asyncio.run(main())


def test_forget_while_running_and_after():
    async def main():
        flight, calls = SingleFlight(), Calls()
        old = asyncio.create_task(flight.do("q", calls))
        await settle()
        flight.forget("q")
        new = asyncio.create_task(flight.do("q", calls))
        await settle()
        calls.go.set()
        assert await asyncio.gather(old, new) == [1, 2]
        assert await flight.do("q", calls) == 2
        flight.forget("q")
        assert await flight.do("q", calls) == 3
        flight.forget("never seen")

    asyncio.run(main())


def test_keeps_the_last_results_only():
    async def main():
        flight, calls = SingleFlight(keep=2), Calls()
        calls.go.set()
        for key in "abc":
            await flight.do(key, calls)
        assert await flight.do("b", calls) == 2
        assert await flight.do("c", calls) == 3
        assert await flight.do("a", calls) == 4

    asyncio.run(main())


def test_what_runs_is_never_dropped():
    async def main():
        flight, slow, fast = SingleFlight(keep=1), Calls(), Calls()
        fast.go.set()
        running = asyncio.create_task(flight.do("slow", slow))
        await settle()
        for key in range(4):
            await flight.do(key, fast)
        sibling = asyncio.create_task(flight.do("slow", slow))
        await settle()
        slow.go.set()
        assert await asyncio.gather(running, sibling) == [1, 1]

    asyncio.run(main())


def test_what_waits_for_itself_is_refused():
    async def main():
        flight, other = SingleFlight(), SingleFlight()

        async def asks(where, key, then):
            return await where.do(key, then)

        async def asks_itself():
            return await flight.do("a", asks_itself)

        async def round_trip():
            return await asks(other, "b", lambda: asks(flight, "a", round_trip))

        for start in (asks_itself, round_trip):
            with pytest.raises(RuntimeError, match="result for 'a' cannot wait for itself"):
                await asyncio.wait_for(flight.do("a", start), 5)

        # Two that began apart and then wait for each other: the one that closes the ring is told.
        ready = asyncio.Event()

        async def late(key, own):
            await ready.wait()
            return await flight.do(key, own)

        a, b = partial(late, "b", Calls()), partial(late, "a", Calls())
        both = asyncio.gather(flight.do("a", a), flight.do("b", b), return_exceptions=True)
        await settle()
        ready.set()
        errors = await asyncio.wait_for(both, 5)
        assert [type(error) for error in errors] == [RuntimeError] * 2

    asyncio.run(main())


def test_a_result_may_wait_for_others():
    async def main():
        flight, calls = SingleFlight(), Calls()
        calls.go.set()

        async def one(key):
            return key + str(await flight.do("shared", calls))

        async def all_of_them():
            keys = ("a", "b", "c")
            return await asyncio.gather(*(flight.do(key, partial(one, key)) for key in keys))

        assert await flight.do("all", all_of_them) == ["a1", "b1", "c1"]
        assert await flight.do("again", partial(flight.do, "all", all_of_them)) == [
            "a1",
            "b1",
            "c1",
        ]

    asyncio.run(main())


def test_keep_is_at_least_one():
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        SingleFlight(keep=0)


def test_the_training_step_in_the_key_tells_epochs_apart():
    async def main():
        flight = SingleFlight(keep=1)

        async def draft(text):
            return text

        first = await flight.do((0, "q"), lambda: draft("old"))
        later = await flight.do((1, "q"), lambda: draft("new"))
        evicted = await flight.do((0, "q"), lambda: draft("drawn anew"))
        return first, later, evicted

    assert asyncio.run(main()) == ("old", "new", "drawn anew")
