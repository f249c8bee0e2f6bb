"""Several vLLM servers as one: the least busy is asked, dead ones are left out, all are synced."""

import asyncio
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..distribution import Distribution
from .answers import Answer
from .connection import MAX_WAIT, Connection, ServerBusyError, ServerDownError
from .http import Server

HALF_WRITTEN = (
    "a failed sync_weights left vLLM servers with weights that are half old and half new: "
    "restart them, and make a new sampler"
)


class ServerPool:
    """Servers of one model.

    Args:
        urls: Where they are.
        model: The name under which they serve it; None takes the first that one lists.
        distribution: What is drawn from, if a loss needs the log-probs; None if none does.
        connection: How they are reached.

    Attributes:
        context: Maximum tokens of a prompt and its completion; known after `contact`.
        root: Where a server has its model from; known after `contact`.
    """

    def __init__(
        self,
        urls: Sequence[str],
        model: str | None,
        distribution: Distribution | None,
        connection: Connection,
    ) -> None:
        self.servers = [Server(url, model, connection) for url in urls]
        self.context = 0
        self.root = ""
        self._distribution = distribution
        self._max_retries = connection.max_retries
        self._client = connection.opener()
        self._lock = threading.Lock()
        self._retired: str | None = None
        self._has_synced = False

    async def contact(self) -> None:
        """Learn what the servers serve; one that does not answer now may do so later."""
        async with self._client() as client:
            calls = (server.contact(client, self._distribution) for server in self.servers)
            answers = await asyncio.gather(*calls, return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ServerDownError):
                raise answer
        known = [server for server in self.servers if server.model is not None]
        if not known:
            raise ConnectionError(_nobody(map(str, answers)))
        first = known[0]
        if other := next((server for server in known if server.model != first.model), None):
            raise ValueError(
                f"urls must serve one model: {first.url} has {first.model!r}, "
                f"{other.url} has {other.model!r}"
            )
        for server in self.servers:
            server.wanted_model = first.model
        self.context = min(server.context for server in known)
        self.root = first.root

    async def ask(self, request: Mapping[str, Any], vocabulary: int) -> Answer:
        """Draw the completions of one prompt.

        The idlest server is asked; where it is down or busy, the next. Where all that are up are
        busy, they are asked again after the seconds that they say, or else after 1, 2, 4 ...

        Args:
            request: The body of the request, but for what is the same in all of them.
            vocabulary: Token ids are below this.

        Raises:
            ConnectionError: None answers; the message names each and why.
            RuntimeError: A server refused the request, or a sync failed half-way.
        """
        down: dict[str, str] = {}
        async with self._client() as client:
            for retry in range(self._max_retries + 1):
                busy: dict[str, ServerBusyError] = {}
                while (server := self._pick(request["n"], {*down, *busy})) is not None:
                    try:
                        return await self._ask_one(server, client, request, vocabulary)
                    except ServerBusyError as error:
                        busy[server.url] = error
                    except ServerDownError as error:
                        down[server.url] = str(error)
                if not busy or retry == self._max_retries:
                    break
                delays = (2.0**retry if e.seconds is None else e.seconds for e in busy.values())
                await asyncio.sleep(min(MAX_WAIT, *delays))
        outdated = [s.outdated for s in self.servers if s.outdated and s.url not in down]
        raise ConnectionError(_nobody([*down.values(), *map(str, busy.values()), *outdated]))

    async def _ask_one(
        self, server: Server, client: Any, request: Mapping[str, Any], vocabulary: int
    ) -> Answer:
        try:
            if server.model is None:
                await server.contact(client, self._distribution)
            return await server.complete(client, request, vocabulary)
        except ServerDownError as error:
            if self._has_synced and not isinstance(error, ServerBusyError):
                server.outdated = f"{error}, so it may have old weights"
            raise
        finally:
            with self._lock:
                server.in_flight -= request["n"]

    def _pick(self, n: int, tried: Collection[str]) -> Server | None:
        """Book n completions on a server: one that is up if there is any, the idlest of those."""
        with self._lock:
            self.check_sound()
            left = [s for s in self.servers if s.url not in tried and s.outdated is None]
            if not left:
                return None
            chosen = min(left, key=lambda server: (server.is_resting, server.in_flight))
            chosen.in_flight += n
            return chosen

    async def sync(self, folder: Path) -> None:
        """Let every server that answers read the folder; none does if one refuses to pause."""
        async with self._client() as client:
            paused = await _gather([server.pause(client) for server in self.servers])
            there = [s for s, answer in zip(self.servers, paused, strict=True) if answer is None]
            down = {
                s: str(answer)
                for s, answer in zip(self.servers, paused, strict=True)
                if isinstance(answer, ServerDownError)
            }
            try:
                _raise_first(answer for answer in paused if not isinstance(answer, ServerDownError))
                if not there:
                    raise ConnectionError(_nobody(down.values()))
                await self._write(client, there, folder)
            finally:
                resumed = await _gather([server.resume(client) for server in there])
            _raise_first(resumed)
        for server in self.servers:
            server.outdated = down.get(server)
        self._has_synced = True
        if down:
            warnings.warn(
                "left out until a later sync_weights reaches them: " + "; ".join(down.values()),
                stacklevel=2,
            )

    async def _write(self, client: Any, servers: Sequence[Server], folder: Path) -> None:
        try:
            _raise_first(await _gather([s.reload(client, str(folder)) for s in servers]))
        except BaseException as error:
            self._retired = HALF_WRITTEN
            raise RuntimeError(HALF_WRITTEN) from error

    def check_sound(self) -> None:
        """Raise RuntimeError if a sync failed half-way."""
        if self._retired is not None:
            raise RuntimeError(self._retired)


async def _gather(calls: Sequence[Any]) -> list[BaseException | None]:
    """Wait for all calls to end; an error takes the place of its result."""
    return await asyncio.gather(*calls, return_exceptions=True)


def _raise_first(answers: Any) -> None:
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer


def _nobody(failures: Iterable[str]) -> str:
    return "no vLLM server answers: " + "; ".join(failures)
