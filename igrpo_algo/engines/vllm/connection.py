"""How vLLM servers are reached: addresses, time-outs and retries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from igrpo_kernels.checks import check_count, check_number, describe

CONNECT_TIMEOUT = 5.0
MAX_WAIT = 60.0


class ServerDownError(ConnectionError):
    """A server does not answer, or reports that it is broken; another one may answer."""


class ServerBusyError(ServerDownError):
    """A server asks to be tried again later.

    Attributes:
        seconds: How much later; None if it does not say.
    """

    def __init__(self, message: str, seconds: float | None) -> None:
        super().__init__(message)
        self.seconds = seconds


@dataclass(frozen=True)
class Connection:
    """How servers are reached.

    Attributes:
        headers: Sent with each request.
        timeout: Seconds for a whole answer, its last byte included; None waits forever.
        rest: Seconds for which a server that did not answer is left out.
        max_retries: Times that a request is sent again where all servers are busy.
    """

    headers: Mapping[str, str]
    timeout: float | None
    rest: float
    max_retries: int

    def __post_init__(self) -> None:
        if self.timeout is not None:
            check_number("timeout", self.timeout, above=0)
        check_number("rest", self.rest, at_least=0)
        check_count("max_retries", self.max_retries, at_least=0)

    def opener(self) -> Callable[[], Any]:
        """Make a function that opens a client: one per request, closed with it."""
        import httpx2

        context = httpx2.create_ssl_context()
        limits = httpx2.Timeout(None, connect=CONNECT_TIMEOUT)
        headers = dict(self.headers)
        return lambda: httpx2.AsyncClient(headers=headers, timeout=limits, verify=context)


def retry_seconds(header: str | None) -> float | None:
    """Read a `Retry-After` header, a number or a date, as seconds from now.

    At most `MAX_WAIT`; None without a value.

    Examples:
        >>> retry_seconds("12"), retry_seconds("Wed, 21 Oct 2015 07:28:00 GMT"), retry_seconds("-")
        (12.0, 0.0, None)
    """
    if header is None:
        return None
    if header.strip().isdecimal():
        return min(MAX_WAIT, float(header))
    try:
        date = parsedate_to_datetime(header)
    except ValueError:
        return None
    if date.tzinfo is None:
        return None
    return min(MAX_WAIT, max(0.0, (date - datetime.now(UTC)).total_seconds()))


def check_urls(urls: object) -> list[str]:
    """Return the servers' addresses, without what people add to them."""
    import httpx2

    listed = [urls] if isinstance(urls, str) else urls
    if not isinstance(listed, Sequence) or not all(isinstance(url, str) for url in listed):
        raise TypeError(f"urls must be a string or a list of strings, got {describe(urls)}")
    if not listed:
        raise ValueError("urls must name at least one server, got []")
    for url in listed:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"urls must begin with http:// or https://, got {url!r}")
        try:
            httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"urls must be valid, got {url!r}: {error}") from error
    plain = [url.rstrip("/").removesuffix("/v1") for url in listed]
    if len(set(plain)) < len(plain):
        raise ValueError(f"urls must differ, got {plain}")
    return plain
