"""Two stages on a real vLLM engine: in step, streamed, with early selection, through the cache."""

import asyncio

import pytest
from tiny_models import engine, make_model, worst_difference

from igrpo_algo.drafts.rules import DraftRules
from igrpo_algo.drafts.splice import TokenSplice
from igrpo_algo.engines.vllm import VllmSampler
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout

QUESTIONS = [[(7 * i + j) % 90 + 5 for j in range(60 + 9 * i)] for i in range(6)]
# The draft stands right behind the question, as when it was drawn, so the engine knows both.
SPLICE = TokenSplice(after_ids=(10, 11, 12), special_ids=(2,), keep="head", max_prompt_tokens=300)
STOPS = (60, 61)  # drawn so seldom that lengths differ widely: the shortest draft is far ahead


@pytest.fixture(scope="module")
def llm(folders):
    return engine(folders["qwen3"], scheduling_policy="priority")


def late_letters(prompts, completions):
    """Graded and deterministic: the share of letters behind `m`."""
    return [sum(letter > "m" for letter in text) / (len(text) + 1) for text in completions]


def is_short(prompts, completions):
    return [float(len(text) < 40) for text in completions]


async def gather(stream):
    return Rollouts.of([group async for group in stream])


def test_in_step_and_streamed_agree_and_tell_the_engines_log_probs(llm):
    sampler = VllmSampler(llm, max_new_tokens=40)
    options = {"rules": DraftRules(splice=SPLICE), "seed": 0}
    in_step = two_stage_rollout(QUESTIONS, sampler, late_letters, **options)
    streamed = asyncio.run(
        gather(stream_two_stage_rollout(QUESTIONS, sampler, late_letters, **options))
    )
    assert streamed.refinements.prompts == in_step.refinements.prompts
    assert streamed.refinements.texts == in_step.refinements.texts
    assert streamed.drafts.texts == in_step.drafts.texts
    assert (in_step.draft_rewards.amax(-1) > in_step.draft_rewards.amin(-1)).all()
    for samples in (streamed.drafts, streamed.refinements):
        # fp32, and most of each Stage-2 prompt from the cache: as in test_vllm.py
        worst = worst_difference(
            make_model("qwen3", 0), sampler, samples.prompts, samples.completions
        )
        assert worst <= 5e-5


def test_early_selection_cancels_drafts_in_the_engine(llm):
    sampler = VllmSampler(llm, max_new_tokens=200, stop_token_ids=STOPS)
    options = {"rules": DraftRules(splice=SPLICE), "seed": 0}
    left = []

    async def run():
        stream = stream_two_stage_rollout(
            QUESTIONS, sampler, is_short, reward_max=1.0, concurrency=8, **options
        )
        rollouts = await gather(stream)
        for _ in range(1000):  # the loop takes cancelled requests out between two steps
            left.append(llm.llm_engine.get_num_unfinished_requests())
            if not left[-1]:
                return rollouts
            await asyncio.sleep(0.001)
        return rollouts

    rollouts = asyncio.run(run())
    assert left[-1] == 0
    assert int(rollouts.cancelled.sum()) > 0
    for group in rollouts:
        chosen = group.choices[0]
        finished = [d for d in group.drafts.completions if d.finish_reason != "cancelled"]
        succeeded = [draft for draft in finished if len(draft.text) < 40]
        assert chosen.reward == (1.0 if succeeded else 0.0)
        assert succeeded or len(finished) == 4


class Counting:
    """Keeps what each call added to the sampler's counters."""

    def __init__(self, sampler):
        self.sampler = sampler
        self.calls = []

    def sample(self, prompts, n, *, seed=None):
        before = self.sampler.prompt_tokens, self.sampler.cached_tokens
        groups = self.sampler.sample(prompts, n, seed=seed)
        after = self.sampler.prompt_tokens, self.sampler.cached_tokens
        self.calls.append(tuple(b - a for a, b in zip(before, after, strict=True)))
        return groups


def test_most_of_a_stage_two_prompt_comes_from_the_prefix_cache(folders):
    llm = engine(folders["qwen3"])
    sampler = Counting(VllmSampler(llm, max_new_tokens=150, stop_token_ids=range(60, 62)))
    rollouts = two_stage_rollout(
        QUESTIONS, sampler, late_letters, rules=DraftRules(splice=SPLICE), seed=0
    )
    _, (prompt_tokens, cached_tokens) = sampler.calls
    prompts = rollouts.refinements.prompts
    assert prompt_tokens == 4 * sum(map(len, prompts))
    # Whole blocks of 32 tokens that Stage 1 filled: all but the draft's last token has keys there,
    # and siblings find no more.
    whole = [(len(prompt) - len(SPLICE.after_ids) - 1) // 32 * 32 for prompt in prompts]
    assert cached_tokens >= 4 * sum(whole)
    assert cached_tokens / prompt_tokens >= 0.8


def test_words_between_question_and_draft_lose_the_drafts_part_of_the_cache(folders):
    splice = TokenSplice(before_ids=(13,), after_ids=(10, 11, 12), special_ids=(2,))
    llm = engine(folders["qwen3"])
    sampler = Counting(VllmSampler(llm, max_new_tokens=150, stop_token_ids=[]))
    rollouts = two_stage_rollout(
        QUESTIONS, sampler, late_letters, rules=DraftRules(splice=splice), seed=0, num_refinements=1
    )
    _, (prompt_tokens, cached_tokens) = sampler.calls
    assert cached_tokens == sum(len(question) // 32 * 32 for question in QUESTIONS)
    assert cached_tokens / prompt_tokens < 0.5
    assert prompt_tokens == sum(map(len, rollouts.refinements.prompts))
