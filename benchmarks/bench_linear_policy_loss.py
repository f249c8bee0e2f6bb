"""Hidden states to gradients of the clipped policy loss, beside plain torch, TRL and Liger.

    make bench ARGS=benchmarks/bench_linear_policy_loss.py

times one forward and backward of each peer in one process. Every row also carries the peak memory
above the inputs (of a process of its own) and the error of the gradients against float64. Sizes
come from the environment: BENCH_ROWS, BENCH_WIDTH, BENCH_VOCABULARY, BENCH_THREADS.
"""

import multiprocessing
import os

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.linear_policy_cases import PEERS, Batch, error_against_float64, make_batch, step

SEQUENCES = 8
ROWS = int(os.environ.get("BENCH_ROWS", "2048"))
WIDTH = int(os.environ.get("BENCH_WIDTH", "768"))
VOCABULARY = int(os.environ.get("BENCH_VOCABULARY", "32768"))
THREADS = int(os.environ.get("BENCH_THREADS", str(os.cpu_count())))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def batch_of(rows: str, dtype: str) -> Batch:
    return make_batch(
        SEQUENCES, ROWS // SEQUENCES, WIDTH, VOCABULARY, DTYPES[dtype], sparse=rows == "sparse"
    )


def _peak_bytes(peer: str, rows: str, dtype: str, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(THREADS)
    batch = batch_of(rows, dtype)
    # a small step first: imports and thread pools are no part of the peak
    step(PEERS[peer], make_batch(SEQUENCES, 2, 16, 64, DTYPES[dtype], sparse=False))
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # resets the peak of the resident set
    before = resident("VmRSS")
    step(PEERS[peer], batch)
    queue.put(resident("VmHWM") - before)


def resident(name: str) -> int:
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def peak_bytes(peer: str, rows: str, dtype: str) -> int:
    """Peak of the resident set above what stands before the step, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_bytes, args=(peer, rows, dtype, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["dense", "sparse"])
def test_linear_policy_loss(benchmark: BenchmarkFixture, rows: str, dtype: str, peer: str) -> None:
    torch.set_num_threads(THREADS)
    batch = batch_of(rows, dtype)
    benchmark.group = f"{rows} {dtype}: N={ROWS} H={WIDTH} V={VOCABULARY}"
    benchmark.pedantic(step, args=(PEERS[peer], batch), rounds=5, warmup_rounds=1)
    hidden_error, weight_error = error_against_float64(batch)
    benchmark.extra_info |= {
        "peer": peer,
        "threads": THREADS,
        "torch": torch.__version__,
        "hidden_gradient_error": hidden_error,
        "weight_gradient_error": weight_error,
        "peak_bytes": peak_bytes(peer, rows, dtype),
    }
    assert max(hidden_error, weight_error) < (1e-5 if dtype == "fp32" else 2e-2)
