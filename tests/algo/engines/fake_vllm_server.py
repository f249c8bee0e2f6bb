"""A server that speaks vLLM's HTTP and draws made-up tokens, as sound or broken as a test asks."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import log

import pytest

from igrpo_algo.engines.vllm import VllmServerSampler


class Letters:
    """A tokenizer of letters: a is 5."""

    eos_token_id, unk_token_id = 2, None

    def __len__(self):
        return 100

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 92 for letter in text]}

    def convert_ids_to_tokens(self, ids):
        return [chr(token + 92) for token in ids]

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


def make_sampler(*servers, **options):
    urls = [getattr(server, "url", server) for server in servers]
    return VllmServerSampler(urls, Letters(), **{"max_new_tokens": 8, "rest": 60, **options})


def until(condition):
    for _ in range(2000):
        if condition():
            return
        threading.Event().wait(0.005)
    pytest.fail("it never came to that")


def drawn_ids(prompt, seed):
    """Three tokens that tell which prompt and seed drew them."""
    return [sum(prompt) % 90 + 5, seed % 90 + 5, 2]


class FakeServer:
    """Answers on a port of its own until it is stopped.

    Attributes:
        requests: (path, body) of all requests so far.
        answers: What to answer with instead, by path: (status, body), or with further headers
            (status, body, headers), or a function that makes it. A body is JSON, or bytes as they
            are, or an iterator of bytes that come one after the other.
        gate: Completions wait until it is set.
        dropped: Set when a client went away before its completion was done.
    """

    def __init__(self, model="tiny", root="", context=64, raw=False):
        self.model, self.root, self.context, self.raw = model, str(root), context, raw
        self.requests = []
        self.answers = {}
        self.gate = threading.Event()
        self.gate.set()
        self.dropped = threading.Event()
        self._server = None
        self.start()

    def start(self, port=0):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                fake.handle(self, None)

            def do_POST(self):
                length = int(self.headers.get("Content-Length", 0))
                fake.handle(self, json.loads(self.rfile.read(length) or "null"))

            def log_message(self, *args):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self):
        self._server.shutdown()
        self._server.server_close()

    def paths(self):
        return [path for path, _ in self.requests]

    def completions(self):
        """Bodies of the requests for completions, without the probes of log-probs."""
        return [
            body for path, body in self.requests if path == "/v1/completions" and "seed" in body
        ]

    def handle(self, handler, body):
        self.requests.append((handler.path, body))
        plain = handler.path.partition("?")[0]
        status, answer, headers = 200, None, {}
        if plain in self.answers:
            given = self.answers[plain]
            status, answer, headers = [*(given(body) if callable(given) else given), {}][:3]
        elif plain == "/v1/models":
            card = {"id": self.model, "root": self.root, "max_model_len": self.context}
            answer = {"object": "list", "data": [card]}
        elif plain == "/v1/completions":
            answer = self.complete(body)
            while not self.gate.wait(0.01):
                if is_gone(handler.connection):
                    self.dropped.set()
                    return
        if isinstance(answer, dict | list):
            answer = json.dumps(answer).encode()
        with suppress(BrokenPipeError, ConnectionResetError):  # who asked may be gone
            handler.send_response(status)
            for name, value in headers.items():
                handler.send_header(name, value)
            parts = [answer or b""] if isinstance(answer, bytes | None) else answer
            if isinstance(parts, list):
                handler.send_header("Content-Length", str(len(parts[0])))
            handler.end_headers()
            for part in parts:
                handler.wfile.write(part)

    def complete(self, body):
        if "seed" not in body:
            return {"choices": [{"logprobs": {"top_logprobs": [self.top(body["temperature"])]}}]}
        wanted = body["logprobs"] is not None
        choices = [
            {
                "index": index,
                "token_ids": drawn_ids(body["prompt"], body["seed"] + index),
                "prompt_token_ids": body["prompt"],
                "logprobs": {"token_logprobs": [-0.5, -0.25, -float(index)]} if wanted else None,
                "finish_reason": "stop",
            }
            for index in range(body["n"])
        ]
        size = len(body["prompt"])
        usage = {"prompt_tokens": size, "prompt_tokens_details": {"cached_tokens": size // 2}}
        return {"choices": choices[::-1], "usage": usage}

    def top(self, temperature):
        weights = {
            f"token_id:{i}": (i + 1.0) ** (1 if self.raw else 1 / temperature) for i in range(5)
        }
        total = sum(weights.values())
        return {token: log(weight / total) for token, weight in weights.items()}


def is_gone(connection):
    """Whether the other side has closed the connection."""
    connection.settimeout(0.001)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    finally:
        connection.settimeout(None)
