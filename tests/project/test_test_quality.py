"""A test that cannot fail is a defect: reads every test for the known ways to write one.

Each rule answers a hole that was found in a good repository: a comparison whose result is dropped,
a tolerance typed 1e6 for 1e-6, a parameter that never reaches the code, a file skipped as a whole.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
COMPARISONS = {"allclose", "isclose", "array_equal"}
TOLERANCES = {"rtol", "rel", "rel_tol"}
RAISING = {"raises", "warns", "gradcheck", "gradgradcheck", "opcheck", "fail"}
CLOCKS = {"perf_counter", "perf_counter_ns", "monotonic", "process_time", "timeit"}
EXTRAS = {"trl", "transformers", "liger_kernel", "vllm"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def called(node: ast.AST) -> str:
    """Last name of what a call calls: `close` for `torch.testing.close(...)`, '' for no call."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)


def is_comparison(node: ast.expr) -> bool:
    return called(node) in COMPARISONS or ast.unparse(node).startswith(
        ("torch.equal(", "np.equal(")
    )


def dropped_comparisons(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and is_comparison(node.value):
            yield node.lineno, "the result of a comparison is dropped"


def loose_tolerances(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg in TOLERANCES:
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            if isinstance(value, int | float) and value > 0.1:
                yield node.lineno, f"{node.arg} = {value} accepts anything"


def fails(node: ast.AST, helpers: set[str]) -> bool:
    """Whether running a node can raise on a wrong value: an assert, or a call that holds one."""
    for inner in ast.walk(node):
        name = called(inner)
        if isinstance(inner, ast.Assert) or name in RAISING | helpers or name.startswith("assert_"):
            return True
        if name == "run" and "check=True" in ast.unparse(inner):
            return True
    return False


def toothless_tests(tree: ast.Module) -> Iterator[tuple[int, str]]:
    functions = [node for node in ast.walk(tree) if isinstance(node, Function)]
    helpers: set[str] = set()
    while grown := {f.name for f in functions if fails(f, helpers)} - helpers:
        helpers |= grown
    for function in functions:
        if function.name.startswith("test_") and function.name not in helpers:
            yield function.lineno, f"{function.name} has nothing that can fail"


def constant_asserts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant) and node.test.value:
            yield node.lineno, "an assert of a constant"


def skipped_files(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in tree.body:
        for inner in [] if isinstance(node, Function | ast.ClassDef) else ast.walk(node):
            name = called(inner)
            if name in {"skip", "skipif"}:
                yield inner.lineno, "a whole file is skipped"
            if name == "importorskip" and ast.literal_eval(inner.args[0]) not in EXTRAS:
                yield inner.lineno, "a whole file is skipped where a package is missing"


def reads_clock(node: ast.AST, names: set[str]) -> bool:
    """Whether a node calls a clock, or holds one of the names that got their value from one."""
    return any(
        called(inner) in CLOCKS
        or (isinstance(inner, ast.Call) and ast.unparse(inner.func) == "time.time")
        or (isinstance(inner, ast.Name) and inner.id in names)
        for inner in ast.walk(node)
    )


def clock_names(function: Function) -> set[str]:
    """Names that hold what a clock gave, directly or through other names."""
    names: set[str] = set()
    assigned = [node for node in ast.walk(function) if isinstance(node, ast.Assign)]
    while (
        grown := {
            target.id
            for node in assigned
            if reads_clock(node.value, names)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        - names
    ):
        names |= grown
    return names


def timing_asserts(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        names = clock_names(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Assert) and reads_clock(node.test, names):
                yield node.lineno, "an assert on time"


def unused_parameters(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
        read = {node.id for part in function.body for node in ast.walk(part) if is_read(node)}
        for decorator in function.decorator_list:
            if called(decorator) != "parametrize" or not decorator.args:
                continue
            names = ast.literal_eval(decorator.args[0])
            names = names.split(",") if isinstance(names, str) else names
            for name in {name.strip() for name in names} - read:
                yield function.lineno, f"{function.name} never uses its parameter {name}"


def is_read(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)


RULES = (
    dropped_comparisons,
    loose_tolerances,
    toothless_tests,
    constant_asserts,
    skipped_files,
    timing_asserts,
    unused_parameters,
)


def violations(source: str) -> list[tuple[int, str]]:
    tree = ast.parse(source)
    return [found for rule in RULES for found in rule(tree)]


def identify(path: Path) -> str:
    return str(path.relative_to(TESTS))


@pytest.mark.parametrize("path", sorted(TESTS.rglob("*.py")), ids=identify)
def test_every_test_can_fail(path: Path) -> None:
    assert violations(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "line", "reason"),
    [
        ("def test_a():\n assert x\n torch.allclose(a, b)", 3, "comparison is dropped"),
        ("def test_a():\n assert x\n torch.equal(a, b)", 3, "comparison is dropped"),
        ("def test_a():\n assert_close(a, b, rtol=1e6)", 2, "accepts anything"),
        ("def test_a():\n assert a == approx(b, rel=0.2)", 2, "accepts anything"),
        ("def test_a():\n print(f(x))", 1, "nothing that can fail"),
        ("def helper():\n pass\ndef test_a():\n helper()", 3, "nothing that can fail"),
        ("def test_a():\n assert True", 2, "assert of a constant"),
        ("pytest.skip('no', allow_module_level=True)", 1, "whole file is skipped"),
        ("pytestmark = pytest.mark.skipif(not cuda, reason='')", 1, "whole file is skipped"),
        ("triton = pytest.importorskip('triton')", 1, "where a package is missing"),
        ("def test_a():\n s = perf_counter()\n d = g() - s\n assert d < 1", 4, "assert on time"),
        ("def test_a():\n assert time.monotonic() < 1", 2, "assert on time"),
        (
            "@pytest.mark.parametrize('n, m', [(1, 2)])\ndef test_a(n, m):\n assert n",
            2,
            "never uses its parameter m",
        ),
    ],
)
def test_each_rule_rejects_its_fault(source: str, line: int, reason: str) -> None:
    ((found_line, found_reason),) = violations(source)
    assert found_line == line
    assert reason in found_reason


@pytest.mark.parametrize(
    "source",
    [
        "def test_a():\n assert torch.allclose(a, b, rtol=1e-5)",
        "def check(x):\n assert x\ndef test_a():\n check(1)",
        "def test_a():\n with pytest.raises(ValueError):\n  f()",
        "def test_a():\n judge.equal(a, b)\n assert judge.count == 1",
        "def test_a():\n torch.autograd.gradcheck(f, x)",
        "def test_a():\n subprocess.run(command, check=True)",
        "def test_a():\n vllm = pytest.importorskip('vllm')\n assert vllm",
        "@pytest.mark.skipif(not cuda, reason='')\ndef test_a():\n assert f()",
        "def test_a():\n start = time.time()\n assert f()",
        "def test_a():\n assert event.time == 3",
    ],
)
def test_sound_tests_pass(source: str) -> None:
    assert violations(source) == []
