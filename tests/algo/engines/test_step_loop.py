"""The loop that steps an engine, on a scripted engine: who is served, who is dropped, who waits."""

import asyncio
import threading
import time
from types import SimpleNamespace

import pytest

from igrpo_algo.engines.vllm.step_loop import StepLoop


class Scripted:
    """Gives each request one token a step; a request ends after as many as its params say."""

    def __init__(self):
        self.left = {}
        self.events = []
        self.gate = threading.Event()
        self.gate.set()
        self.error = None

    def add_request(self, request_id, prompt, params, *, priority=0):
        if params < 0:
            raise ValueError("params must be positive")
        self.events.append(("add", prompt, priority))
        self.left[request_id] = [prompt, params]

    def abort_request(self, request_ids):
        self.events += [("abort", self.left.pop(name)[0]) for name in request_ids]

    def step(self):
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        outputs = []
        for name in list(self.left):
            self.left[name][1] -= 1
            done = self.left[name][1] == 0
            outputs.append(
                SimpleNamespace(request_id=name, finished=done, text=str(self.left[name][0]))
            )
            if done:
                del self.left[name]
        outputs.append(SimpleNamespace(request_id="of somebody else", finished=True))
        return outputs


@pytest.fixture
def engine():
    return Scripted()


@pytest.fixture
def loop(engine):
    return StepLoop(engine)


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    pytest.fail("it never came to that")


def idle(loop):
    until(lambda: not [t for t in threading.enumerate() if t.name == "igrpo-step-loop"])


def test_requests_share_steps_and_each_gets_its_own_output(engine, loop):
    engine.gate.clear()
    futures = [loop.request(f"p{i}", steps, i) for i, steps in enumerate((3, 1, 2))]
    engine.gate.set()
    assert [future.result(10).text for future in futures] == ["p0", "p1", "p2"]
    assert engine.events == [("add", f"p{i}", i) for i in range(3)]


def test_an_idle_loop_has_no_thread_and_starts_again(engine, loop):
    for _ in range(3):
        assert loop.request("p", 2).result(10).text == "p"
        idle(loop)
    assert len(engine.events) == 3


def test_many_threads_may_ask_at_once(engine, loop):
    def ask(name):
        found[name] = [loop.request(f"{name} {i}", 1 + i % 3).result(10).text for i in range(20)]

    found = {}
    threads = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert found == {name: [f"{name} {i}" for i in range(20)] for name in "abcd"}


def test_a_cancelled_request_leaves_the_engine_and_the_others_stay(engine, loop):
    endless, short = loop.request("endless", 10**9), loop.request("short", 50)
    until(lambda: ("add", "short", 0) in engine.events)
    assert endless.cancel()
    assert short.result(10).text == "short"
    idle(loop)
    assert ("abort", "endless") in engine.events
    assert engine.left == {}


def test_a_request_cancelled_before_its_turn_never_enters(engine, loop):
    engine.gate.clear()
    first = loop.request("first", 2)
    until(lambda: engine.events)
    second = loop.request("second", 2)
    assert second.cancel()
    engine.gate.set()
    assert first.result(10).text == "first"
    idle(loop)
    assert engine.events == [("add", "first", 0)]


def test_cancelling_a_task_cancels_its_request(engine, loop):
    async def run():
        task = asyncio.ensure_future(asyncio.wrap_future(loop.request("endless", 10**9)))
        await asyncio.to_thread(until, lambda: engine.left)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    idle(loop)
    assert engine.events == [("add", "endless", 0), ("abort", "endless")]


def test_a_request_that_is_refused_fails_alone(engine, loop):
    bad, good = loop.request("bad", -1), loop.request("good", 2)
    with pytest.raises(ValueError, match="params must be positive"):
        bad.result(10)
    assert good.result(10).text == "good"


def test_an_error_in_a_step_reaches_all_and_empties_the_engine(engine, loop):
    engine.gate.clear()
    futures = [loop.request(name, 5) for name in "ab"]
    until(lambda: engine.events)
    engine.error = OSError("the device is lost")
    engine.gate.set()
    for future in futures:
        with pytest.raises(OSError, match="the device is lost"):
            future.result(10)
    idle(loop)
    assert engine.left == {}
    engine.error = None
    assert loop.request("c", 2).result(10).text == "c"


def test_a_lone_function_has_the_engine_for_itself(engine, loop):
    engine.gate.clear()
    before = loop.request("before", 5)
    seen = loop.alone(lambda: (before.done(), list(engine.left)))
    after = loop.request("after", 1)
    engine.gate.set()
    assert seen.result(10) == (True, [])
    assert after.result(10).text == "after"
    assert [event[1] for event in engine.events] == ["before", "after"]


def test_what_a_lone_function_raises_is_its_callers(engine, loop):
    def broken():
        raise KeyError("weights")

    with pytest.raises(KeyError, match="weights"):
        loop.alone(broken).result(10)
    assert loop.request("p", 1).result(10).text == "p"


def test_a_retired_loop_answers_with_its_reason(engine, loop):
    loop.retire("half old and half new")
    with pytest.raises(RuntimeError, match="half old and half new"):
        loop.request("p", 1).result(10)
    with pytest.raises(RuntimeError, match="half old and half new"):
        loop.alone(lambda: None).result(10)
    assert engine.events == []


def test_each_thread_begins_with_its_setting(engine):
    calls = []
    loop = StepLoop(engine, lambda: calls.append(threading.current_thread().name))
    for _ in range(2):
        loop.request("p", 1).result(10)
        idle(loop)
    assert calls == ["igrpo-step-loop"] * 2
