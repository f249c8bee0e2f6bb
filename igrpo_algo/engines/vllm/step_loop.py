"""Steps an engine in a thread while requests are in flight; each request is a future."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from typing import Any, Protocol


class Engine(Protocol):
    """The part of `vllm.LLMEngine` that is used here."""

    def add_request(self, request_id: str, prompt: Any, params: Any, *, priority: int = 0) -> Any:
        """Put a request into the engine's queue."""
        ...

    def abort_request(self, request_ids: list[str]) -> None:
        """Forget requests, running or waiting."""
        ...

    def step(self) -> list[Any]:
        """Draw one token for all running requests; return the outputs of those that finished."""
        ...


class StepLoop:
    """Many requests in one engine, from any thread and any event loop.

    One thread at a time touches the engine: it starts with the first request, takes new requests in
    and cancelled ones out between two steps, and ends when none is left. So an idle loop costs
    nothing and needs no closing.

    Args:
        engine: What is stepped. Nothing else may step it meanwhile.
        on_start: Called first in each new thread, for example to choose its device.
    """

    def __init__(self, engine: Engine, on_start: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self._on_start = on_start
        self._lock = threading.Lock()
        self._inbox: deque[tuple[Future[Any], tuple[Any, ...] | Callable[[], Any]]] = deque()
        self._in_flight: dict[str, Future[Any]] = {}
        self._numbers = count()
        self._alive = False
        self._retired: str | None = None

    def request(self, prompt: Any, params: Any, priority: int = 0) -> Future[Any]:
        """Send a request; its future holds the engine's output. Cancelling it frees the engine."""
        return self._post((prompt, params, priority))

    def alone(self, function: Callable[[], Any]) -> Future[Any]:
        """Call a function in the loop's thread once all earlier requests are done.

        Later requests wait for it.
        """
        return self._post(function)

    def retire(self, reason: str) -> None:
        """Answer all later requests with RuntimeError: the engine can no longer be trusted."""
        self._retired = reason

    def _post(self, job: tuple[Any, ...] | Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._inbox.append((future, job))
            if not self._alive:
                self._alive = True
                threading.Thread(target=self._run, name="igrpo-step-loop", daemon=True).start()
        return future

    def _run(self) -> None:
        self._on_start()
        while self._take_in():
            try:
                self._drop_cancelled()
                if self._in_flight:
                    self._settle(self.engine.step())
            except Exception as error:  # the engine died: tell all who wait for it
                self._fail(error)

    def _take_in(self) -> bool:
        """Start what has come, a lone function only in an empty engine; say if work is left."""
        while True:
            with self._lock:
                blocked = self._inbox and callable(self._inbox[0][1]) and self._in_flight
                if not self._inbox or blocked:
                    self._alive = bool(self._in_flight)
                    return self._alive
                future, job = self._inbox.popleft()
            if callable(job):
                self._call(future, job)
            elif not future.cancelled():
                self._add(future, *job)

    def _call(self, future: Future[Any], function: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            if self._retired is not None:
                raise RuntimeError(self._retired)
            future.set_result(function())
        except Exception as error:
            future.set_exception(error)

    def _add(self, future: Future[Any], prompt: Any, params: Any, priority: int) -> None:
        name = f"igrpo-{next(self._numbers)}"
        try:
            if self._retired is not None:
                raise RuntimeError(self._retired)
            self.engine.add_request(name, prompt, params, priority=priority)
        except Exception as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            self._in_flight[name] = future

    def _drop_cancelled(self) -> None:
        cancelled = [name for name, future in self._in_flight.items() if future.cancelled()]
        for name in cancelled:
            del self._in_flight[name]
        if cancelled:
            self.engine.abort_request(cancelled)

    def _fail(self, error: Exception) -> None:
        failed, self._in_flight = self._in_flight, {}
        for future in failed.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        with suppress(Exception):
            self.engine.abort_request(list(failed))

    def _settle(self, outputs: list[Any]) -> None:
        for output in outputs:
            future = self._in_flight.pop(output.request_id, None) if output.finished else None
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(output)
