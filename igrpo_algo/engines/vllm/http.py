"""One vLLM server: what is asked of it over HTTP, and what its answers must look like."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from igrpo_kernels.checks import describe

CONNECT_TIMEOUT = 5.0

# Left out, a server fills these from the model's generation config.
PLAIN_SAMPLING = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class ServerDownError(ConnectionError):
    """A server that does not answer, or says that it is broken: another one may."""


class Drawn(NamedTuple):
    """One completion as a server gave it."""

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class Answer(NamedTuple):
    """The completions of one prompt, and how many of its tokens were in the prefix cache."""

    completions: list[Drawn]
    prompt_tokens: int
    cached_tokens: int


class Server:
    """A server and what is known of it.

    Attributes:
        url: Where it is.
        model: Name of its model; None until it was contacted.
        context: Most tokens of a prompt and its completion.
        root: Where it has its model from.
        in_flight: Completions that it is drawing.
        outdated: Why its weights may be old; None if they are not.
    """

    def __init__(self, url: str, model: str | None, retry_after: float) -> None:
        self.url = url
        self.model: str | None = None
        self.context = 0
        self.root = ""
        self.in_flight = 0
        self.outdated: str | None = None
        self.wanted_model = model
        self._retry_after = retry_after
        self._rests_until = 0.0

    @property
    def is_resting(self) -> bool:
        """Whether it did not answer a short while ago."""
        return time.monotonic() < self._rests_until

    async def contact(self, client: Any, needs_logprobs: bool) -> None:
        """Ask for its model, and check that its log-probs are those of the distribution that draws.

        Raises:
            ServerDownError: It does not answer.
            ValueError: It is no vLLM server, has not the model, or gives other log-probs.
        """
        listing = await self._call(client, "GET", "/v1/models", alien=ValueError)
        try:
            cards = {card["id"]: card for card in listing["data"]}
            wanted = next(iter(cards)) if self.wanted_model is None else self.wanted_model
            if wanted not in cards:
                raise ValueError(f"{self.url} serves no model {wanted!r}, only {sorted(cards)}")
            context, root = int(cards[wanted]["max_model_len"]), str(cards[wanted]["root"])
        except (KeyError, TypeError, StopIteration) as error:
            raise ValueError(f"{self.url} is no vLLM server: it lists {_short(listing)}") from error
        if needs_logprobs:
            await self._check_logprobs(client, wanted)
        self.model, self.context, self.root = wanted, context, root

    async def complete(self, client: Any, request: Mapping[str, Any]) -> Answer:
        """Draw completions of one prompt.

        Raises:
            ServerDownError: It does not answer, or broke.
            RuntimeError: It refused the request, or answered with something else.
        """
        fixed = {"model": self.model, "logprobs": 0, "return_token_ids": True, **PLAIN_SAMPLING}
        answer = await self._call(client, "POST", "/v1/completions", {**fixed, **request})
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            drawn = [
                Drawn(
                    token_ids=[int(token) for token in choice["token_ids"]],
                    logprobs=[float(x) for x in choice["logprobs"]["token_logprobs"]],
                    finish_reason=str(choice["finish_reason"]),
                )
                for choice in choices
            ]
            seen = choices[0]["prompt_token_ids"]
            usage = answer["usage"]
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            result = Answer(drawn, int(usage["prompt_tokens"]), int(cached))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise RuntimeError(
                f"{self.url} gave no token ids and log-probs (is it an old vLLM?): {_short(answer)}"
            ) from error
        if seen != request["prompt"]:
            raise RuntimeError(f"{self.url} drew from another prompt than it was sent")
        for each in drawn:
            if each.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"{self.url} gave a completion up: finish reason {each.finish_reason!r}"
                )
        return result

    async def pause(self, client: Any) -> None:
        """End what was begun, begin nothing."""
        await self._call(client, "POST", "/pause?mode=wait")

    async def resume(self, client: Any) -> None:
        """Go on."""
        await self._call(client, "POST", "/resume")

    async def reload(self, client: Any, folder: str) -> None:
        """Read weights from a folder, and forget the prefix cache, which the old ones filled."""
        call = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        await self._call(client, "POST", "/collective_rpc", call)
        await self._call(client, "POST", "/reset_prefix_cache")

    async def _check_logprobs(self, client: Any, model: str) -> None:
        """Compare a temperature of 1 with one of 2, which halves the gaps between log-probs."""
        tops: list[dict[str, float]] = []
        for temperature in (1.0, 2.0):
            request = {
                "model": model,
                "prompt": [0],
                "max_tokens": 1,
                "temperature": temperature,
                "top_p": 1.0,
                "logprobs": 5,
                "return_tokens_as_token_ids": True,
                **PLAIN_SAMPLING,
            }
            answer = await self._call(client, "POST", "/v1/completions", request)
            tops.append(answer["choices"][0]["logprobs"]["top_logprobs"][0])
        both = tops[0].keys() & tops[1].keys()
        one, two = (max(top[t] for t in both) - min(top[t] for t in both) for top in tops)
        if abs(one - two) < abs(one - 2 * two):
            raise ValueError(
                f"{self.url} gives log-probs before the temperature: start it with "
                "--logprobs-mode processed_logprobs"
            )

    async def _call(
        self,
        client: Any,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        alien: type[Exception] = RuntimeError,
    ) -> Any:
        """Send a request and read the JSON that comes back; an empty body is None."""
        import httpx2

        try:
            response = await client.request(method, self.url + path, json=body)
        except httpx2.TransportError as error:
            raise self._down(f"{type(error).__name__} {error}".strip()) from error
        if response.status_code >= 500:
            raise self._down(f"status {response.status_code}, {_short(response.text)}")
        self._rests_until = 0.0
        if response.status_code == 404 and path.partition("?")[0] in _DEV_PATHS:
            raise RuntimeError(
                f"{self.url} has no {path}: start it with VLLM_SERVER_DEV_MODE=1 to sync weights"
            )
        if response.status_code != 200:
            raise alien(
                f"{self.url}{path} answered with status {response.status_code}: "
                f"{_short(response.text)}"
            )
        if not response.content:
            return None
        try:
            return response.json()
        except ValueError as error:
            raise alien(
                f"{self.url} is no vLLM server: {path} answered with {_short(response.text)}"
            ) from error

    def _down(self, why: str) -> ServerDownError:
        self._rests_until = time.monotonic() + self._retry_after
        return ServerDownError(f"{self.url} ({why})")


_DEV_PATHS = ("/pause", "/resume", "/collective_rpc", "/reset_prefix_cache")


def check_urls(urls: object) -> list[str]:
    """Return the servers' addresses, without what people add to them."""
    listed = [urls] if isinstance(urls, str) else urls
    if not isinstance(listed, Sequence) or not all(isinstance(url, str) for url in listed):
        raise TypeError(f"urls must be a string or a list of strings, got {describe(urls)}")
    if not listed:
        raise ValueError("urls must name at least one server, got []")
    for url in listed:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"urls must begin with http:// or https://, got {url!r}")
    plain = [url.rstrip("/").removesuffix("/v1") for url in listed]
    if len(set(plain)) < len(plain):
        raise ValueError(f"urls must differ, got {plain}")
    return plain


def open_client(headers: Mapping[str, str] | None, timeout: float | None) -> Callable[[], Any]:
    """Make what opens a client: one for each request, closed with it, bound to no event loop."""
    import httpx2

    context = httpx2.create_ssl_context()
    limits = httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT)
    return lambda: httpx2.AsyncClient(headers=dict(headers or {}), timeout=limits, verify=context)


def _short(content: object) -> str:
    shown = repr(content)
    return shown if len(shown) <= 120 else shown[:117] + "..."
