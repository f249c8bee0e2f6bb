"""What README shows is what happens: its code runs, its output is real, its commands exist.

A ```python block runs by itself. Where a ```text block follows it, that is what it prints. A block
under `<!-- not run: why -->` needs what a test has not (a model, a GPU); its imports must work.
"""

import ast
import contextlib
import io
import itertools
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"<!-- not run: .+ -->\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block of README."""

    language: str
    text: str
    line: int
    runs: bool
    output: str | None = None


def read_blocks(markdown: str) -> list[Block]:
    """Return the fenced blocks in order; a text block right behind a python block is its output."""
    matches = list(FENCE.finditer(markdown))
    blocks = []
    for match, after in itertools.pairwise([*matches, None]):
        language, text = match.groups()
        output = None
        if language == "python" and after is not None and after.group(1) == "text":
            is_next = not markdown[match.end() : after.start()].strip()
            output = after.group(2) if is_next else None
        before = markdown[: match.start()]
        runs = not NOT_RUN.search(before)
        blocks.append(Block(language, text, before.count("\n") + 1, runs, output))
    return blocks


README = (ROOT / "README.md").read_text()
BLOCKS = read_blocks(README)
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in {"bash", "sh", "shell", "console"}]
COMMANDS = [
    line.strip().removeprefix("$ ")
    for block in SHELL
    for line in block.text.replace("\\\n", " ").splitlines()
]


def execute(block: Block) -> str:
    """Run a block in a namespace of its own and return what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.text, f"README.md:{block.line}", "exec"), {"__name__": "__main__"})
    return printed.getvalue()


def lines_of(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


@pytest.mark.parametrize("block", PYTHON, ids=lambda block: f"line_{block.line}")
def test_python_block_runs(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if block.runs:
        printed = execute(block)
        assert block.output is None or lines_of(printed) == lines_of(block.output)
    else:
        tree = ast.parse(block.text)
        imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        assert imports, "a block that is not run shows at least where its names come from"
        exec(compile(ast.Module(imports, []), "README.md", "exec"), {})


def test_first_block_is_a_short_example_with_its_output() -> None:
    first = PYTHON[0]
    assert first.runs
    assert first.output
    assert len([line for line in first.text.splitlines() if line.strip()]) <= 12


def test_make_commands_are_targets() -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [re.findall(r"[a-z-]+", line)[1] for line in COMMANDS if line.startswith("make ")]
    for page in ("README.md", "CONTRIBUTING.md", "AGENTS.md"):
        named += re.findall(r"`make ([a-z-]+)[ `]", (ROOT / page).read_text())
    assert {"demo", "test"} <= set(named)
    assert set(named) <= set(targets)


def help_of(command: str) -> str:
    environment = {**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "TERM": "dumb"}
    script = "from igrpo_algo.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", script, *([command] if command else []), "--help"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout


def test_igrpo_commands_and_their_options_exist() -> None:
    used: dict[str, set[str]] = {}
    for line in COMMANDS:
        if line.startswith("igrpo "):
            command = line.split()[1]
            used.setdefault(command, set()).update(re.findall(r"(?<= )--[a-z-]+", line))
    assert {"train", "eval", "demo", "doctor"} <= set(used)
    for command, options in used.items():
        offered = set(re.findall(r"--[a-z-]+", help_of(command)))
        assert options <= offered


def test_blocks_are_read_with_their_outputs() -> None:
    fence = "```"
    markdown = (
        f"{fence}python\nprint(1)\n{fence}\n\n{fence}text\n1\n{fence}\n"
        f"<!-- not run: needs a model -->\n{fence}python\nimport os\n{fence}\nso\n"
        f"{fence}text\nnot its output\n{fence}\n"
    )
    first, _, second, _ = read_blocks(markdown)
    assert (first.output, first.runs, first.line) == ("1\n", True, 1)
    assert (second.output, second.runs) == (None, False)
    assert execute(first) == "1\n"
