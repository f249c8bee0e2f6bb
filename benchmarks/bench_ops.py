"""Every op beside its peers under pytest-benchmark.

    make bench-suites ARGS='benchmarks/bench_ops.py -k "linear_policy_loss and bf16"'

The cases are those of `benchmarks.record`, at a quarter of the rows; each peer is held against
float64 first. For medians of peers that take turns, peak memory and plots: `make bench`.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Case, cpu_grid, quick_gpu_grid
from benchmarks.measure import Figure, checked, pass_gate, synchronize
from benchmarks.ops import op_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CASES = quick_gpu_grid() if DEVICE.type == "cuda" else cpu_grid(tokens=512)
pytestmark = pytest.mark.filterwarnings("default")  # of peers and compilers
PAIRS = [(case, peer) for case in CASES for peer in op_of(case).peers]


@pytest.mark.parametrize(("case", "peer"), PAIRS, ids=lambda value: str(value))
def test_op(benchmark: BenchmarkFixture, case: Case, peer: str) -> None:
    op = op_of(case)
    figure = Figure(case, peer, DEVICE.type)
    others = {name: Figure(case, name, DEVICE.type, not_run="another test") for name in op.peers}
    torch.compiler.reset()
    pass_gate(op, checked(case, DEVICE), DEVICE, others | {peer: figure})
    if figure.not_run is not None:
        assert peer != "igrpo", figure.not_run
        pytest.skip(f"{peer}: {figure.not_run}")
    batch = op.make(case, 1, DEVICE)

    def step() -> None:
        op.step(op.peers[peer], batch, case)
        synchronize(DEVICE)

    benchmark.group = str(case)
    benchmark.extra_info |= {"errors": figure.errors, "rows checked": figure.rows_checked}
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
