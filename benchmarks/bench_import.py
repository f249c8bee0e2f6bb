"""What `import igrpo_algo` adds to `import torch`, in a process of its own each time.

    pytest benchmarks/bench_import.py --benchmark-enable

The clock inside the process starts when torch is there, so that torch's own seconds, and their
noise, stay out.
"""

import subprocess
import sys

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

TIMED = """
import time, torch
began = time.perf_counter()
import {module}
print(time.perf_counter() - began)
"""


def seconds_to_import(module: str) -> float:
    script = TIMED.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return float(done.stdout)


@pytest.mark.parametrize("module", ["igrpo_kernels", "igrpo_algo", "trl", "transformers"])
def test_import(benchmark: BenchmarkFixture, module: str) -> None:
    seconds = sorted(seconds_to_import(module) for _ in range(5))
    benchmark.extra_info["seconds after torch, sorted"] = seconds
    benchmark.pedantic(seconds_to_import, [module], rounds=1)
    print(f"\n{module}: {seconds[2]:.3f} s after torch (median of 5)")
