"""The runner of planted faults: what it must call killed, survived and broken."""

import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "tests" / "mutants" / "run.py"
SOURCE = "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
TESTS = (
    "from igrpo_algo import double, triple\n\n\n"
    "def test_double():\n    assert double(2) == 4\n\n\n"
    "def test_triple():\n    assert triple(0) == 0\n\n\n"
    "def test_red():\n    assert False\n"
)
ENTRY = '[[mutant]]\nfile = "igrpo_algo/__init__.py"\nold = "{}"\nnew = "{}"\ntest = "{}"\n'


def run_on(project: Path, *entries: tuple[str, str, str]) -> subprocess.CompletedProcess[str]:
    """Run the runner on a project of two functions, the second of which is badly tested."""
    for folder in ("igrpo_algo", "tests/mutants"):
        (project / folder).mkdir(parents=True)
    (project / "igrpo_algo" / "__init__.py").write_text(SOURCE)
    (project / "tests" / "test_it.py").write_text(TESTS)
    toml = "".join(ENTRY.format(old, new, f"tests/test_it.py{test}") for old, new, test in entries)
    (project / "tests" / "mutants" / "it.toml").write_text(toml)
    command = [sys.executable, RUNNER, "--root", project, "--workers", "1", "--import", ""]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_noticed_fault_is_killed_and_the_tree_is_left_alone(tmp_path: Path) -> None:
    done = run_on(tmp_path, ("2 * x", "x", "::test_double"), ("3 * x", "x - 3", "::test_triple"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("] killed") == 2
    assert (tmp_path / "igrpo_algo" / "__init__.py").read_text() == SOURCE


def test_anything_but_a_red_test_fails_the_run(tmp_path: Path) -> None:
    outcomes = {
        ("2 * x", "x", "::test_double"): "killed",
        ("3 * x", "4 * x", "::test_triple"): "SURVIVED",
        ("5 * x", "4 * x", "::test_triple"): "error: its old text occurs 0 times, not once",
        ("return", "pass", "::test_triple"): "error: its old text occurs 2 times, not once",
        ("2 * x", "2 * x", "::test_double"): "error: its old and new text are the same",
        ("2 * x", "(", " -k double"): "error: pytest ended with 2",
        ("2 * x", "x", " -k nothing"): "error: pytest ended with 5 without any fault",
        ("2 * x", "x", "::test_red"): "error: pytest ended with 1 without any fault",
    }
    done = run_on(tmp_path, *outcomes)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()[: len(outcomes)]
    found = sorted(line.partition("] ")[2].partition("  ")[0].strip() for line in lines)
    assert found == sorted(outcomes.values())
    assert done.stdout.splitlines()[-1].startswith("1 of 8 faults noticed")


def test_one_survivor_alone_fails_the_run(tmp_path: Path) -> None:
    done = run_on(tmp_path, ("3 * x", "4 * x", "::test_triple"))
    assert done.returncode == 1, done.stdout + done.stderr


def planted_faults() -> list[dict[str, str]]:
    files = sorted((ROOT / "tests" / "mutants").glob("*.toml"))
    return [entry for file in files for entry in tomllib.loads(file.read_text())["mutant"]]


def test_every_planted_fault_fits_the_tree() -> None:
    faults = planted_faults()
    assert faults
    for fault in faults:
        assert (ROOT / fault["file"]).read_text().count(fault["old"]) == 1, fault
        path = ROOT / fault["test"].split()[0].split("::")[0]
        assert path.exists(), fault
