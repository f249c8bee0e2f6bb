"""What every test may count on: fixed seeds, no network, and GPU tests skipped one by one."""

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
sys.path.append(str(Path(__file__).parent / "models"))

# Wall time depends on the machine, so no example has a deadline; CI draws the same ones each time.
settings.register_profile("igrpo", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("igrpo")

KERNEL_TESTS = Path(__file__).parent / "kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


def poison(tensor: Tensor) -> Tensor:
    """Fill fresh memory with NaN, or with the largest integer there is."""
    if tensor.is_floating_point() or tensor.is_complex():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_poisoned(*args: object, **kwargs: object) -> Tensor:
        fresh = allocate(*args, **kwargs)
        # Under a tracer, whose tensors are of other types, poison would become part of the program
        is_traced = torch.compiler.is_compiling() or type(fresh) is not Tensor
        return fresh if is_traced else poison(fresh)

    return allocate_poisoned


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make uninitialized memory hold NaN, so that an element nobody writes turns a test red."""
    for owner, name in [
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ]:
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _poisoned_empty_in_kernel_tests(request: pytest.FixtureRequest) -> None:
    if KERNEL_TESTS in request.path.parents:
        request.getfixturevalue("poisoned_empty")
