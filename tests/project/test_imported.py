"""What happens on import, and that copies of the folders work in another project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS, ALGO = ROOT / "igrpo_kernels", ROOT / "igrpo_algo"
GUIDE = ROOT / "docs" / "use" / "vendoring.md"
OF_VENDORED_TESTS = (
    "conftest.py",
    "head_cases.py",
    "linear_policy_cases.py",
    "loss_oracles.py",
    "triton_problem.py",
)
VENDORED_TESTS = (
    "test_linear_policy_loss.py",
    "test_linear_token_logprobs.py",
    "test_policy_loss.py",
    "test_policy_loss_input.py",
    "test_sequences.py",
    "test_token_logprobs.py",
    "triton_head.py",
    "triton_head_ops.py",
    "triton_logits.py",
    "triton_losses.py",
)
HEAVY = ["triton", "transformers", "trl", "matplotlib", "datasets", "accelerate"]


def run_python(script: str, cwd: Path, *path: Path) -> str:
    """Run a script in a fresh interpreter and return what it printed, errors included."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("package", ["igrpo_kernels", "igrpo_algo"])
def test_import_loads_nothing_heavy_and_prints_nothing(package: str, tmp_path: Path) -> None:
    script = (
        f"import sys, torch; before = set(sys.modules)\nimport {package}\n"
        f"new = {{name.partition('.')[0] for name in set(sys.modules) - before}}\n"
        f"assert not new & set({HEAVY}), new & set({HEAVY})"
    )
    assert run_python(script, tmp_path, ROOT) == ""


@pytest.mark.parametrize("package", ["igrpo_kernels", "igrpo_algo"])
def test_import_works_without_triton(package: str, tmp_path: Path) -> None:
    script = f"import sys; sys.modules['triton'] = None; import {package}"
    assert run_python(script, tmp_path, ROOT) == ""


@pytest.mark.parametrize("package", ["igrpo_kernels", "igrpo_algo"])
def test_import_leaves_torch_as_it_was(package: str, tmp_path: Path) -> None:
    script = (
        "import warnings, torch, torch.nn.functional as F\n"
        "def state():\n"
        "    spaces = {space.__name__: dict(vars(space)) for space in (torch, F, torch.Tensor)}\n"
        "    settings = (torch.get_default_dtype(), torch.get_num_threads(),\n"
        "                torch.is_grad_enabled(), torch.initial_seed(), list(warnings.filters))\n"
        "    return spaces, settings\n"
        f"before = state()\nimport {package}\nafter = state()\n"
        "assert after[1] == before[1], 'a setting changed'\n"
        "for space, old in before[0].items():\n"
        "    moved = [name for name in old if after[0][space].get(name) is not old[name]]\n"
        "    assert not moved, (space, moved)"
    )
    assert run_python(script, tmp_path, ROOT) == ""


def test_a_vendored_copy_works_under_another_name(tmp_path: Path) -> None:
    host = tmp_path / "otherpkg"
    host.mkdir()
    (host / "__init__.py").touch()
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, host / "_vendored", ignore=ignored)
    script = (
        "import sys, torch\n"
        "sys.modules['igrpo_kernels'] = sys.modules['igrpo_algo'] = None\n"
        "from otherpkg import _vendored as kernels\n"
        "from otherpkg._vendored.loss_from_logprobs import policy_loss\n"
        "logits = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)\n"
        "logprobs = kernels.token_logprobs(logits, torch.tensor([2]))\n"
        "loss = policy_loss(logprobs[None], torch.tensor([[1.0]]),\n"
        "    surrogate=kernels.Clip(), aggregate=kernels.SequenceMean()).loss\n"
        "loss.backward()\n"
        "want = torch.log_softmax(logits.detach(), -1)\n"
        "torch.testing.assert_close(logprobs.detach(), want[:, 2])\n"
        "torch.testing.assert_close(logits.grad, want.exp() - torch.eye(3)[2:])\n"
        "assert kernels.__file__.endswith('otherpkg/_vendored/__init__.py')"
    )
    assert run_python(script, tmp_path, tmp_path) == ""


@pytest.mark.slow
def test_a_vendored_copy_passes_the_kernel_tests(tmp_path: Path) -> None:
    """The folder under another name, its tests told that name, and this project out of reach."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(KERNELS, tmp_path / "otherpkg" / "_vendored", ignore=ignored)
    tests = [ROOT / "tests" / "kernels" / name for name in (*OF_VENDORED_TESTS, *VENDORED_TESTS)]
    copy_tests(tmp_path, tests, {"igrpo_kernels": "otherpkg._vendored"})
    # NumPy's words for inf and NaN, which both sides of a select in a kernel may hold
    quiet = ["-W", "ignore::RuntimeWarning:triton.runtime.interpreter", "-k", "not compile"]
    run_tests(tmp_path, ["kernels/" + name for name in VENDORED_TESTS], *quiet)


@pytest.mark.slow
def test_the_commands_of_the_guide_make_a_copy_that_passes_its_tests(tmp_path: Path) -> None:
    """Both packages in another one's tree, made by the guide's own commands."""
    (commands,) = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    (tmp_path / "otherpkg").mkdir()
    environment = os.environ | {"IGRPO": str(ROOT)}
    subprocess.run(["bash", "-euc", commands], cwd=tmp_path, env=environment, check=True)
    copied = tmp_path / "otherpkg" / "_igrpo"
    assert {path.name for path in (copied / "igrpo_algo").iterdir()}.isdisjoint(
        ("engines", "trainers", "cli")
    )
    folders = [ROOT / "tests" / "algo" / folder for folder in VENDORED_FOLDERS]
    tests = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    tests += sorted((ROOT / "tests" / "algo").glob("test_*.py"))
    pure = [path for path in tests if not NEEDS_MORE.search(path.read_text())]
    assert len(pure) >= 30
    where = "otherpkg._igrpo."
    names = {name: where + name for name in ("igrpo_algo", "igrpo_kernels")}
    copy_tests(tmp_path, pure, names)
    run_tests(tmp_path, ["algo"], "-o", "markers=gpu\nslow", "-m", "not gpu and not slow")


VENDORED_FOLDERS = ("advantages", "drafts", "losses", "rollouts", "shared_prompt")
NEEDS_MORE = re.compile(r"igrpo_algo[./](engines|trainers|cli)|import (trl|transformers)|from trl")


def copy_tests(tmp_path: Path, tests: list[Path], names: dict[str, str]) -> None:
    """Copy tests that import the copies by their new names, and can't reach this project."""
    gone = "import sys\nsys.modules['igrpo_kernels'] = sys.modules['igrpo_algo'] = None\n"
    for path in (ROOT / "tests" / "conftest.py", *tests):
        source = path.read_text()
        for old, new in names.items():
            source = re.sub(rf"(?<![\w.]){old}\b", new, source)
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(gone + source if copy.parent.name == "tests" else source)


def run_tests(tmp_path: Path, paths: list[str], *options: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    command += ["--import-mode=importlib", *options]
    command += [str(tmp_path / "tests" / path) for path in paths]
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout
