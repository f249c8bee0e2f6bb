"""The vLLM sampler on a real engine: log-probs against transformers, seeds, stops, cancellation."""

import asyncio

import pytest
import torch
from tiny_models import (
    CONTEXT,
    ENGINE,
    ENGINES,
    KINDS,
    PROMPTS,
    engine,
    make_model,
    make_tokenizer,
    worst_difference,
)

from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.engines.vllm import VllmSampler
from igrpo_algo.rollouts.sampling import sample_group

# fp32; another order of summation in attention, and a cache. Seen: 2e-5 at most.
TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def llm(folders):
    return engine(folders["qwen3"], scheduling_policy="priority")


@pytest.fixture(scope="module")
def model():
    return make_model("qwen3", 0)


def ids_of(groups):
    return [[completion.token_ids for completion in group] for group in groups]


def in_flight(llm):
    return llm.llm_engine.get_num_unfinished_requests()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_agree_with_transformers(folders, kind):
    model = make_model(kind, 0)
    llm = engine(folders[kind])
    for temperature in (1.0, 0.7):
        sampler = VllmSampler(llm, max_new_tokens=48, temperature=temperature)
        groups = sampler.sample(PROMPTS, 4, seed=0)
        assert worst_difference(model, sampler, PROMPTS, groups) <= TOLERANCE
        assert len({tuple(ids) for group in ids_of(groups) for ids in group}) == 16


CUTS = [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.8, "top_k": 20, "min_p": 0.05}]


@pytest.fixture(scope="module")
def raw(folders):
    return engine(folders["qwen3"], logprobs_mode="raw_logprobs")


@pytest.mark.parametrize("cut", [{}, *CUTS], ids=str)
def test_the_ratio_of_the_policy_to_itself_is_one_whatever_is_cut(raw, model, cut):
    sampler = VllmSampler(raw, max_new_tokens=48, **cut)
    groups = sampler.sample(PROMPTS, 4, seed=0)
    assert worst_difference(model, sampler, PROMPTS, groups) <= TOLERANCE


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_tokens_are_drawn_from_the_cut_distribution(raw, model, cut):
    """From the same tokens as the transformers sampler draws from, and as often."""
    draws = []
    for sampler in (
        VllmSampler(raw, max_new_tokens=1, temperature=1.3, logprobs=False, **cut),
        TransformersSampler(
            model, make_tokenizer(), max_new_tokens=1, temperature=1.3, batch_size=800, **cut
        ),
    ):
        (group,) = sampler.sample([[9, 8, 7]], 800, seed=0)
        drawn = torch.tensor([completion.token_ids[0] for completion in group])
        draws.append(torch.bincount(drawn, minlength=len(make_tokenizer())))
    ours, peers = draws
    # Two counts of one chance differ by sqrt(2) Bernoulli deviations; 5 is one in ten thousand.
    chances = (ours + peers) / 1600
    deviation = (2 * 800 * chances * (1 - chances)).sqrt().clamp(min=1)
    assert ((ours - peers).abs() / deviation).max() < 5
    assert (ours > 0).sum() < len(make_tokenizer()) / 2


def test_seeds_fix_the_samples_whatever_the_batch(llm):
    sampler = VllmSampler(llm, max_new_tokens=12)
    ids = ids_of(sampler.sample(PROMPTS, 3, seed=[1, 2, 3, 4]))
    assert ids_of(sampler.sample(PROMPTS[2:3], 3, seed=[3])) == ids[2:3]
    assert ids_of(sampler.sample(PROMPTS[2:3], 2, seed=[3]))[0] == ids[2][:2]
    assert ids_of(sampler.sample(PROMPTS, 3, seed=[1, 2, 3, 5]))[:3] == ids[:3]
    assert ids_of(sampler.sample(PROMPTS, 3, seed=[1, 2, 3, 5]))[3] != ids[3]
    assert (
        sampler.sample(PROMPTS, 2, seed=7) == sample_group(PROMPTS, sampler, 2, seed=7).completions
    )
    assert ids_of(sampler.sample(PROMPTS, 3)) != ids_of(sampler.sample(PROMPTS, 3))

    async def one():
        return await sampler.sample_one(PROMPTS[2], 3, seed=3)

    async def streamed():
        return {i: c.token_ids async for i, c in sampler.stream_one(PROMPTS[2], 3, seed=3)}

    assert [completion.token_ids for completion in asyncio.run(one())] == ids[2]
    assert asyncio.run(streamed()) == dict(enumerate(ids[2]))


def test_prompts_and_greedy_tokens_are_those_of_the_transformers_sampler(llm, model):
    greedy = VllmSampler(llm, max_new_tokens=12, temperature=0)
    peer = TransformersSampler(model, make_tokenizer(), max_new_tokens=12, temperature=0)
    assert [greedy.encode(prompt) for prompt in PROMPTS] == [peer.encode(p) for p in PROMPTS]
    assert greedy.stop_token_ids == peer.stop_token_ids == [2]
    assert greedy.max_prompt_tokens == peer.max_prompt_tokens == CONTEXT - 12
    assert greedy.sample(PROMPTS, 2) == peer.sample(PROMPTS, 2)
    assert greedy.sample(PROMPTS, 1)[0][0].logprobs is None


def test_a_stop_token_ends_the_completion_and_is_its_last(llm):
    free = VllmSampler(llm, max_new_tokens=40, stop_token_ids=[])
    stops = VllmSampler(llm, max_new_tokens=40, stop_token_ids=range(4, 30))
    (whole,), (parts,) = free.sample(["q"], 16, seed=3), stops.sample(["q"], 16, seed=3)
    assert {completion.finish_reason for completion in whole} == {"length"}
    assert {len(completion.token_ids) for completion in whole} == {40}
    assert "stop" in {completion.finish_reason for completion in parts}
    for long, part in zip(whole, parts, strict=True):
        end = next((i + 1 for i, token in enumerate(long.token_ids) if 4 <= token < 30), 40)
        assert part.token_ids == long.token_ids[:end]
        assert part.logprobs == pytest.approx(long.logprobs[:end], abs=TOLERANCE)
        assert part.text == make_tokenizer().decode(part.token_ids, skip_special_tokens=True)


def test_the_end_of_sequence_stops_and_is_no_text(llm):
    sampler = VllmSampler(llm, max_new_tokens=200)
    (group,) = sampler.sample(["q"], 24, seed=0)
    ended = [completion for completion in group if completion.finish_reason == "stop"]
    assert len(ended) > 4
    for completion in ended:
        assert completion.token_ids[-1] == 2
        assert 2 not in completion.token_ids[:-1]
        assert "</s>" not in completion.text


def test_a_prompt_that_does_not_fit_is_named_and_nothing_is_cut(llm):
    sampler = VllmSampler(llm, max_new_tokens=12)
    (group,) = sampler.sample([[5] * (CONTEXT - 12)], 1, seed=0)
    assert len(group[0].token_ids) > 0
    with pytest.raises(ValueError, match=r"prompts\[1\] has 501 tokens, wanted 1 to 500 .* = 12"):
        sampler.sample(["a", "b" * 501], 1)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 0 tokens"):
        asyncio.run(sampler.sample_one("", 1))
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        sampler.sample(["a"], 0)
    with pytest.raises(ValueError, match=r"max_new_tokens = 512 leaves no room"):
        VllmSampler(llm, max_new_tokens=CONTEXT)


def test_many_prompts_share_the_engine_and_a_cancelled_one_leaves_it(llm):
    short = VllmSampler(llm, max_new_tokens=8, stop_token_ids=[])
    endless = VllmSampler(llm, max_new_tokens=CONTEXT - 20, stop_token_ids=[])
    alone = short.sample([[i + 5] for i in range(6)], 2, seed=list(range(6)))

    async def run():
        lost = asyncio.create_task(endless.sample_one([9] * 10, 4, seed=0))
        while in_flight(llm) < 4:
            await asyncio.sleep(0.001)
        groups = await asyncio.gather(*(short.sample_one([i + 5], 2, seed=i) for i in range(6)))
        assert not lost.done(), "it was to be in the engine with the others"
        lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        while in_flight(llm):
            await asyncio.sleep(0.001)
        return groups

    assert ids_of(asyncio.run(asyncio.wait_for(run(), timeout=60))) == ids_of(alone)


def test_a_stream_that_is_closed_leaves_the_engine(llm):
    sampler = VllmSampler(llm, max_new_tokens=CONTEXT - 20, stop_token_ids=range(4, 9))

    async def first():
        stream = sampler.stream_one("q", 16, seed=0)
        _, completion = await anext(stream)
        await stream.aclose()
        while in_flight(llm):
            await asyncio.sleep(0.001)
        return completion

    shortest = asyncio.run(asyncio.wait_for(first(), timeout=60))
    lengths = [len(completion.token_ids) for completion in sampler.sample(["q"], 16, seed=[0])[0]]
    assert len(shortest.token_ids) == min(lengths) < max(lengths)


def test_a_lower_priority_number_goes_first(folders):
    llm = engine(folders["qwen3"], scheduling_policy="priority", max_num_seqs=1)
    sampler = VllmSampler(llm, max_new_tokens=30, stop_token_ids=[])
    finished = []

    async def draw(name, priority):
        await sampler.sample_one("q", 1, priority=priority)
        finished.append(name)

    async def run():
        names = {"begun": 0, "refinement": 1, "draft": 0, "later round": 2, "other draft": 0}
        await asyncio.gather(*(draw(name, rank) for name, rank in names.items()))

    asyncio.run(run())
    assert finished == ["begun", "draft", "other draft", "refinement", "later round"]


def test_an_error_in_the_engine_reaches_those_who_wait_and_leaves_it_usable(llm, monkeypatch):
    sampler = VllmSampler(llm, max_new_tokens=8)
    expected = sampler.sample(PROMPTS, 2, seed=0)

    def broken():
        raise RuntimeError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(llm.llm_engine, "step", broken)
        with pytest.raises(RuntimeError, match="the device is lost"):
            sampler.sample(PROMPTS, 2, seed=0)
    assert sampler.sample(PROMPTS, 2, seed=0) == expected


def test_an_engine_is_made_of_a_folder_with_small_blocks_and_priorities(folders):
    options = {**ENGINE, "max_num_seqs": 4}
    sampler = VllmSampler(folders["llama"], max_new_tokens=4, engine_options=options)
    ENGINES["made by the sampler"] = sampler.llm
    config = sampler.llm.llm_engine.vllm_config
    assert config.cache_config.block_size == 32
    assert config.scheduler_config.policy == "priority"
    assert config.scheduler_config.max_num_seqs == 4
    groups = sampler.sample(PROMPTS, 2, seed=0)
    assert worst_difference(make_model("llama", 0), sampler, PROMPTS, groups) <= TOLERANCE


def test_an_engine_that_gives_other_log_probs_is_refused(llm, raw):
    with pytest.raises(ValueError, match=r"gives raw_logprobs.*logprobs_mode='processed_logprobs'"):
        VllmSampler(raw, max_new_tokens=4, temperature=0.7)
    with pytest.raises(ValueError, match=r"gives processed_logprobs.*logprobs_mode='raw_logprobs'"):
        VllmSampler(llm, max_new_tokens=4, top_k=5)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be >= 0, got -1.0"),
        ({"top_p": 1.1}, ValueError, "top_p must be <= 1, got 1.1"),
        ({"temperature": 0, "top_p": 0.9}, ValueError, "top_p has no effect at temperature 0"),
        ({"engine_options": {}}, ValueError, "engine_options has no effect"),
        ({"llm": 3}, TypeError, "llm must be a vllm.LLM or a model's folder or name, got int 3"),
    ],
)
def test_wrong_options(llm, options, error, match):
    with pytest.raises(error, match=match):
        VllmSampler(**{"llm": llm, "max_new_tokens": 4, **options})
