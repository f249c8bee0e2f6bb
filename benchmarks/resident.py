"""Peak of the resident set during one step on a CPU, in a process of its own."""

import ctypes
import gc
import multiprocessing
import multiprocessing.connection
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import SEQUENCES, Case
from benchmarks.ops import op_of

PRELOADED = ("torch", "benchmarks.ops", "liger_kernel.chunked_loss", "trl.trainer.utils")


def resident(name: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS stands now, VmHWM is the peak."""
    with open("/proc/self/status") as status:
        (line,) = (line for line in status if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def peak_during(step: Callable[[], object]) -> int:
    """Peak of this process during a step, above its level before."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as peak:
        peak.write("5")  # resets the peak
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def in_fresh_process(
    function: Callable[..., Any], *arguments: Any, preload: Sequence[str] = PRELOADED
) -> Any:
    """What a function returns in a new process; None where the process ends without an answer.

    Args:
        function: One that pickle finds by its name.
        preload: Modules that are imported once for all such processes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(there, function, *arguments))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        return None
    finally:
        process.join()


def _send(
    answer: multiprocessing.connection.Connection, function: Callable[..., Any], *arguments: Any
) -> None:
    answer.send(function(*arguments))


def peak_in_fresh_process(case: Case, peer: str) -> int | None:
    """Peak of a peer's step above its level before."""
    return in_fresh_process(_peak, case, peer, torch.get_num_threads())


def _peak(case: Case, peer: str, threads: int) -> int:
    torch.set_num_threads(threads)
    op, cpu = op_of(case), torch.device("cpu")
    batch = op.make(case, 1, cpu)
    # one step first, so that imports, thread pools and compilers do not count in the peak: a short
    # one, but of the same shape for a compiled peer, which compiles per shape
    warm = batch
    if not peer.endswith("compile") and case.tokens > 64 * SEQUENCES:
        warm = op.make(replace(case, tokens=64 * SEQUENCES), 1, cpu)
    op.step(op.peers[peer], warm, case)
    warm.clear()
    del warm
    return peak_during(lambda: op.step(op.peers[peer], batch, case))
