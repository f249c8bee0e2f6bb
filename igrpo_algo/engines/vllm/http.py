"""One vLLM server: the requests over HTTP, and what its failures mean."""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

from ..distribution import Distribution
from .answers import Answer, logprobs_mode, read_card, read_completions, read_top_logprobs
from .connection import Connection, ServerBusyError, ServerDownError, retry_seconds
from .logprobs import check_mode

MAX_BYTES = 1 << 20  # of an answer, completions aside
MAX_BYTES_PER_TOKEN = 1024  # of a completion; its id, log-prob, text and offset take about 100

PROBE = [1, 2, 3, 4, 5, 6, 7]  # any text does; token 0 alone may be padding, with an embedding of 0

# Left out, a server fills these from the model's generation config.
NO_PENALTIES = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
NO_CUT = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}


class Server:
    """A server and what is known of it.

    Attributes:
        url: Where it is.
        model: Name of its model; None until it was contacted.
        context: Maximum tokens of a prompt and its completion.
        root: Where it has its model from.
        in_flight: Completions that it is drawing.
        outdated: Why its weights may be old; None if they are not.
    """

    def __init__(self, url: str, model: str | None, connection: Connection) -> None:
        self.url = url
        self.model: str | None = None
        self.context = 0
        self.root = ""
        self.in_flight = 0
        self.outdated: str | None = None
        self.wanted_model = model
        self._connection = connection
        self._rests_until = 0.0

    @property
    def is_resting(self) -> bool:
        """Whether it recently did not answer or was busy."""
        return time.monotonic() < self._rests_until

    async def contact(self, client: Any, distribution: Distribution | None) -> None:
        """Ask for its model, and check that a loss can use its log-probs, where any are wanted.

        Raises:
            ServerDownError: It does not answer.
            ValueError: It is not a vLLM server, lacks the model, or gives other log-probs.
        """
        listing = await self._call(client, "GET", "/v1/models", alien=ValueError)
        try:
            card = read_card(listing, self.wanted_model)
        except LookupError as error:
            raise ValueError(f"{self.url} serves {error.args[0]}") from error
        except ValueError as error:
            raise ValueError(
                f"{self.url} is not a vLLM server: it lists {_short(listing)}"
            ) from error
        if distribution is not None:
            mode = await self._find_mode(client, card.name)
            check_mode(mode, distribution, self.url, "--logprobs-mode {}")
        self.model, self.context, self.root = card.name, card.context, card.root

    async def complete(self, client: Any, request: Mapping[str, Any], vocabulary: int) -> Answer:
        """Draw completions of one prompt.

        Raises:
            ServerBusyError: It wants to be asked later.
            ServerDownError: It does not answer, or broke.
            RuntimeError: It refused the request, or its answer is not one to it.
        """
        body = {"model": self.model, "return_token_ids": True, **NO_PENALTIES, **request}
        per_choice = MAX_BYTES_PER_TOKEN * request["max_tokens"] + 16 * len(request["prompt"])
        max_bytes = MAX_BYTES + request["n"] * per_choice
        answer = await self._call(client, "POST", "/v1/completions", body, max_bytes=max_bytes)
        try:
            return read_completions(answer, request, vocabulary)
        except ValueError as error:
            raise RuntimeError(
                f"{self.url} gave no answer to its request (is it an old vLLM?): {error}"
            ) from error

    async def pause(self, client: Any) -> None:
        """Finish what has begun, and begin nothing new."""
        await self._call(client, "POST", "/pause?mode=wait")

    async def resume(self, client: Any) -> None:
        """Go on."""
        await self._call(client, "POST", "/resume")

    async def reload(self, client: Any, folder: str) -> None:
        """Read weights from a folder, and forget the prefix cache, which the old ones filled."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._call(client, "POST", "/collective_rpc", call)
        await self._call(client, "POST", "/reset_prefix_cache")

    async def _find_mode(self, client: Any, model: str) -> str:
        """Find out which log-probs the server gives, by one token at each of two temperatures."""
        request = {
            "model": model,
            "prompt": PROBE,
            "max_tokens": 1,
            "logprobs": 5,
            "return_tokens_as_token_ids": True,
            **NO_CUT,
            **NO_PENALTIES,
        }
        bodies = [{**request, "temperature": temperature} for temperature in (1.0, 2.0)]
        answers = [await self._call(client, "POST", "/v1/completions", body) for body in bodies]
        try:
            return logprobs_mode(*map(read_top_logprobs, answers))
        except ValueError as error:
            raise ValueError(f"{self.url} does not show its --logprobs-mode: {error}") from error

    async def _call(
        self,
        client: Any,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        alien: type[Exception] = RuntimeError,
        max_bytes: int = MAX_BYTES,
    ) -> Any:
        """Send a request and read the JSON that comes back; an empty body is None."""
        import httpx2

        content = bytearray()
        try:
            async with (
                asyncio.timeout(self._connection.timeout),
                client.stream(method, self.url + path, json=body) as response,
            ):
                async for part in response.aiter_bytes():
                    content += part
                    if len(content) > max_bytes:
                        raise alien(f"{self.url}{path} answered with more than {max_bytes} bytes")
        except TimeoutError as error:
            why = f"no whole answer within {self._connection.timeout} s"
            raise self._down(why) from error
        except httpx2.RequestError as error:
            raise self._down(f"{type(error).__name__} {error}".strip()) from error
        status, told = response.status_code, _short(content[:200].decode(errors="replace"))
        if status in (429, 503):
            raise self._busy(f"status {status}, {told}", response.headers.get("Retry-After"))
        if status >= 500:
            raise self._down(f"status {status}, {told}")
        self._rests_until = 0.0
        if status == 404 and path.partition("?")[0] in _DEV_PATHS:
            raise RuntimeError(
                f"{self.url} has no {path}: start it with VLLM_SERVER_DEV_MODE=1 to sync weights"
            )
        if status != 200:
            raise alien(f"{self.url}{path} answered with status {status}: {told}")
        if not content:
            return None
        try:
            return json.loads(content)
        except (ValueError, RecursionError) as error:
            raise alien(f"{self.url} is not a vLLM server: {path} answered with {told}") from error

    def _down(self, why: str) -> ServerDownError:
        self._rests_until = time.monotonic() + self._connection.rest
        return ServerDownError(f"{self.url} ({why})")

    def _busy(self, why: str, header: str | None) -> ServerBusyError:
        seconds = retry_seconds(header)
        self._rests_until = time.monotonic() + (seconds or 0.0)
        return ServerBusyError(f"{self.url} ({why})", seconds)


_DEV_PATHS = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache")


def _short(content: object) -> str:
    shown = repr(content)
    return shown if len(shown) <= 120 else shown[:117] + "..."
