"""The HTTP sampler against made-up servers: what it sends, to whom, and what it does in trouble."""

import asyncio
import http.server
import socket
import sys
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_vllm_server import FakeServer, drawn_ids
from transformers import LlamaConfig, LlamaForCausalLM

from igrpo_algo.engines.base import request_seed
from igrpo_algo.engines.vllm import VllmSampler, VllmServerSampler
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.sampling import sample_group

pytestmark = pytest.mark.filterwarnings("error")


class Letters:
    """A tokenizer of letters: a is 5."""

    eos_token_id = 2

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 92 for letter in text]}

    def convert_tokens_to_ids(self, token):
        return None

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(token + 92) for token in ids if token > 4)

    def apply_chat_template(self, messages, **options):
        assert options == {
            "add_generation_prompt": True,
            "continue_final_message": False,
            "tokenize": True,
            "return_dict": False,
        }
        return [1, *(token for m in messages for token in self(m["content"])["input_ids"]), 3]


@pytest.fixture
def fake():
    """Makes servers, and stops them."""
    made = []

    def make(**options):
        made.append(FakeServer(**options))
        return made[-1]

    yield make
    for server in made:
        server.gate.set()
        server.stop()


def make_sampler(*servers, **options):
    urls = [getattr(server, "url", server) for server in servers]
    return VllmServerSampler(urls, Letters(), **{"max_new_tokens": 8, "retry_after": 60, **options})


def free_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


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
    make_sampler(server, temperature=0.7, top_p=0.9).sample(["a"], 3, seed=[1], priority=2)
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
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": [2],
        "ignore_eos": False,
        "logprobs": 0,
        "return_token_ids": True,
        "priority": 2,
    }
    assert (second["stop_token_ids"], second["ignore_eos"]) == ([2, 9], True)
    assert "priority" not in second
    assert 0 <= request_seed(2**63 - 1) < 2**62


def test_at_temperature_zero_there_are_no_log_probs_and_no_probe(fake):
    server = fake(raw=True)
    (group,) = make_sampler(server, temperature=0).sample(["a"], 3)
    assert [completion.logprobs for completion in group] == [None] * 3
    assert server.completions()[0]["n"] == 1
    assert server.paths() == ["/v1/models", "/v1/completions"]


def test_a_server_of_raw_log_probs_is_refused(fake):
    server = fake(raw=True)
    with pytest.raises(ValueError, match=f"{server.url} gives log-probs before the temperature"):
        make_sampler(fake(), server)


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


def test_a_dead_server_is_left_out_and_its_requests_go_on(fake):
    doomed, other = fake(), fake()
    sampler = make_sampler(doomed, other)
    doomed.stop()
    groups = sampler.sample(["a", "b", "c"], 2, seed=0)
    assert len(other.completions()) == 3
    assert [len(group) for group in groups] == [2, 2, 2]
    doomed.start(doomed.port)
    sampler.sample(["a", "b"], 1)
    assert (len(doomed.completions()), len(other.completions())) == (0, 5)
    sampler = make_sampler(doomed, other, retry_after=0)
    sampler.sample(["a", "b"], 1)
    assert len(doomed.completions()) == 1


def test_all_dead_are_asked_once_more_and_named(fake):
    servers = [fake(), fake()]
    sampler = make_sampler(*servers)
    for server in servers:
        server.stop()
    for _ in range(2):
        with pytest.raises(ConnectionError, match="no vLLM server answers") as caught:
            sampler.sample(["a"], 1)
        assert all(server.url in str(caught.value) for server in servers)
    servers[1].start(servers[1].port)
    assert len(sampler.sample(["a"], 2)[0]) == 2


def test_a_server_that_is_not_there_yet_may_come(fake):
    late = fake()
    late.stop()
    other = fake()
    sampler = make_sampler(late, other, retry_after=0)
    late.start(late.port)
    other.stop()
    assert len(sampler.sample(["a"], 2)[0]) == 2
    late.model = "another"
    other.start(other.port)
    late.stop()
    sampler = make_sampler(late, other, retry_after=0)
    late.start(late.port)
    other.stop()
    with pytest.raises(ValueError, match=f"{late.url} serves no model 'tiny', only .'another'."):
        sampler.sample(["a"], 2)


def test_nobody_there():
    url = free_url()
    with pytest.raises(ConnectionError, match=f"no vLLM server answers: {url} .ConnectError"):
        make_sampler(url)


@pytest.mark.parametrize("status", [500, 503])
def test_a_server_that_says_it_is_broken_counts_as_dead(fake, status):
    broken, other = fake(), fake()
    sampler = make_sampler(broken, other)
    broken.answers["/v1/completions"] = (status, {"error": "engine dead"})
    assert len(sampler.sample(["a", "b"], 1)) == 2
    assert len(other.completions()) == 2
    other.answers["/v1/completions"] = (status, b"oops")
    with pytest.raises(ConnectionError, match=f"status {status}"):
        sampler.sample(["a"], 1)


def test_a_refusal_is_told_and_not_tried_elsewhere(fake):
    servers = [fake(), fake()]
    sampler = make_sampler(*servers)
    for server in servers:
        server.answers["/v1/completions"] = (400, {"error": {"message": "bad seed"}})
    with pytest.raises(RuntimeError, match=r"answered with status 400: .*bad seed"):
        sampler.sample(["a"], 1)
    assert len(servers[0].completions()) + len(servers[1].completions()) == 1


@contextmanager
def plain_http_server(folder):
    """Python's own server of files: HTML where there is an index, 404 elsewhere."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_url_of_something_else_is_named(fake, tmp_path):
    with plain_http_server(tmp_path) as url:
        with pytest.raises(ValueError, match=f"{url}/v1/models answered with status 404"):
            make_sampler(fake(), url)
        (tmp_path / "v1").mkdir()
        (tmp_path / "v1" / "models").write_text("<html>hello</html>")
        with pytest.raises(ValueError, match=f"{url} is no vLLM server: .*<html>hello"):
            make_sampler(url)


@pytest.mark.parametrize(
    "listing",
    [
        {"data": []},
        {"data": [{"id": "gpt"}]},
        {"data": [{"id": "gpt", "max_model_len": None, "root": "x"}]},
        ["data"],
        {"detail": "hello"},
    ],
)
def test_a_server_of_another_kind_is_named(fake, listing):
    server = fake()
    server.answers["/v1/models"] = (200, listing)
    with pytest.raises(ValueError, match=f"{server.url} is no vLLM server: it lists"):
        make_sampler(server)


def test_servers_must_have_the_model_and_the_same_one(fake):
    one, other = fake(), fake(model="other")
    with pytest.raises(ValueError, match=r"serves no model 'tiny', only \['other'\]"):
        make_sampler(other, model="tiny")
    with pytest.raises(ValueError, match=r"urls must serve one model: .*'tiny'.*'other'"):
        make_sampler(one, other)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"token_ids": None}, "gave no token ids and log-probs"),
        ({"logprobs": None}, "gave no token ids and log-probs"),
        ({"prompt_token_ids": [5]}, "drew from another prompt than it was sent"),
        ({"finish_reason": "abort"}, "gave a completion up: finish reason 'abort'"),
    ],
)
def test_an_answer_that_is_not_whole_is_an_error(fake, change, match):
    server = fake()
    sampler = make_sampler(server)
    sound = server.complete

    def changed(body):
        answer = sound(body)
        answer["choices"][0].update(change)
        return 200, answer

    server.answers["/v1/completions"] = changed
    with pytest.raises(RuntimeError, match=match):
        sampler.sample(["ab"], 1)


def test_an_answer_with_too_few_completions_is_an_error(fake):
    server = fake()
    sampler = make_sampler(server)
    server.answers["/v1/completions"] = lambda body: (200, server.complete({**body, "n": 1}))
    with pytest.raises(ValueError, match="sampler must return n = 2 completions per prompt, got 1"):
        sample_group(["ab"], sampler, 2)


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
        ({"timeout": 0}, ValueError, "timeout must be > 0"),
        ({"retry_after": -1}, ValueError, "retry_after must be >= 0"),
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


def until(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    pytest.fail("it never came to that")


def test_without_vllm_the_sampler_in_process_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"VllmSampler needs vLLM.*pip install vllm"):
        VllmSampler("some/folder", max_new_tokens=4)


# Weights


def make_model(seed, tie):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tie,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def root(tmp_path):
    make_model(0, tie=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def steps(server):
    return [path for path in server.paths() if not path.startswith("/v1")]


ALL_STEPS = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]


@pytest.mark.parametrize("form", ["state dict", "folder"])
def test_each_server_reads_a_folder_with_every_name_and_forgets_its_cache(
    fake, root, tmp_path, form
):
    from safetensors.torch import load_file

    model = make_model(1, tie=True)
    read = []

    def reload(body):
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        assert folder.is_absolute()
        files = [load_file(path) for path in folder.glob("*.safetensors")]
        read.append({name: tensor for file in files for name, tensor in file.items()})
        return 200, {"results": [None]}

    servers = [fake(root=root), fake(root=root)]
    for server in servers:
        server.answers["/collective_rpc"] = reload
    sampler = make_sampler(*servers, sync_folder=tmp_path / "sync")
    (tmp_path / "sync").mkdir()
    model.save_pretrained(tmp_path / "new" / "step-1")
    given = model.state_dict() if form == "state dict" else tmp_path / "new" / "step-1"
    sampler.sync_weights(given)
    assert [steps(server) for server in servers] == [ALL_STEPS] * 2
    assert len(read) == 2
    for weights in read:
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert list((tmp_path / "sync").iterdir()) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step-1"]


def test_weights_that_do_not_fit_reach_no_server(fake, root):
    server = fake(root=root)
    sampler = make_sampler(server)
    weights = make_model(1, tie=True).state_dict()
    with pytest.raises(ValueError, match="1 unknown names"):
        sampler.sync_weights({**weights, "adapter": torch.zeros(2)})
    with pytest.raises(TypeError, match="weights must be a state dict or a folder"):
        sampler.sync_weights(3)
    assert steps(server) == []
    assert len(sampler.sample(["a"], 1)) == 1


def test_if_one_cannot_pause_none_is_written_and_the_others_go_on(fake, root):
    servers = [fake(root=root), fake(root=root)]
    servers[1].answers["/pause"] = (404, {"detail": "Not Found"})
    sampler = make_sampler(*servers)
    with pytest.raises(RuntimeError, match=f"{servers[1].url} has no /pause.*VLLM_SERVER_DEV_MODE"):
        sampler.sync_weights(make_model(1, tie=True).state_dict())
    assert steps(servers[0]) == ["/pause?mode=wait", "/resume"]
    assert steps(servers[1]) == ["/pause?mode=wait"]
    assert len(sampler.sample(["a", "b"], 1)) == 2


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
@pytest.mark.parametrize("status", [400, 500])
def test_if_one_fails_to_read_the_sampler_draws_no_more(fake, root, path, status):
    servers = [fake(root=root), fake(root=root)]
    servers[1].answers[path] = (status, {"error": "no space"})
    sampler = make_sampler(*servers)
    weights = make_model(1, tie=True).state_dict()
    with pytest.raises(RuntimeError, match="half old and half new") as caught:
        sampler.sync_weights(weights)
    assert servers[1].url in str(caught.value.__cause__)
    assert all(steps(server)[-1] == "/resume" for server in servers)
    for call in (partial(sampler.sample, ["a"], 1), partial(sampler.sync_weights, weights)):
        with pytest.raises(RuntimeError, match="half old and half new"):
            call()
    with pytest.raises(RuntimeError, match="half old and half new"):
        asyncio.run(sampler.sample_one("a", 1))
    assert servers[0].completions() + servers[1].completions() == []


def test_a_server_that_a_sync_does_not_reach_draws_nothing_until_one_does(fake, root):
    gone, there = fake(root=root), fake(root=root)
    sampler = make_sampler(gone, there, retry_after=0)
    gone.stop()
    weights = make_model(1, tie=True).state_dict()
    with pytest.warns(UserWarning, match=f"left out until a later sync_weights.*{gone.url}"):
        sampler.sync_weights(weights)
    gone.start(gone.port)  # with old weights, for all we know
    sampler.sample(["a", "b"], 1)
    assert (len(gone.completions()), len(there.completions())) == (0, 2)
    sampler.sync_weights(weights)
    sampler.sample(["a", "b"], 1)
    assert (len(gone.completions()), len(there.completions())) == (1, 3)


def test_a_server_that_drops_out_after_a_sync_draws_nothing_until_the_next(fake, root):
    servers = [fake(root=root), fake(root=root)]
    sampler = make_sampler(*servers, retry_after=0)
    weights = make_model(1, tie=True).state_dict()
    sampler.sync_weights(weights)
    servers[0].stop()
    sampler.sample(["a", "b"], 1)
    servers[0].start(servers[0].port)
    sampler.sample(["a", "b"], 1)
    assert (len(servers[0].completions()), len(servers[1].completions())) == (0, 4)
    servers[1].stop()
    with pytest.raises(ConnectionError, match=f"{servers[0].url}.*it may have old weights"):
        sampler.sample(["a"], 1)
    servers[1].start(servers[1].port)
    sampler.sync_weights(weights)
    sampler.sample(["a", "b"], 1)
    assert len(servers[0].completions()) == 1


def test_a_sync_that_reaches_nobody_is_an_error_and_no_sync(fake, root):
    server = fake(root=root)
    sampler = make_sampler(server)
    server.stop()
    with pytest.raises(ConnectionError, match=f"no vLLM server answers: {server.url}"):
        sampler.sync_weights(make_model(1, tie=True).state_dict())
    server.start(server.port)
    assert len(sampler.sample(["a"], 1)) == 1
