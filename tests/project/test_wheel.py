"""The wheel holds the two packages, typed, and works away from the checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("igrpo_algo", "igrpo_kernels")


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that nothing is left behind in the checkout."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for name in (*PACKAGES, "tests", "benchmarks", "docs"):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", cwd=source)
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_holds_the_two_packages_and_nothing_else(wheel: Path) -> None:
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    held = {file for file in files if not file.parts[0].endswith(".dist-info")}
    wanted = {
        path.relative_to(ROOT)
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == wanted
    assert {Path(package, "py.typed") for package in PACKAGES} <= held


def test_wheel_needs_only_torch_triton_and_filelock(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    lines = archive.read(metadata).decode().splitlines()
    needs = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    names = sorted(line.split()[1].split(";")[0].split(">")[0] for line in needs)
    assert names == ["filelock", "torch", "triton"]  # torch brings filelock along
    assert "Requires-Python: >=3.11" in lines


def test_installed_wheel_works_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    run(sys.executable, "-m", *install, target, wheel, cwd=tmp_path)
    script = (
        "import torch, igrpo_algo, igrpo_kernels\n"
        "print(igrpo_algo.__file__, igrpo_kernels.__file__)\n"
        "rewards = torch.tensor([[0.0, 1.0, float('nan')]])\n"
        "assert igrpo_algo.select_best_draft(rewards).index.tolist() == [1]\n"
        "logprobs = torch.zeros(2, 3, requires_grad=True)\n"
        "igrpo_algo.igrpo_loss(logprobs, torch.tensor([1.0, -1.0])).backward()\n"
        "torch.testing.assert_close(logprobs.grad, torch.tensor([[-1.0], [1.0]]).expand(2, 3) / 6)"
    )
    printed = run(sys.executable, "-c", script, cwd=tmp_path, PYTHONPATH=str(target))
    assert all(target in Path(path).parents for path in printed.split())
