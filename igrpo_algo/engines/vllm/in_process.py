"""A sampler with vLLM in this process: continuous batching, a prefix cache, live weights."""

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igrpo_kernels.checks import check_flag

from ...prompts import Prompt, check_ids
from ...rollouts.completions import Completion, CompletionGroups
from ..base import EngineSampler, request_seed, seed_or_fresh, seeds_or_fresh, stop_ids
from ..distribution import Distribution
from ..weights import WantedWeights, Weights, as_folder, memory_folder, open_weights
from .engine import is_in_process, loop_of, make_engine, wanted_by
from .logprobs import RAW, check_mode, usable_modes

if TYPE_CHECKING:
    from vllm import LLM

HALF_WRITTEN = (
    "a failed sync_weights left this vLLM engine with weights that are half old and half new: "
    "make a new engine"
)


class VllmSampler(EngineSampler):
    """Draws completions with vLLM, together with their log-probs.

    The next token comes from softmax(logits / temperature), cut by `min_p`, `top_k` and `top_p`.
    Log-probs are those of the whole vocabulary at the temperature, as a loss computes them; vLLM
    has no such log-probs for a cut away from temperature 1, which is refused. Each completion is
    one request with a seed of its own: the same seed gives the same samples in any batch (up to
    rounding in the model). Temperature 0 decodes greedily and gives no log-probs: a ratio to a
    point mass means nothing.

    Prompts become token ids by `encode_prompt`, and none is ever cut. The stop token is the last of
    `token_ids` and is left out of `text`.

    All calls, from any thread or event loop, share the engine's batch: as one completion ends,
    another begins. Cancelling `sample_one` takes its requests out of the engine. Requests of lower
    `priority` go first if the engine was made with scheduling_policy="priority", as this class
    makes it; otherwise the first to come is the first served. Several samplers may share an engine;
    nothing else may use it during a call.

    Args:
        llm: A `vllm.LLM`, made with logprobs_mode="processed_logprobs", or for a cut distribution
            with "raw_logprobs", its default; or a model's folder or name, from which one is made.
        max_new_tokens: Maximum tokens of a completion.
        temperature: Divides the logits; 0 decodes greedily.
        top_p: Draws from the fewest tokens whose probabilities add up to this, in (0, 1].
        top_k: Draws from this many tokens; 0 from all.
        min_p: Draws from tokens of at least this share of the highest probability, in [0, 1].
        logprobs: False gives completions without log-probs, as an evaluation needs them: any engine
            and distribution will do.
        stop_token_ids: Tokens that end a completion; None takes all those of the model's generation
            config and the tokenizer's end of sequence.
        chat_template_kwargs: Passed to the chat template, for example {"enable_thinking": False}.
        tokenizer: None takes the engine's.
        engine_options: Further arguments of the `LLM` that is made, such as `dtype`. On CPU,
            `block_size` is 32 unless it is given: the prefix cache holds whole blocks only.

    Attributes:
        llm: The engine.
        takes_priority: True: requests may name a priority, and lower goes first.
        prompt_tokens: Tokens of all prompts so far, once per completion.
        cached_tokens: Those of them that the prefix cache served.

    Raises:
        ImportError: vLLM is not installed.
        TypeError: `llm` is neither an `LLM` nor a path.
        ValueError: A number is out of range, an option has no effect, the engine gives log-probs
            that no loss can use, or its context has no room for a prompt.

    Examples:
        ```python
        sampler = VllmSampler("Qwen/Qwen3-0.6B", max_new_tokens=512)
        sample_group(["2 + 2 ="], sampler, 4).texts
        ```
    """

    takes_priority = True

    def __init__(
        self,
        llm: "LLM | str | Path",
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        min_p: float = 0.0,
        logprobs: bool = True,
        stop_token_ids: Sequence[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        engine_options: Mapping[str, Any] | None = None,
    ) -> None:
        check_flag("logprobs", logprobs)
        distribution = Distribution(temperature, top_p, top_k, min_p)
        super().__init__(tokenizer, distribution, max_new_tokens, chat_template_kwargs)
        self.gives_logprobs = logprobs and not distribution.is_greedy
        mode = usable_modes(distribution)[0] if self.gives_logprobs else RAW
        self.llm = make_engine(llm, engine_options, mode)
        if tokenizer is None:
            self.tokenizer = self.llm.get_tokenizer()
        config = self.llm.llm_engine.vllm_config
        if self.gives_logprobs:
            mode = config.model_config.logprobs_mode
            check_mode(mode, distribution, "llm", "logprobs_mode={!r}")
        self.take_context(config.model_config.max_model_len)
        if stop_token_ids is None:
            own = config.model_config.try_get_generation_config().get("eos_token_id")
            stop_token_ids = stop_ids(own, self.tokenizer.eos_token_id)
        self.stop_token_ids = list(check_ids("stop_token_ids", stop_token_ids))
        self.prompt_tokens = self.cached_tokens = 0
        self._loop = loop_of(self.llm)

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
            ValueError: A prompt has no tokens, or more than `max_prompt_tokens`.
            RuntimeError: An earlier `sync_weights` failed half-way.
        """
        encoded = self.encode_all(prompts, n)
        seeds = seeds_or_fresh(seed, len(encoded))
        groups = [
            self._request(ids, n, own, priority) for ids, own in zip(encoded, seeds, strict=True)
        ]
        try:
            return [[self._completion(future.result()) for future in group] for group in groups]
        finally:
            _cancel(future for group in groups for future in group)

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
            ValueError: The prompt has no tokens, or more than `max_prompt_tokens`.
            RuntimeError: An earlier `sync_weights` failed half-way.
        """
        drawn = {}
        async for position, completion in self.stream_one(prompt, n, seed=seed, priority=priority):
            drawn[position] = completion
        return [drawn[position] for position in range(n)]

    async def stream_one(
        self, prompt: Prompt, n: int, *, seed: int | None = None, priority: int = 0
    ) -> AsyncGenerator[tuple[int, Completion], None]:
        """Yield what `sample_one` returns as (position, completion), each as soon as it is done."""
        (ids,) = self.encode_all([prompt], n)
        futures = self._request(ids, n, seed_or_fresh(seed), priority)
        waiting = {asyncio.wrap_future(future): i for i, future in enumerate(futures)}
        try:
            while waiting:
                done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for each in done:
                    yield waiting.pop(each), self._completion(each.result())
        finally:
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def sync_weights(self, weights: Weights | str | Path) -> None:
        """Load new weights, all of them or none, and empty the prefix cache.

        Waits for the requests in flight; later requests wait for it. Names and shapes are compared
        with those of the model's files before anything is written, so an error there leaves the old
        weights whole. If vLLM fails while it writes, the engine refuses all later requests. Tied
        weights may come under any of their names. Values are cast to the engine's dtype. An engine
        of several processes reads the tensors from a folder in memory (/dev/shm) if there is one.

        Args:
            weights: A state dict with the names of the model's files (as transformers gives it), or
                a folder with `*.safetensors` files.

        Raises:
            FileNotFoundError: The folder holds no safetensors file.
            TypeError: `weights` is neither, or one of its values is not a whole tensor.
            ValueError: A weight is missing, unknown, or of another shape.
            RuntimeError: vLLM failed to write them, now or earlier.
        """
        new = open_weights(weights)
        wanted = wanted_by(self.llm)
        wanted.check(new)
        self._loop.alone(lambda: self._write(wanted, new)).result()

    def _write(self, wanted: WantedWeights, new: Weights) -> None:
        try:
            if is_in_process(self.llm):
                self._reload(weights_iterator=wanted.complete(new))
            else:
                with as_folder(wanted, new, memory_folder()) as folder:
                    self._reload(weights_path=str(folder))
            if not self.llm.reset_prefix_cache():
                raise RuntimeError("vLLM did not reset its prefix cache")
        except Exception as error:
            self._loop.retire(HALF_WRITTEN)
            raise RuntimeError(HALF_WRITTEN) from error

    def _reload(self, **source: Any) -> None:
        self.llm.collective_rpc("reload_weights", kwargs=source)

    def _request(self, ids: list[int], n: int, seed: int, priority: int) -> list[Future[Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return [
            self._loop.request(
                {"prompt_token_ids": ids},
                SamplingParams(
                    **asdict(self.distribution),
                    seed=request_seed(seed) + index,
                    max_tokens=self.max_new_tokens,
                    stop_token_ids=self.stop_token_ids,
                    ignore_eos=True,  # stop_token_ids are all that stops
                    logprobs=0 if self.gives_logprobs else None,  # 0: of the token drawn
                    detokenize=False,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                ),
                priority,
            )
            for index in range(n)
        ]

    def _completion(self, output: Any) -> Completion:
        self.prompt_tokens += len(output.prompt_token_ids)
        self.cached_tokens += output.num_cached_tokens or 0
        (drawn,) = output.outputs
        ids = list(drawn.token_ids)
        logprobs = None
        if self.gives_logprobs:
            steps = zip(drawn.logprobs, ids, strict=True)
            logprobs = [float(step[token].logprob) for step, token in steps]
        if drawn.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"vLLM gave up a completion: finish reason {drawn.finish_reason!r}")
        return Completion.decoded(
            ids, self.tokenizer, logprobs=logprobs, finish_reason=drawn.finish_reason
        )


def _cancel(futures: Any) -> None:
    for future in futures:
        future.cancel()
