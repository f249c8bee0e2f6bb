"""The HTTP sampler in trouble: servers that are gone, busy, slow, broken, or something else."""

import gzip
import http.server
import json
import math
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from itertools import repeat

import pytest
from fake_vllm_server import make_sampler

from igrpo_algo.engines.vllm.connection import MAX_WAIT, retry_seconds

pytestmark = pytest.mark.filterwarnings("error")


def free_url():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


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
    sampler = make_sampler(doomed, other, rest=0)
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
    sampler = make_sampler(late, other, rest=0)
    late.start(late.port)
    other.stop()
    assert len(sampler.sample(["a"], 2)[0]) == 2
    late.model = "another"
    other.start(other.port)
    late.stop()
    sampler = make_sampler(late, other, rest=0)
    late.start(late.port)
    other.stop()
    with pytest.raises(ValueError, match=f"{late.url} serves no model 'tiny', only .'another'."):
        sampler.sample(["a"], 2)


def test_nobody_there():
    url = free_url()
    with pytest.raises(ConnectionError, match=f"no vLLM server answers: {url} .ConnectError"):
        make_sampler(url)


@pytest.mark.parametrize("status", [500, 502])
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
        with pytest.raises(ValueError, match=f"{url} is not a vLLM server: .*<html>hello"):
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
    with pytest.raises(ValueError, match=f"{server.url} is not a vLLM server: it lists"):
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
        ({"token_ids": None}, "token_ids must be a list, got NoneType"),
        ({"token_ids": [5, 6.0, 2]}, r"token_ids\[1\] must be an int in .* got float 6.0"),
        ({"token_ids": [5, True, 2]}, r"token_ids\[1\] must be an int in .* got bool True"),
        ({"token_ids": [5, "6", 2]}, r"token_ids\[1\] must be an int in .* got str '6'"),
        ({"token_ids": [5, 6, -1]}, r"token_ids\[2\] must be an int in \[0, 4196\), got int -1"),
        ({"token_ids": [10**9, 6, 2]}, r"token_ids\[0\] must be an int in \[0, 4196\), got int 10"),
        ({"token_ids": [5] * 9}, "token_ids holds 9, max_tokens was 8"),
        ({"token_ids": [5, 2]}, "3 token_logprobs for 2 token_ids"),
        ({"logprobs": None}, "logprobs must be a dict, got NoneType"),
        ({"logprobs": {"token_logprobs": None}}, "token_logprobs must be a list, got NoneType"),
        *[
            ({"logprobs": {"token_logprobs": [-0.5, bad, -1]}}, r"token_logprobs\[1\] must be fin")
            for bad in (
                float("nan"),
                -math.inf,
                math.inf,
                0.5,
                None,
                "-1",
                True,
                -(10**400),
                -1e300,
            )
        ],
        ({"index": 1}, r"the indices of n = 1 choices are \[1\]"),
        ({"index": None}, "index must be an int, got NoneType"),
        ({"prompt_token_ids": [5]}, "prompt_token_ids are not those that were sent"),
        ({"finish_reason": "abort"}, "a completion was given up: 'abort'"),
        ({"finish_reason": None}, "a completion was given up: None"),
    ],
)
def test_an_answer_that_is_not_sound_is_an_error(fake, change, match):
    server = fake()
    sampler = make_sampler(server)
    sound = server.complete

    def changed(body):
        answer = sound(body)
        answer["choices"][0].update(change)
        return 200, json.dumps(answer).encode()

    server.answers["/v1/completions"] = changed
    with pytest.raises(RuntimeError, match=f"{server.url} gave no answer to its request.*{match}"):
        sampler.sample(["ab"], 1)


@pytest.mark.parametrize("drawn", [0, 1, 3])
def test_an_answer_with_another_number_of_completions_is_an_error(fake, drawn):
    server = fake()
    sampler = make_sampler(server)
    server.answers["/v1/completions"] = lambda body: (200, server.complete({**body, "n": drawn}))
    with pytest.raises(RuntimeError, match="the indices of n = 2 choices are"):
        sampler.sample(["ab"], 2)


@pytest.mark.parametrize(
    "usage",
    [
        *(None, {}, {"prompt_tokens": "3"}, {"prompt_tokens": -3}),
        *({"prompt_tokens": 3, "prompt_tokens_details": bad} for bad in ("none", [1], 0)),
        {"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": -1}},
    ],
)
def test_an_answer_without_usage_is_an_error(fake, usage):
    server = fake()
    sampler = make_sampler(server)
    changed = {"usage": usage}
    server.answers["/v1/completions"] = lambda body: (200, {**server.complete(body), **changed})
    with pytest.raises(RuntimeError, match="gave no answer to its request"):
        sampler.sample(["ab"], 1)


def test_answers_are_taken_in_the_order_of_their_indices(fake):
    server = fake()
    (group,) = make_sampler(server).sample(["ab"], 3, seed=[0])
    assert [completion.logprobs[-1] for completion in group] == [0.0, -1.0, -2.0]


# Busy


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(fake, status):
    server = fake()
    sampler = make_sampler(server)
    refusals = iter([(status, {"error": "full"}, {"Retry-After": "0"})] * 3)
    server.answers["/v1/completions"] = lambda body: next(refusals, (200, server.complete(body)))
    assert len(sampler.sample(["a"], 2)[0]) == 2
    assert len(server.completions()) == 4


def test_a_request_goes_to_a_server_that_is_not_busy(fake):
    busy, free = fake(), fake()
    sampler = make_sampler(busy, free)
    busy.answers["/v1/completions"] = (429, {"error": "full"}, {"Retry-After": "60"})
    assert len(sampler.sample(["a", "b", "c"], 1)) == 3
    assert len(free.completions()) == 3
    assert len(busy.completions()) <= 3


def test_the_wait_is_what_the_server_says_and_else_grows(fake, monkeypatch):
    waits = []

    async def no_wait(seconds):
        waits.append(seconds)

    server, gone = fake(), fake()
    sampler = make_sampler(server, gone, max_retries=4)
    gone.stop()
    monkeypatch.setattr("igrpo_algo.engines.vllm.pool.asyncio.sleep", no_wait)
    told = iter(["7", None, "86400", None, None])

    def refuse(body):
        value = next(told)
        return 429, {"error": "full"}, {} if value is None else {"Retry-After": value}

    server.answers["/v1/completions"] = refuse
    with pytest.raises(ConnectionError, match=f"{server.url} .status 429") as caught:
        sampler.sample(["a"], 1)
    assert gone.url in str(caught.value)
    assert waits == [7.0, 2.0, MAX_WAIT, 8.0]
    assert len(server.completions()) == 5


def test_the_header_of_a_busy_server_is_a_number_or_a_date():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
    assert 15 < retry_seconds(soon) <= 20
    assert retry_seconds(format_datetime(datetime.now(UTC) - timedelta(days=1))) == 0
    assert retry_seconds("3") == 3
    assert retry_seconds("9" * 400) == MAX_WAIT
    assert [retry_seconds(odd) for odd in (None, "", "soon", "-1", "1.5", "\u00b2")] == [None] * 6


# Slow and large


def test_the_time_out_is_a_deadline_over_the_whole_answer(fake):
    server = fake()
    sampler = make_sampler(server, timeout=0.5, max_retries=0)

    def trickle():
        for _ in range(200):
            time.sleep(0.05)
            yield b" "

    server.answers["/v1/completions"] = lambda body: (200, trickle())
    with pytest.raises(ConnectionError, match=r"no whole answer within 0\.5 s"):
        sampler.sample(["a"], 1)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_an_endless_answer_is_cut_off(fake, path, is_packed):
    server = fake()
    sampler = make_sampler(server) if path == "/v1/completions" else None
    large = b" " * (1 << 22)

    def flood(body=None):
        if is_packed:
            return 200, gzip.compress(large), {"Content-Encoding": "gzip"}
        return 200, repeat(large)

    server.answers[path] = flood
    with pytest.raises((RuntimeError, ValueError), match=r"answered with more than \d+ bytes"):
        sampler.sample(["a"], 1) if sampler else make_sampler(server)


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b"{", b"\xff\xfe", b"NaN", b"null", b"[]", b'{"choices": {}}']
)
def test_an_answer_that_is_not_the_json_of_vllm_is_named(fake, content):
    server = fake()
    sampler = make_sampler(server)
    server.answers["/v1/completions"] = (200, content)
    with pytest.raises(RuntimeError, match=server.url):
        sampler.sample(["a"], 1)


def test_a_broken_encoding_counts_as_a_broken_server(fake):
    server = fake()
    sampler = make_sampler(server)
    server.answers["/v1/completions"] = (200, b"not gzip", {"Content-Encoding": "gzip"})
    with pytest.raises(ConnectionError, match="DecodingError"):
        sampler.sample(["a"], 1)
