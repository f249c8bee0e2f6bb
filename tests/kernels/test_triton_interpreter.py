"""Runs the Triton kernels in Triton's interpreter, which needs no GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Of the tests for real devices those that a dtype and a size multiply run in one; the tracer that
# torch.compile needs does not know tensors that only say they are CUDA's.
ONE_OF_EACH = "(Qwen and bf16) or not (bf16 or fp16 or fp32 or torch_compile)"
HARMLESS = (
    # Triton 3.6's, which needs NumPy before 2.4; later ones do without
    "ignore:Conversion of an array:DeprecationWarning",
    # NumPy's words for inf and NaN, which both sides of a select may hold
    "ignore::RuntimeWarning:triton.runtime.interpreter",
)


def interpret(*arguments: str) -> str:
    # a process of its own: the variable has to be set before triton is first imported
    ignored = [option for warning in HARMLESS for option in ("-W", warning)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", *ignored, *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    return run.stdout


@pytest.mark.parametrize("kernels", ["logits", "losses", "head", "head_ops"])
def test_kernels_in_the_interpreter(kernels: str) -> None:
    printed = interpret(str(HERE / f"triton_{kernels}.py"))
    assert " passed" in printed
    assert "skipped" not in printed


def test_everything_behind_is_cuda_in_the_interpreter() -> None:
    printed = interpret(str(HERE / "on_device"), "-k", ONE_OF_EACH)
    assert " passed" in printed
    assert "skipped" not in printed
