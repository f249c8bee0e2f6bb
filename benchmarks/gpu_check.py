"""The tests on the GPU, every op beside its peers, and whole steps, in one record.

    python -m benchmarks.gpu_check --output run.json     # ends within ten minutes; again: goes on
    python -m benchmarks.gpu_check --quick               # within three
    python -m benchmarks.gpu_check --device cpu --small  # tries the machinery without a GPU

Writes one dated JSON (hardware, versions, commit, tests, figures) and compares it with the newest
recorded run, by our share of the fastest peer's time: clocks move, and the share stays. The JSON is
written after every part and every case, and the same command with the same --output does what it
lacks; all of it takes about three runs. Training steps, shared prompts and samplers get JSONs of
their own beside it. Needs torch, triton, trl, liger-kernel, pytest and hypothesis; a peer that is
not installed is listed as such, and without matplotlib nothing is drawn. Where these are installed
already, `make` is not wanted.
"""

import argparse
import importlib.util
import math
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import goals, record, results
from benchmarks.machine import ROOT
from benchmarks.speed_page import table

# On a GPU, which is lent for minutes; a CPU may have other work, and a right run is never stopped
TOTAL_SECONDS = {False: 550.0, True: 170.0}  # quick or not
TEST_SHARE = 0.6  # of the seconds left, that one suite may take
STEP_SECONDS = 90.0  # that one benchmark of whole steps may take
PARTING_SECONDS = 15.0  # that one of either may take to end, once it is asked to
CLOSING_SECONDS = 15.0  # to compare and to draw
# The project's options without those of plug-ins that may be missing; warnings of another torch
# do not fail it.
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
QUICK_TESTS = "Qwen or machinery or past_two_billion or clipped or far_below"
OTHER_TESTS = ("tests/algo/engines/test_static.py", "tests/algo/shared_prompt")
TINY = "--width 64 --layers 1 --vocabulary 64 --tokens 16 --rounds 2"
TINY_DRAWS = "--width 64 --layers 1 --vocabulary 64 --prompts 2 --new-tokens 4 --rounds 2"
DRAWS = "--device cuda --dtype bf16 --layers 30 --prompts 32 --rounds 3"
WIDE = "--device cuda --dtype bf16 --width 1024 --layers 8 --vocabulary 32768 --rounds 5"


def suites(options: argparse.Namespace) -> dict[str, list[str]]:
    """pytest arguments by name: the tests on the device, then the rest of the kernel tests."""
    marker = "gpu" if options.device == "cuda" else "not gpu"
    chosen = ["-k", QUICK_TESTS] if options.quick else []
    device = [DEVICE_TESTS, "-m", marker, *chosen]
    if options.quick or options.small:
        return {"on the device": device}
    # the interpreter says nothing new where the kernels run, and Triton 3.6's fails with NumPy 2.4
    ignored = (DEVICE_TESTS, "tests/kernels/test_triton_interpreter.py")
    rest = ["tests/kernels", *(f"--ignore={path}" for path in ignored), "-m", "not gpu"]
    if importlib.util.find_spec("xdist"):
        rest += ["-n", "logical"]
    chosen = {"on the device": device, "without it": rest}
    if importlib.util.find_spec("transformers"):
        chosen["sampler and shared prompt"] = [*OTHER_TESTS, "-m", marker]
    return chosen


def steps(options: argparse.Namespace, path: Path) -> Iterator[tuple[str, list[str]]]:
    """Name and arguments of each benchmark of whole steps; they write beside the record."""
    small = options.device == "cpu"
    shared = {"one-group": "--refinements 8 --drafts 1 --tokens 1024"}
    shared["short-groups"] = "--prompts 32 --refinements 4 --drafts 1 --tokens 64"
    if small:
        shared = {"short-groups": "--prompts 2 --refinements 2 --drafts 1"}
    commands = {"train-step": "train_step " + ("--small --rounds 1" if small else "--rounds 5")}
    for name, sizes in shared.items():
        model = TINY if small else WIDE
        commands[f"shared-prompt-{name}"] = f"shared_prompt {model} {sizes}"
    commands["samplers"] = "samplers " + (TINY_DRAWS if small else DRAWS)
    for name, command in commands.items():
        module, *arguments = command.split()
        output = path.with_name(f"{path.stem}-{name}.json")
        yield name, [f"benchmarks.{module}", *arguments, "--output", str(output)]


def run_module(arguments: Sequence[str], seconds: float | None) -> dict[str, Any]:
    """Run `python -m` in a process of its own; return its exit code and its seconds.

    Without `seconds` it may take its time.
    """
    began = time.monotonic()
    # a shell's background jobs ignore Ctrl-C, and so would what they start
    heeds_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [sys.executable, "-m", *arguments]
    with subprocess.Popen(command, cwd=ROOT, preexec_fn=heeds_sigint) as process:
        try:
            code: int | str = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = f"stopped after {seconds} s"
            process.send_signal(signal.SIGINT)  # pytest then reports what has failed by now
            with suppress(subprocess.TimeoutExpired):
                process.wait(PARTING_SECONDS)
            process.kill()
    return {"exit_code": code, "seconds": round(time.monotonic() - began, 1)}


def run_suite(arguments: Sequence[str], seconds: float | None) -> dict[str, Any]:
    """Run pytest; return what `run_module` does, counts, and failures by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        outcome = run_module(["pytest", *PYTEST, "--junitxml", str(report), *arguments], seconds)
        return outcome | (read_report(report) if report.exists() else {})


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


def tell(name: str, outcome: dict[str, Any]) -> None:
    """Print how a part ended, and on a line each what failed in it."""
    counts = ", ".join(f"{key} {value}" for key, value in outcome.items() if key != "failed")
    print(f"{'RED' if outcome['exit_code'] else 'green'}: {name}: {counts}")
    for test, why in outcome.get("failed", {}).items():
        print(f"    {test}: {why}")


def is_done(outcomes: dict[str, Any], name: str) -> bool:
    """Whether a part has run to its end; one that was stopped runs again."""
    return isinstance(outcomes.get(name, {}).get("exit_code"), int)


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 1 where a test, a step or one of our own outputs was wrong."""
    began = time.monotonic()
    parser = record.parser()
    parser.add_argument("--no-tests", action="store_true", help="the benchmarks alone")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; --device cpu --small tries the machinery without one")
    run = results.new_record(torch.device(options.device), None, options.commit)
    path = options.output or results.default_path(run)
    run = results.resumed(run | {"tests": {}, "steps": {}}, path)
    on_cuda = options.device == "cuda"
    budget = options.seconds or (TOTAL_SECONDS[options.quick] if on_cuda else math.inf)

    def left() -> float:
        return budget - (time.monotonic() - began)

    for name, selection in ({} if options.no_tests else suites(options)).items():
        if not is_done(run["tests"], name):
            print(f"{time.monotonic() - began:4.0f} s  {name}: {' '.join(selection)}", flush=True)
            seconds = round(TEST_SHARE * left(), 1) if on_cuda else None
            run["tests"][name] = run_suite(selection, seconds)
            results.write(run, path)
    options.seconds = left() - CLOSING_SECONDS
    record.run_cases(options, record.grid(options), run, path)
    missing = list(run["left_out"])
    for name, command in () if options.quick else steps(options, path):
        if is_done(run["steps"], name):
            continue
        if left() < STEP_SECONDS:
            missing.append(name)
            continue
        print(f"{time.monotonic() - began:4.0f} s  {name}: {' '.join(command)}", flush=True)
        run["steps"][name] = run_module(command, STEP_SECONDS if on_cuda else None)
        results.write(run, path)
    code = record.report(options, run, path)
    print(table(list(goals.lines(run, path))))
    for name, outcome in (run["tests"] | run["steps"]).items():
        tell(name, outcome)
        code |= int(outcome["exit_code"] != 0)
    if missing:
        print(f"{len(missing)} parts to go; the same command goes on with --output {path}")
    print(f"{'RED' if code else 'green'} after {time.monotonic() - began:.0f} s: {path}")
    return code


if __name__ == "__main__":
    sys.exit(main())
