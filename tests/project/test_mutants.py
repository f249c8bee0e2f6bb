"""The runner of planted faults: what it must call killed, survived and broken."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import syntax

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "tests" / "mutants" / "run.py"
SOURCE = "def double(x):\n    return 2 * x\n\n\ndef triple(x):\n    return 3 * x\n"
TESTS = (
    "from igrpo_algo import double, triple\n\n\n"
    "def test_double():\n    assert double(2) == 4\n\n\n"
    "def test_triple():\n    assert triple(0) == 0\n\n\n"
    "def test_red():\n    assert False\n"
)
ENTRY = '[["igrpo_algo/__init__.py"]]\nold = "{}"\nnew = "{}"\ntest = "{}"\n'


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
        (
            "5 * x",
            "4 * x",
            "::test_triple",
        ): "error: its old code stands in the file 0 times, not once",
        (
            "return",
            "pass",
            "::test_triple",
        ): "error: its old code stands in the file 2 times, not once",
        ("2 * x", "2  * x", "::test_double"): "error: its old and new code are the same",
        (
            "2 * x",
            "(",
            "::test_double",
        ): "error: with it the file is not Python: '(' was never closed",
        ("def double", "def twice", " -k double"): "error: pytest ended with 2",
        ("2 * x", "x", "2::test_double"): "error: its test does not exist",
        ("2 * x", "x", " -k nothing"): "error: pytest ended with 5 without any fault",
        ("2 * x", "x", "::test_red"): "error: pytest ended with 1 without any fault",
    }
    done = run_on(tmp_path, *outcomes)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stdout.splitlines()[: len(outcomes)]
    found = sorted(line.partition("] ")[2].partition("  ")[0].strip() for line in lines)
    assert found == sorted(outcomes.values())
    assert done.stdout.splitlines()[-1].startswith("1 of 10 faults noticed")


def test_one_survivor_alone_fails_the_run(tmp_path: Path) -> None:
    done = run_on(tmp_path, ("3 * x", "4 * x", "::test_triple"))
    assert done.returncode == 1, done.stdout + done.stderr


def check_entries(root: Path) -> str:
    command = [sys.executable, RUNNER, "--check", "--root", root]
    return subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_every_planted_fault_fits_the_tree() -> None:
    assert check_entries(ROOT) == ""


CODE = """\
def spread(values, count, *, ddof=1):
    mean = sum(values) / count  # of all
    if count > ddof and not values.empty:
        return math.sqrt(
            sum((value - mean) ** 2 for value in values)
            / (count - ddof)
        )
    return max(
        values,
        key=abs,
    )
"""


@pytest.mark.parametrize(
    ("old", "new", "planted"),
    [
        ("sum(values)/count", "0", "mean = 0  # of all"),
        ("return max(values, key=abs)", "return 0", "    return 0\n"),
        ("sum((value-mean)**2 for value in values) / (count-ddof)", "0", "sqrt(\n            0\n"),
        ("count - ddof", "count", "/ (count)"),
        ("/ (count - ddof)", "", "for value in values)\n            \n"),
        ("and not values.empty:", ":", "if count > ddof :"),
        ("key=abs,", "", "values,\n        \n"),
        ("if count > ddof and not values.empty:", "for _ in ():\n    pass\nif ddof:",
         "    for _ in ():\n        pass\n    if ddof:\n        return math"),
        ("mean = sum(numbers) / count", "mean = min(numbers)", "    mean = min(values)  # of all"),
        ("sum((item - mean) ** 2 for item in values)", "abs(item)", "abs(value)"),
    ],
)  # fmt: skip
def test_a_piece_is_found_by_its_syntax(old: str, new: str, planted: str) -> None:
    (place,) = syntax.find(old, CODE)
    assert planted in syntax.replace(CODE, place, new)


@pytest.mark.parametrize(
    ("old", "count"),
    [
        ("values", 5),
        ("count / sum(values)", 0),
        ("(mean ** 2 for value in values)", 0),
        ("key=len", 0),  # one name of two is another: no rename
        ("mean ** 2", 0),  # its parenthesis holds more than the piece
        ("sum(a) / a", 0),  # two names where the piece has one
        ("", 0),
    ],
)
def test_other_code_is_not_taken_for_a_piece(old: str, count: int) -> None:
    assert len(syntax.find(old, CODE)) == count


def test_planted_faults_outlive_another_layout(tmp_path: Path) -> None:
    for folder in ("igrpo_algo", "igrpo_kernels", "benchmarks", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    (tmp_path / "ruff.toml").write_text("line-length = 60\nformat.quote-style = 'single'\n")
    subprocess.run([sys.executable, "-m", "ruff", "format", "-q", "."], cwd=tmp_path, check=True)
    stale = check_entries(tmp_path).splitlines()
    planted = sum(f.read_text().count("\ntest = ") for f in RUNNER.parent.glob("*.toml"))
    # Half a statement may meet a bracket that the formatter has set.
    assert len(stale) <= 0.02 * planted, stale
