"""The HTTP sampler against made-up servers: what it sends, to whom, and what it makes of it."""

import asyncio
import threading

import pytest
from fake_vllm_server import Letters, drawn_ids, make_sampler, until

from igrpo_algo.engines.base import request_seed
from igrpo_algo.engines.vllm import VllmServerSampler
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.sampling import sample_group

pytestmark = pytest.mark.filterwarnings("error")


def test_completions_are_what_the_server_drew_in_order(fake):
    sampler = make_sampler(fake())
    prompts = ["abc", [{"role": "user", "content": "abc"}], [9, 8, 7]]
    groups = sampler.sample(prompts, 2, seed=[4, 5, 6])
    for ids, seed, group in zip(
        [[5, 6, 7], [1, 5, 6, 7, 3], [9, 8, 7]], (4, 5, 6), groups, strict=True
    ):
        assert sampler.encode(prompts[seed - 4]) == ids
        for index, completion in enumerate(group):
            drawn = drawn_ids(ids, request_seed(seed) + index)
            text = Letters().decode(drawn)
            assert completion == Completion(drawn, text, [-0.5, -0.25, -float(index)], "stop")
    assert (sampler.prompt_tokens, sampler.cached_tokens) == (3 + 5 + 3, 1 + 2 + 1)
    assert sample_group(prompts, sampler, 2, seed=7).completions == sampler.sample(
        prompts, 2, seed=7
    )

    async def both():
        # Inside a running loop, as in a notebook, the blocking form works too.
        assert sampler.sample(prompts[:1], 2, seed=[4]) == groups[:1]
        streamed = {i: c async for i, c in sampler.stream_one(prompts[0], 2, seed=4)}
        assert [streamed[i].token_ids for i in range(2)] == [c.token_ids for c in groups[0]]
        return await sampler.sample_one(prompts[0], 2, seed=4)

    assert asyncio.run(both()) == groups[0]


def test_a_request_says_all_that_shapes_the_distribution(fake):
    server = fake()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "logprobs": False}
    make_sampler(server, **options).sample(["a"], 3, seed=[1], priority=2)
    make_sampler(server, stop_token_ids=(2, 9), model="tiny").sample(["a"], 1, seed=[1])
    first, second = server.completions()
    assert first == {
        "model": "tiny",
        "prompt": [5],
        "n": 3,
        "seed": request_seed(1),
        "max_tokens": 8,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2],
        "ignore_eos": False,
        "logprobs": None,
        "return_token_ids": True,
        "priority": 2,
    }
    assert (second["stop_token_ids"], second["ignore_eos"]) == ([2, 9], True)
    assert (second["top_p"], second["top_k"], second["min_p"]) == (1.0, 0, 0.0)
    assert second["logprobs"] == 0
    assert "priority" not in second
    assert 0 <= request_seed(2**63 - 1) < 2**62


def test_at_temperature_zero_there_are_no_log_probs_and_no_probe(fake):
    server = fake(raw=True)
    (group,) = make_sampler(server, temperature=0).sample(["a"], 3)
    assert [completion.logprobs for completion in group] == [None] * 3
    assert server.completions()[0]["n"] == 1
    assert server.paths() == ["/v1/models", "/v1/completions"]


RAW, PROCESSED = "raw_logprobs", "processed_logprobs"


@pytest.mark.parametrize(
    ("options", "usable"),
    [
        ({}, {RAW, PROCESSED}),
        ({"temperature": 0.7}, {PROCESSED}),
        *[({cut: value}, {RAW}) for cut, value in (("top_p", 0.9), ("top_k", 5), ("min_p", 0.1))],
        ({"temperature": 0.7, "top_p": 0.9, "logprobs": False}, {RAW, PROCESSED}),
        ({"temperature": 0}, {RAW, PROCESSED}),
    ],
)
@pytest.mark.parametrize("mode", [RAW, PROCESSED])
def test_a_server_must_give_log_probs_that_the_loss_can_compare(fake, options, usable, mode):
    server = fake(raw=mode == RAW)
    if mode in usable:
        (completion,) = make_sampler(server, **options).sample(["a"], 1, seed=0)[0]
        needless = options.get("logprobs") is False or options.get("temperature") == 0
        assert completion.logprobs == (None if needless else [-0.5, -0.25, -0.0])
    else:
        (other,) = usable
        message = f"{server.url} gives {mode}, .* start it with --logprobs-mode {other}"
        with pytest.raises(ValueError, match=message):
            make_sampler(fake(raw=mode != RAW), server, **options)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_cut_away_from_temperature_one_is_refused_by_name(fake, cut):
    server = fake()
    with pytest.raises(ValueError, match=r"temperature = 0\.7 with top_p, top_k or min_p: vLLM"):
        make_sampler(server, temperature=0.7, **cut)
    assert server.paths() == []


@pytest.mark.parametrize(
    ("top", "why"),
    [
        ([0.0, -0.1, -0.2, -0.3], "top_logprobs are not log-probs"),  # logits
        ([-3.0] * 4, "its most probable tokens are equally probable"),
        ([], "top_logprobs are not log-probs"),
        ([-0.5, float("nan")], r"top_logprobs\[1\] must be finite"),
    ],
)
def test_a_server_that_does_not_show_its_log_probs_is_refused(fake, top, why):
    server = fake()
    server.top = lambda temperature: {f"token_id:{i}": each for i, each in enumerate(top)}
    with pytest.raises(ValueError, match=f"{server.url} does not show its --logprobs-mode: {why}"):
        make_sampler(server)


def test_prompts_are_spread_by_load(fake):
    servers = [fake(), fake()]
    sampler = make_sampler(*servers)

    async def run():
        for server in servers:
            server.gate.clear()
        large = asyncio.create_task(sampler.sample_one("a", 5))
        while not servers[0].completions() + servers[1].completions():
            await asyncio.sleep(0.005)
        small = [asyncio.create_task(sampler.sample_one("b", 1)) for _ in range(4)]
        while sum(len(server.completions()) for server in servers) < 5:
            await asyncio.sleep(0.005)
        for server in servers:
            server.gate.set()
        await asyncio.gather(large, *small)

    asyncio.run(run())
    assert sorted(len(server.completions()) for server in servers) == [1, 4]


@pytest.mark.parametrize("form", ["sample_one", "stream_one"])
def test_to_cancel_closes_the_connection(fake, form):
    server = fake()
    sampler = make_sampler(server)
    server.gate.clear()

    async def draw():
        if form == "sample_one":
            await sampler.sample_one("a", 2)
        else:
            await anext(sampler.stream_one("a", 2))

    async def run():
        task = asyncio.create_task(draw())
        while not server.completions():
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert server.dropped.wait(10)
    server.gate.set()
    assert len(sampler.sample(["a"], 1)) == 1


def test_prompts_that_do_not_fit_are_named_before_anything_is_sent(fake):
    server = fake(context=20)
    sampler = make_sampler(server, fake(context=30))
    assert sampler.max_prompt_tokens == 12
    with pytest.raises(ValueError, match=r"prompts\[1\] has 13 tokens, wanted 1 to 12 .* = 8"):
        sampler.sample(["a", "b" * 13], 1)
    with pytest.raises(ValueError, match=r"prompts\[0\] has 0 tokens"):
        asyncio.run(sampler.sample_one("", 1))
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        sampler.sample(["a"], 0)
    assert server.completions() == []
    with pytest.raises(ValueError, match="max_new_tokens = 20 leaves no room"):
        make_sampler(server, max_new_tokens=20)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"urls": []}, ValueError, "urls must name at least one server"),
        ({"urls": 3}, TypeError, "urls must be a string or a list of strings, got int 3"),
        ({"urls": ["localhost:8000"]}, ValueError, "urls must begin with http:// or https://"),
        ({"urls": ["http://a", "http://a/v1/"]}, ValueError, "urls must differ"),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1"),
        ({"temperature": -1.0}, ValueError, "temperature must be >= 0"),
        ({"top_p": 0.0}, ValueError, "top_p must be > 0"),
        ({"temperature": 0, "top_p": 0.9}, ValueError, "top_p has no effect at temperature 0"),
        ({"top_k": -1}, ValueError, "top_k must be >= 0"),
        ({"top_k": 2.5}, TypeError, "top_k must be an int"),
        ({"min_p": 1.1}, ValueError, "min_p must be <= 1"),
        ({"temperature": 0, "top_k": 5}, ValueError, "top_k has no effect at temperature 0, got 5"),
        ({"urls": "http://[::1"}, ValueError, "urls must be valid, got"),
        ({"timeout": 0}, ValueError, "timeout must be > 0"),
        ({"rest": -1}, ValueError, "rest must be >= 0"),
        ({"max_retries": -1}, ValueError, "max_retries must be >= 0"),
        ({"max_requests": 0}, ValueError, "max_requests must be >= 1"),
    ],
)
def test_wrong_options(options, error, match):
    with pytest.raises(error, match=match):
        VllmServerSampler(
            **{"urls": "http://a", "tokenizer": Letters(), "max_new_tokens": 8, **options}
        )


def test_no_more_requests_than_allowed_are_under_way(fake):
    server = fake()
    sampler = make_sampler(server, max_requests=2)
    server.gate.clear()
    thread = threading.Thread(target=sampler.sample, args=(["a"] * 5, 1))
    thread.start()
    until(lambda: len(server.completions()) == 2)
    threading.Event().wait(0.2)
    assert len(server.completions()) == 2
    server.gate.set()
    thread.join(10)
    assert len(server.completions()) == 5
