"""An engine that answers a request when the test says so, and what reads a stream from it."""

import asyncio
import functools
import gc
from contextlib import aclosing

from igrpo_algo.rollouts.completions import Completion


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


class Engine:
    """Keeps requests open until `answer`; the reward of a text is the text."""

    def __init__(self):
        self.open = {}
        self.began = []
        self.cancelled = []

    async def sample_one(self, prompt, n, *, seed=None):
        future = asyncio.get_running_loop().create_future()
        name = prompt
        if prompt in self.began:
            name = f"{prompt}#{self.began.count(prompt)}"
        self.open[name] = future
        self.began.append(prompt)
        try:
            text = await future
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        finally:
            del self.open[name]
        return [Completion([1], text)] * n

    async def answer(self, name, text):
        self.open[name].set_result(text)
        await settle()


class Consumer:
    """Takes groups off a stream as they come."""

    def __init__(self, stream):
        self.stream = stream
        self.finished = []
        self.task = asyncio.create_task(self.run())

    async def run(self):
        async with aclosing(self.stream):
            async for rollout in self.stream:
                self.finished.append(rollout.index)


def in_loop(test):
    """Run a test inside an event loop and check that it leaves no task behind."""

    @functools.wraps(test)
    def run(*arguments, **fixtures):
        async def body():
            await test(*arguments, **fixtures)
            await settle()
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(body(), debug=True)
        gc.collect()

    return run
