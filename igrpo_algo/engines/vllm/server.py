"""A sampler with vLLM's OpenAI-compatible servers: picks the least busy, skips dead ones."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from igrpo_kernels.checks import check_count, check_flag

from ...prompts import Prompt, check_ids
from ...rollouts.completions import Completion, CompletionGroups
from ...rollouts.sampling import run_blocking
from ..base import (
    EngineSampler,
    check_part,
    request_seed,
    seed_or_fresh,
    seeds_or_fresh,
    stop_ids,
)
from ..distribution import Distribution
from ..weights import FolderWeights, WantedWeights, Weights, as_folder, memory_folder, open_weights
from .connection import Connection, check_urls
from .logprobs import usable_modes
from .pool import ServerPool

PADDING = 4096  # more than any model pads its vocabulary beyond its tokenizer's


class VllmServerSampler(EngineSampler):
    """Draws completions from vLLM servers, together with their log-probs.

    `VllmSampler` over HTTP: the same weights and seeds give the same samples (up to rounding).
    Prompts are sent as token ids, so none is cut and no template runs on a server. Each prompt goes
    to the server with the fewest completions to draw. A server that does not answer (no connection,
    a broken one, a status of 5xx) is left out for `rest` seconds, and another one gets its
    requests; if all are busy (429, 503) they are asked again later. Answers are checked, and an
    error names each server and what it said. Cancelling `sample_one` closes the connection, and the
    server drops the request.

    Start the servers with `--logprobs-mode processed_logprobs`, or for a cut distribution with
    `raw_logprobs`, their default: two requests of one token find out which a server gives. With
    `--scheduling-policy priority`, requests of lower `priority` go first. `sync_weights` needs
    VLLM_SERVER_DEV_MODE=1 in their environment; keep such servers off public networks.

    Args:
        urls: The servers, "http://host:port"; one or several, all with the same model.
        tokenizer: The model's tokenizer.
        max_new_tokens: Maximum tokens of a completion.
        temperature: Divides the logits; 0 decodes greedily, with `logprobs` None.
        top_p: Draws from the fewest tokens whose probabilities add up to this, in (0, 1].
        top_k: Draws from this many tokens; 0 from all.
        min_p: Draws from tokens of at least this share of the highest probability, in [0, 1].
        logprobs: False gives completions without log-probs, as an evaluation needs them: any server
            and distribution will do.
        stop_token_ids: Tokens that end a completion; None takes all those of the model's generation
            config, as the server reads it, and the tokenizer's end of sequence.
        chat_template_kwargs: Passed to the chat template, for example {"enable_thinking": False}.
        model: The name under which it is served; None takes the first that a server lists.
        headers: Sent with each request, for example {"Authorization": "Bearer ..."}.
        timeout: Seconds for the whole answer to a request; None waits forever.
        rest: Seconds for which a server that did not answer is left out.
        max_retries: Times that a request is sent again where all servers are busy: after the
            seconds that their `Retry-After` says (60 at most), or else after 1, 2, 4 ... seconds.
        max_requests: Most requests at a time that `sample` sends.
        sync_folder: Where `sync_weights` writes a state dict for the servers to read; None takes
            this machine's memory (/dev/shm) or temporary folder.

    Attributes:
        is_shared: True: several processes draw from the same servers, and one of them syncs.
        takes_priority: True: requests may name a priority, and lower goes first.
        prompt_tokens: Tokens of all prompts so far, once per prompt, as the servers count them.
        cached_tokens: Those of them that a prefix cache served; 0 unless the servers were started
            with `--enable-prompt-tokens-details`.

    Raises:
        ConnectionError: No server answers.
        TypeError: `urls` is neither a string nor a list of strings.
        ValueError: A number is out of range, a URL is not valid or not one of a vLLM server,
            servers differ in their model, or a server gives log-probs that no loss can use.

    Examples:
        ```python
        urls = ["http://a:8000", "http://b:8000"]
        sampler = VllmServerSampler(urls, tokenizer, max_new_tokens=512)
        sample_group(["2 + 2 ="], sampler, 4).texts
        ```
    """

    is_shared = True
    takes_priority = True

    def __init__(
        self,
        urls: str | Sequence[str],
        tokenizer: Any,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        logprobs: bool = True,
        stop_token_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        model: str | None = None,
        headers: Mapping[str, str] | None = None,
        timeout: float | None = None,
        rest: float = 30.0,
        max_retries: int = 8,
        max_requests: int = 256,
        sync_folder: str | Path | None = None,
    ) -> None:
        check_part("tokenizer", tokenizer, "eos_token_id")
        check_flag("logprobs", logprobs)
        distribution = Distribution(temperature, top_p, top_k, min_p)
        super().__init__(tokenizer, distribution, max_new_tokens, chat_template_kwargs)
        self.gives_logprobs = logprobs and not distribution.is_greedy
        if self.gives_logprobs:
            usable_modes(distribution)  # fails now if no server could give these
        self._ignores_eos = stop_token_ids is not None  # or the server adds its config's own
        self.stop_token_ids = stop_ids(
            tokenizer.eos_token_id
            if stop_token_ids is None
            else list(check_ids("stop_token_ids", stop_token_ids))
        )
        self.max_requests = check_count("max_requests", max_requests)
        self.sync_folder = memory_folder() if sync_folder is None else Path(sync_folder)
        self.prompt_tokens = self.cached_tokens = 0
        connection = Connection(headers or {}, timeout, rest, max_retries)
        compared = distribution if self.gives_logprobs else None
        self._pool = ServerPool(check_urls(urls), model, compared, connection)
        self._syncing = threading.Lock()
        self._wanted: WantedWeights | None = None
        run_blocking(self._pool.contact())
        self.take_context(self._pool.context)

    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        seed: int | Sequence[int] | None = None,
        priority: int = 0,
    ) -> CompletionGroups:
        """Draw n completions of each prompt.

        Args:
            prompts: P strings, lists of chat messages, or lists of token ids.
            n: Completions per prompt, at least 1.
            seed: One for all prompts, or one per prompt; None draws fresh ones from the system.
            priority: Lower goes first.

        Returns:
            P lists of n completions.

        Raises:
            ConnectionError: No server answers; the message names each and why.
            ValueError: A prompt has no tokens, or more than `max_prompt_tokens`.
            RuntimeError: A server refused a request, or an earlier `sync_weights` failed half-way.
        """
        encoded = self.encode_all(prompts, n)
        seeds = seeds_or_fresh(seed, len(encoded))
        return run_blocking(self._sample_all(encoded, n, seeds, priority))

    async def sample_one(
        self, prompt: Prompt, n: int, *, seed: int | None = None, priority: int = 0
    ) -> list[Completion]:
        """Draw n completions of one prompt, the same as `sample([prompt], n, seed=[seed])`.

        Args:
            prompt: A string, a list of chat messages, or a list of token ids.
            n: Completions, at least 1.
            seed: Fixes them; None draws a fresh one from the system.
            priority: Lower goes first.

        Returns:
            n completions.

        Raises:
            ConnectionError: No server answers; the message names each and why.
            ValueError: The prompt has no tokens, or more than `max_prompt_tokens`.
            RuntimeError: A server refused the request, or an earlier `sync_weights` failed.
        """
        (ids,) = self.encode_all([prompt], n)
        own = request_seed(seed_or_fresh(seed))
        return await self._draw(ids, n, own, priority)

    async def stream_one(
        self, prompt: Prompt, n: int, *, seed: int | None = None, priority: int = 0
    ) -> AsyncGenerator[tuple[int, Completion], None]:
        """Yield what `sample_one` returns as (position, completion), each as soon as it is done.

        Each completion is a request of its own here.
        """
        (ids,) = self.encode_all([prompt], n)
        own = request_seed(seed_or_fresh(seed))
        tasks = {
            asyncio.create_task(self._draw(ids, 1, own + position, priority)): position
            for position in range(n)
        }
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield tasks.pop(task), task.result()[0]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def sync_weights(self, weights: Weights | str | Path) -> None:
        """Load new weights on every server, all of them or none, and empty the prefix caches.

        Names and shapes are compared with those of the files that the servers name as their
        model's, which must be readable here. Then each server pauses (it ends what it has begun),
        reads the folder, empties its cache and resumes. If one cannot pause, none reads. If one
        fails later, the sampler refuses all further requests. A server that does not answer, now or
        after a sync, may come back with old weights: it gets no request until a later sync reaches
        it, and a warning names it.

        Args:
            weights: A folder with `*.safetensors` files that the servers can read under the same
                path, or a state dict, which is written to a folder in `sync_folder` first.

        Raises:
            ConnectionError: No server answers.
            FileNotFoundError: The folder holds no safetensors file.
            TypeError: `weights` is neither, or one of its values is not a whole tensor.
            ValueError: A weight is missing, unknown, or of another shape.
            RuntimeError: A server refused a step, now or in an earlier sync.
        """
        new = open_weights(weights)
        with self._syncing:
            self._pool.check_sound()
            if self._wanted is None:
                self._wanted = WantedWeights.of_model(self._pool.root)
            self._wanted.check(new)
            parent = new.folder.parent if isinstance(new, FolderWeights) else self.sync_folder
            with as_folder(self._wanted, new, parent) as folder:
                run_blocking(self._pool.sync(folder))

    async def _sample_all(
        self, encoded: list[list[int]], n: int, seeds: list[int], priority: int
    ) -> CompletionGroups:
        gate = asyncio.Semaphore(self.max_requests)

        async def draw(ids: list[int], seed: int) -> list[Completion]:
            async with gate:
                return await self._draw(ids, n, request_seed(seed), priority)

        tasks = [
            asyncio.create_task(draw(ids, own)) for ids, own in zip(encoded, seeds, strict=True)
        ]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _draw(self, ids: list[int], n: int, seed: int, priority: int) -> list[Completion]:
        count = 1 if self.distribution.is_greedy else n  # servers refuse to be greedy twice
        request = {
            "prompt": ids,
            "n": count,
            "seed": seed,
            "max_tokens": self.max_new_tokens,
            "logprobs": 0 if self.gives_logprobs else None,  # 0: of the token drawn
            **asdict(self.distribution),
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self._ignores_eos,
            **({"priority": priority} if priority else {}),
        }
        answer = await self._pool.ask(request, len(self.tokenizer) + PADDING)
        self.prompt_tokens += answer.prompt_tokens
        self.cached_tokens += answer.cached_tokens
        return [
            Completion.decoded(
                drawn.token_ids,
                self.tokenizer,
                logprobs=drawn.logprobs,
                finish_reason=drawn.finish_reason,
            )
            for drawn in answer.completions * (n // count)
        ]
