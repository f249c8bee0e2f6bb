"""The whole kernel suite on the GPU, then the benchmarks, in one dated JSON.

    python -m benchmarks.gpu_check                       # ten minutes
    python -m benchmarks.gpu_check --quick               # two
    python -m benchmarks.gpu_check --device cpu --small  # tries the machinery without a GPU

Needs torch, triton and pytest; peers that do not import are left out by name. The JSON is written
as soon as the tests are through, and again after every case.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import record, results
from benchmarks.machine import ROOT

TOTAL_SECONDS = {False: 550.0, True: 110.0}  # quick or not
# The project's options without those of plug-ins that may be missing; warnings of another torch
# are no failure.
PYTEST = (
    "-q",
    "-p",
    "no:cacheprovider",
    "-o",
    "addopts=-ra --import-mode=importlib --strict-markers",
    "-o",
    "filterwarnings=default",
)
DEVICE_TESTS = "tests/kernels/on_device"
TEST_SECONDS = 240.0


def suites(options: argparse.Namespace) -> dict[str, list[str]]:
    """pytest arguments by name: the tests on the device, then the rest of the kernel tests."""
    marker = "gpu" if options.device == "cuda" else "not gpu"
    chosen = ["-k", "Qwen or machinery or past_two_billion or clipped"] if options.quick else []
    device = [DEVICE_TESTS, "-m", marker, *chosen]
    if options.quick or options.small:
        return {"on the device": device}
    # the interpreter is no news where the kernels run, and Triton 3.6's fails with NumPy 2.4
    ignored = (DEVICE_TESTS, "tests/kernels/test_triton_interpreter.py")
    rest = ["tests/kernels", *(f"--ignore={path}" for path in ignored), "-m", "not gpu"]
    if importlib.util.find_spec("xdist"):
        rest += ["-n", "logical"]
    return {"on the device": device, "without it": rest}


def run_suite(arguments: Sequence[str], seconds: float) -> dict[str, Any]:
    """Run pytest in a process of its own; return counts, failures by name, and its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *PYTEST, "--junitxml", str(report), *arguments]
        began = time.monotonic()
        try:
            code: int | str = subprocess.run(
                command, cwd=ROOT, timeout=seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds:.0f} s"
        took = time.monotonic() - began
        counts = read_report(report) if report.exists() else {}
    return {"exit_code": code, "seconds": round(took, 1), **counts}


def read_report(path: Path) -> dict[str, Any]:
    """Counts of a JUnit report, and each failure with its first line."""
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    counts = {
        name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")
    }
    failed = {}
    for case in suite.iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            message = problem.get("message", "").partition("\n")[0]
            failed[f"{case.get('classname')}::{case.get('name')}"] = message[:300]
    return {**counts, "failed": failed}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a test or one of our own outputs was wrong."""
    began = time.monotonic()
    parser = record.parser()
    parser.add_argument("--no-tests", action="store_true", help="the benchmarks alone")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --small tries the machinery without one")
    run = results.new_record(torch.device(options.device), None, options.commit)
    path = options.output or results.default_path(run)
    run["tests"] = {}
    budget = options.seconds or TOTAL_SECONDS[options.quick]
    chosen = {} if options.no_tests else suites(options)
    for name, selection in chosen.items():
        left = budget - (time.monotonic() - began)
        run["tests"][name] = run_suite(selection, min(TEST_SECONDS, 0.6 * left))
        results.write(run, path)
    options.seconds = max(10.0, budget - (time.monotonic() - began) - 15)
    record.run_cases(options, record.grid(options), run, path)
    code = record.report(options, run, path)
    for name, outcome in run["tests"].items():
        print(f"tests {name}: {outcome}")
        code |= int(outcome["exit_code"] != 0)
    print(f"{'RED' if code else 'green'} after {time.monotonic() - began:.0f} s: {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
