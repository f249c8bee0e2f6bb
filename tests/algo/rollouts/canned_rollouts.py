"""Samplers and rewards made of text, and both forms of a rollout run on them.

`canned` draws text that depends on prompt and seed alone, so both forms must give the same.
"""

import asyncio
import hashlib

from igrpo_algo.drafts.rules import DraftRules
from igrpo_algo.drafts.splice import TextSplice
from igrpo_algo.drafts.text import DraftTemplate
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout

SPLICE = TextSplice(DraftTemplate(" -> ", ""))
ARROW = DraftRules(splice=SPLICE)
PROMPTS = [f"q{i}" for i in range(5)]


def digest(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=4).digest(), "big")


def canned(prompts, n, seed):
    def one(prompt, seed, i):
        ids = [digest(prompt, seed, i, t) % 50 for t in range(digest(prompt, seed, i) % 4)]
        return Completion(ids, f"{digest(prompt, seed, i)}", [-0.5 * t for t in ids])

    seeds = seed or [None] * len(prompts)
    return [[one(p, s, i) for i in range(n)] for p, s in zip(prompts, seeds, strict=True)]


def graded(prompts, completions):
    """0, 1, 2, or not scored."""
    values = [digest(p, c) % 4 for p, c in zip(prompts, completions, strict=True)]
    return [None if value == 3 else float(value) for value in values]


def listed(*texts):
    """Draw these texts, one call after the other."""
    calls = iter(texts)

    def sampler(prompts, n, seed):
        return [[Completion([1], next(calls)) for _ in range(n)] for _ in prompts]

    return sampler


def by_text(prompts, completions):
    """The text is the reward."""
    return [None if text == "none" else float(text) for text in completions]


async def gather(stream):
    return Rollouts.of([group async for group in stream])


def streamed(*arguments, **options):
    return asyncio.run(gather(stream_two_stage_rollout(*arguments, **options)))


def both(*arguments, **options):
    """Roll out in step and streamed; give what both must give."""
    in_step = two_stage_rollout(*arguments, **options)
    assert streamed(*arguments, **options) == in_step
    assert streamed(*arguments, **options, concurrency=3) == in_step
    return in_step
