"""Run TRL's own GRPO tests with `IGRPOTrainer` in the place of `GRPOTrainer`, without a network.

First with TRL's trainer, on models and data made here: those that pass are the measure. Then with
ours: a test that passed must pass, or fail as `expected.toml` says and why.

    make test-trl TRL_SOURCE=../trl         a clone of TRL at the version that is installed

TRL's distributions on PyPI carry no tests, so a clone is needed; nothing of it is kept here.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[1]
TESTS = "tests/test_grpo_trainer.py"


class Outcome(NamedTuple):
    """What became of a test: passed, skipped or failed, and the last line of why."""

    status: str
    message: str


def main(source: str, *arguments: str) -> int:
    clone = Path(source).resolve()
    if not source or not (clone / TESTS).is_file():
        print(f"TRL_SOURCE must name a clone of TRL with {TESTS}, got {source!r}", file=sys.stderr)
        return 2
    import trl
    from stand_ins import make_data, make_models

    version = (clone / "VERSION").read_text().strip()
    print(f"tests of TRL {version} on TRL {trl.__version__}")
    with tempfile.TemporaryDirectory() as name:
        make_models(Path(name))
        make_data(Path(name))
        theirs = run_suite(clone, Path(name), "trl", arguments)
        ours = run_suite(clone, Path(name), "igrpo", arguments)
    return report(theirs, ours)


def run_suite(
    clone: Path, folder: Path, trainer: str, arguments: tuple[str, ...]
) -> dict[str, Outcome]:
    """Run the tests in a process of their own, from the folder with the stand-ins."""
    result = folder / f"{trainer}.xml"
    environment = {
        **os.environ,
        "IGRPO_SUITE": trainer,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HOME": str(folder / "hub"),
        "PYTHONPATH": os.pathsep.join([str(PROJECT), str(HERE)]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "exchanged", "-W", "ignore"]
    command += ["--tb=short", "-p", "no:cacheprovider", f"--junitxml={result}", "-m", "not slow"]
    command += ["-o", "addopts=", "-c", os.devnull, f"--rootdir={clone}", str(clone / TESTS)]
    with (folder / f"{trainer}.log").open("w") as log:
        subprocess.run([*command, *arguments], cwd=folder, env=environment, stdout=log, stderr=log)
    if not result.is_file():
        raise SystemExit((folder / f"{trainer}.log").read_text()[-3000:])
    return read_outcomes(result)


def read_outcomes(result: Path) -> dict[str, Outcome]:
    outcomes = {}
    for case in ElementTree.parse(result).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        status, message = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                status = "skipped" if child.tag == "skipped" else "failed"
                message = " ".join((child.get("message") or "").split())
        outcomes[name] = Outcome(status, message)
    return outcomes


def report(theirs: dict[str, Outcome], ours: dict[str, Outcome]) -> int:
    """Print counts and differences; give 1 if a failure was not expected, or one did not come."""
    expected = tomllib.loads((HERE / "expected.toml").read_text())["expected"]
    measure = [name for name, outcome in theirs.items() if outcome.status == "passed"]
    failed = {name: ours[name].message for name in measure if ours[name].status != "passed"}
    wrong = []
    for name, message in failed.items():
        known = next((e for e in expected if re.search(e["test"], name)), None)
        if known is None or not re.search(known["error"], message):
            wrong.append(f"  {name}\n    {message[:300]}")
    passed_anyhow = [
        f"  {entry['test']} was expected to fail"
        for entry in expected
        if (hits := [n for n in measure if re.search(entry["test"], n)])
        and not any(n in failed for n in hits)
    ]
    print(f"{len(measure)} of {len(theirs)} pass with TRL's trainer on the stand-ins")
    print(
        f"{len(measure) - len(failed)} of these with ours; {len(failed) - len(wrong)} as expected"
    )
    for line in (*wrong, *passed_anyhow):
        print(line)
    return int(bool(wrong or passed_anyhow))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
