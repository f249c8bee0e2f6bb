"""Imports point down only: cli -> trainers, engines -> igrpo_algo -> igrpo_kernels -> torch."""

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, ALGO = ROOT / "igrpo_kernels", ROOT / "igrpo_algo"
UPPER_FLOORS = {"engines", "trainers", "cli"}
FLOORS: dict[str, set[str]] = {
    "fields": set(),
    "files": set(),
    "flat": set(),
    "thinking": set(),
    "prompts": {"thinking"},
    "seeds": set(),
    "layouts": {"fields", "flat", "prompts"},
    "early_warning": set(),
    "advantages": set(),
    "losses": set(),
    "drafts": {"thinking", "prompts", "seeds", "fields"},
    "metrics": {"thinking", "advantages", "drafts"},
    "rollouts": {"files", "flat", "prompts", "seeds", "drafts", "fields", "thinking"},
    "rewards": {"thinking"},
    "shared_prompt": {"layouts", "rollouts"},
    "batch": {"fields", "prompts", "layouts", "advantages", "rollouts", "shared_prompt"},
    "engines": {"prompts", "seeds", "drafts", "rollouts"},
    "trainers": {
        *("files", "prompts", "seeds", "advantages", "losses", "metrics", "drafts", "rollouts"),
        *("thinking", "rewards", "shared_prompt", "batch", "early_warning", "engines", "fields"),
    },
    "cli": {
        *("files", "prompts", "seeds", "metrics", "drafts", "rollouts", "rewards", "engines"),
        "trainers",
    },
    "cli/demo": {
        *("files", "thinking", "prompts", "drafts", "rollouts", "engines", "trainers"),
        "cli",
    },
    "cli/app": {"cli", "cli/demo"},
}
"""What each folder or file of igrpo_algo may import of it: names of rows above its own."""


def imports(source: str, *, anywhere: bool) -> Iterator[tuple[int, str]]:
    """Yield (relative level, dotted module) of the imports at the top level, or of all."""
    tree = ast.parse(source)
    for node in ast.walk(tree) if anywhere else top_level(tree.body):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                yield from ((node.level, alias.name) for alias in node.names)
            else:
                yield node.level, node.module


def top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements that run on import, those under `if` and `try` among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for part in ("body", "orelse", "finalbody", "handlers"):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from top_level(getattr(node, part, []))


def roots(path: Path, *, anywhere: bool) -> set[str]:
    """Top-level packages that a file imports absolutely."""
    found = imports(path.read_text(), anywhere=anywhere)
    return {name.partition(".")[0] for level, name in found if level == 0}


def sources(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def third_party(path: Path, *, anywhere: bool = False) -> set[str]:
    return roots(path, anywhere=anywhere) - set(sys.stdlib_module_names)


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", sources(KERNELS), ids=identify)
def test_kernels_import_torch_and_nothing_above(path: Path) -> None:
    allowed = {"torch", "triton"} if "_triton" in path.parts else {"torch"}
    assert third_party(path, anywhere=True) <= allowed


@pytest.mark.parametrize("path", sources(ALGO), ids=identify)
def test_algo_imports_itself_by_relative_imports(path: Path) -> None:
    assert "igrpo_algo" not in roots(path, anywhere=True)


LIGHT = [path for path in sources(ALGO) if path.relative_to(ALGO).parts[0] not in UPPER_FLOORS]


@pytest.mark.parametrize("path", LIGHT, ids=identify)
def test_algo_is_light_below_its_upper_floors(path: Path) -> None:
    assert third_party(path) <= {"torch", "igrpo_kernels"}


def floor(path: Path) -> str:
    """Name the row of a file: its folder or itself; the command's entry is a floor of its own."""
    parts = path.relative_to(ALGO).with_suffix("").parts
    if parts[0] == "cli":
        is_entry = parts[1:] in [("__init__",), ("__main__",), ("app",)]
        return "cli/app" if is_entry else "cli/demo" if parts[1] == "demo" else "cli"
    return parts[0]


def imported(path: Path, *, anywhere: bool = True) -> set[Path]:
    """Files of igrpo_algo that a file imports, inside functions too or when it is imported."""
    found = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if anywhere else top_level(tree.body):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for target in {base.joinpath(alias.name) for alias in node.names} | {base}:
                files = (target.with_suffix(".py"), target / "__init__.py")
                found |= {file for file in files if file.is_file()} - {path}
    return found


INNER = [path for path in sources(ALGO) if path.parent != ALGO or path.name != "__init__.py"]


@pytest.mark.parametrize("path", INNER, ids=identify)
def test_each_floor_imports_those_below_it(path: Path) -> None:
    packages = {target for target in imported(path) if target.name == "__init__.py"}
    modules = imported(path) - {target for target in packages if target.parent in path.parents}
    assert {floor(target) for target in modules} - {floor(path)} <= FLOORS[floor(path)]


def test_rows_name_rows_above_them() -> None:
    for number, allowed in enumerate(FLOORS.values()):
        assert allowed <= set(list(FLOORS)[:number])


def test_no_two_files_need_each_other_on_import() -> None:
    graph = {
        path: {target for target in imported(path, anywhere=False) if target.name != "__init__.py"}
        for path in INNER
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) >= len(INNER)


def test_a_lazy_import_is_an_edge(tmp_path: Path) -> None:
    for name in ("one/a.py", "one/__init__.py", "two/b.py", "two/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "one/a.py").write_text(
        "def f():\n    from ..two.b import g\n    from .. import two\n"
    )
    assert imported(tmp_path / "one/a.py", anywhere=False) == set()
    assert imported(tmp_path / "one/a.py") == {tmp_path / "two/b.py", tmp_path / "two/__init__.py"}


def test_the_reader_sees_imports_wherever_they_hide() -> None:
    source = "if True:\n try:\n  import trl.x\n except ImportError: from . import cli\n"
    lazy = "def f():\n from triton import jit\n"
    assert list(imports(source, anywhere=False)) == [(0, "trl.x"), (1, "cli")]
    assert list(imports(lazy, anywhere=False)) == []
    assert list(imports(lazy, anywhere=True)) == [(0, "triton")]
