"""Plant each known fault in a copy of the project and demand that its test goes red.

A fault is an entry of a `*.toml` file beside this one, under the name of the file it goes into:

    [["igrpo_algo/advantages/of_groups.py"]]
    old = "mean + margin"                # Python, or part of it; stands once in that file
    new = "mean - margin"                # the fault
    test = "tests/algo/test_x.py"        # pytest arguments that must fail then, and pass before

`old` is found by its tokens (`syntax.py`): layout, comments, quotes and renames make no difference.
A red test (exit code 1) kills the fault. Any other end but green is an error of the entry: no test
selected, a file that is no longer Python, a test that was red without the fault. `--check` plants
nothing and lists the entries that no longer fit the tree.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, fields
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue

import syntax

PROJECT = Path(__file__).resolve().parents[2]
NOT_COPIED = (".*", "__pycache__", "*.egg-info", "build", "dist", "site", "runs", "results")
PACKAGES = ("igrpo_algo", "igrpo_kernels")
WARM = Path(__file__).resolve().with_name("warm.py")
HEAVY = "torch hypothesis matplotlib.pyplot transformers trl.trainer.grpo_trainer"
GREEN, RED, TIMED_OUT = 0, 1, -1


@dataclass(frozen=True)
class Mutant:
    """One planted fault, and the pytest arguments that must notice it."""

    source: str
    file: str
    old: str
    new: str
    test: str

    def __str__(self) -> str:
        pairs = zip(self.old, self.new, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        start = max(0, same - 20)
        old, new = (" ".join(text[start:].split())[:40] for text in (self.old, self.new))
        return f"{self.file}: {old!r} -> {new!r}"

    def defect(self, root: Path) -> str | None:
        """Say why the entry can't be used as it stands, if so."""
        path = root / self.file
        if not path.is_file():
            return "its file does not exist"
        if not (root / self.test.split()[0].partition("::")[0]).exists():
            return "its test does not exist"
        if self.old.split() == self.new.split():
            return "its old and new code are the same"
        source = path.read_text()
        try:
            count = len(syntax.find(self.old, source))
            if count != 1:
                return f"its old code stands in the file {count} times, not once"
            ast.parse(self.planted(source))
        except SyntaxError as error:
            return f"with it the file is not Python: {error.msg}"
        return None

    def planted(self, source: str) -> str:
        """Put the fault into the text of its file."""
        (place,) = syntax.find(self.old, source)
        return syntax.replace(source, place, self.new)


def load_mutants(root: Path, only: str = "") -> list[Mutant]:
    """Read the entries of every file; `only` keeps those of which it matches any part."""
    keys = {field.name for field in fields(Mutant)} - {"source", "file"}
    mutants = []
    for path in sorted((root / "tests" / "mutants").glob("*.toml")):
        for file, entries in tomllib.loads(path.read_text()).items():
            for entry in entries:
                if set(entry) != keys:
                    raise SystemExit(f"{path.name}: {file} has {sorted(entry)}, not {sorted(keys)}")
                mutants.append(Mutant(path.name, file, **entry))
    return [mutant for mutant in mutants if re.search(only, " ".join(astuple(mutant)))]


class Copy:
    """A copy of the project, and a process that runs pytest in it without importing torch anew."""

    def __init__(self, root: Path, tree: Path, modules: Sequence[str], timeout: float) -> None:
        shutil.copytree(root, tree, ignore=shutil.ignore_patterns(*NOT_COPIED))
        check_origin(tree)
        self.tree = tree
        self.timeout = timeout
        environment = {
            **os.environ,
            "PYTHONPATH": str(tree),  # wins over an installed one
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "MPLBACKEND": "agg",
            "CI": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, WARM, str(timeout), *modules],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run_tests(self, selection: str) -> int:
        """Run pytest and return its exit code."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(shlex.split(selection)), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def check_origin(tree: Path) -> None:
    """Raise if the packages that tests import in a copy are not the copy's own."""
    packages = [name for name in PACKAGES if (tree / name).is_dir()]
    script = f"import sys; sys.path.insert(0, {str(tree)!r})\n" + "".join(
        f"import {name}; print({name}.__file__)\n" for name in packages
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=tree, check=True, capture_output=True, text=True
    ).stdout
    strays = [path for path in printed.split() if tree not in Path(path).parents]
    if strays:
        raise SystemExit(f"the copy imports {strays}, which is not in it")


@contextmanager
def planted(tree: Path, mutant: Mutant) -> Iterator[None]:
    """Keep a fault in a copy for the length of the block."""
    path = tree / mutant.file
    sound = path.read_text()
    path.write_text(mutant.planted(sound))
    try:
        yield
    finally:
        path.write_text(sound)


def name_outcome(code: int, timeout: float) -> str:
    """Say what an exit code of pytest means for a fault."""
    if code == TIMED_OUT:
        return f"error: no end after {timeout:.0f} s"
    return {GREEN: "SURVIVED", RED: "killed"}.get(code, f"error: pytest ended with {code}")


def judge(mutant: Mutant, copies: "SimpleQueue[Copy]") -> str:
    """Run a fault's tests in a free copy and name the outcome."""
    copy = copies.get()
    try:
        with planted(copy.tree, mutant):
            return name_outcome(copy.run_tests(mutant.test), copy.timeout)
    finally:
        copies.put(copy)


def judge_sound(selection: str, copies: "SimpleQueue[Copy]") -> str:
    """Run a selection without any fault: it must be green, or its red means nothing."""
    copy = copies.get()
    try:
        code = copy.run_tests(selection)
        if code in (GREEN, TIMED_OUT):
            return "green" if code == GREEN else name_outcome(code, copy.timeout)
        return f"error: pytest ended with {code} without any fault"
    finally:
        copies.put(copy)


def outcomes(
    root: Path, mutants: Iterable[Mutant], modules: Sequence[str], workers: int, timeout: float
) -> Iterator[tuple[Mutant, str]]:
    """Yield each fault with its outcome as soon as it is known."""
    usable = []
    for mutant in mutants:
        if defect := mutant.defect(root):
            yield mutant, f"error: {defect}"
        else:
            usable.append(mutant)
    with (
        tempfile.TemporaryDirectory() as folder,
        ThreadPoolExecutor(workers) as pool,
        ExitStack() as stack,
    ):
        copies: SimpleQueue[Copy] = SimpleQueue()
        for worker in range(workers):
            copy = Copy(root, Path(folder).resolve() / str(worker), modules, timeout)
            stack.callback(copy.close)
            copies.put(copy)
        sound = {
            selection: pool.submit(judge_sound, selection, copies)
            for selection in sorted({mutant.test for mutant in usable})
        }
        pending = {pool.submit(judge, mutant, copies): mutant for mutant in usable}
        for future in as_completed(pending):
            mutant = pending[future]
            verdict = sound[mutant.test].result()
            yield mutant, future.result() if verdict == "green" else verdict


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant each known fault; see its test go red.")
    parser.add_argument("--only", default="", help="regular expression, for any part of an entry")
    parser.add_argument("--workers", type=int, default=2, help="copies tested at once (2)")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for one fault (300)")
    parser.add_argument("--import", default=HEAVY, dest="modules", help=f"before all ({HEAVY})")
    parser.add_argument("--root", type=Path, default=PROJECT, help="the project (this one)")
    parser.add_argument("--check", action="store_true", help="plant nothing; do they fit the tree?")
    options = parser.parse_args()

    mutants = load_mutants(options.root, options.only)
    if not mutants:
        raise SystemExit("no fault selected")
    if options.check:
        defects = [f"{m.source}: {m}: {d}" for m in mutants if (d := m.defect(options.root))]
        sys.exit("\n".join(defects) or 0)
    start, tallies = time.monotonic(), {mutant.source: Counter() for mutant in mutants}
    modules = options.modules.split()
    results = outcomes(options.root, mutants, modules, options.workers, options.timeout)
    for done, (mutant, outcome) in enumerate(results, 1):
        tallies[mutant.source][outcome.split(":")[0]] += 1
        print(f"[{done}/{len(mutants)}] {outcome:8}  {mutant}", flush=True)
    print(f"\n{'file':30} {'killed':>7} {'survived':>9} {'errors':>7}")
    for source, tally in tallies.items():
        print(f"{source:30} {tally['killed']:7} {tally['SURVIVED']:9} {tally['error']:7}")
    killed = sum(tally["killed"] for tally in tallies.values())
    print(f"{killed} of {len(mutants)} faults noticed in {time.monotonic() - start:.0f} s")
    return 0 if killed == len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
