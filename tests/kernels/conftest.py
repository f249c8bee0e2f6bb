"""Fixtures of the tests of ops over hidden states."""

from typing import Any

import pytest
from torch import Tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.linear_head as linear_head
import igrpo_kernels.row_selection as row_selection
from igrpo_kernels.row_softmax import ProductGradient
from tests.kernels.linear_policy_cases import T, V


@pytest.fixture(params=["one slice", "many slices"])
def sliced(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with all rows of logits in one slice, and with each in a slice of its own."""
    if request.param == "many slices":
        monkeypatch.setattr(row_selection, "CACHE_BYTES", 0)


@pytest.fixture(params=["one chunk", "some chunks", "many chunks", "many slices"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with all rows in one chunk, and with each in a chunk, or a slice, of its own.

    Some chunks hold whole sequences.
    """
    if request.param == "some chunks":
        monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 4 * V * T)
    if request.param == "many slices":
        monkeypatch.setattr(row_selection, "CACHE_BYTES", 0)
    if request.param == "many chunks":
        monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 0)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Rows of each product for logits, and of each for gradients."""
    rows: dict[str, list[int]] = {"logits": [], "gradients": []}
    products_, add = linear_head.LinearHead.products_, linear_head.HeadGradients.add

    def counting_products(self: Any, buffer: Tensor, hidden: Tensor) -> Tensor:
        rows["logits"].append(len(hidden))
        return products_(self, buffer, hidden)

    def counting_add(self: Any, where: Any, hidden: Tensor, gradient: ProductGradient) -> None:
        rows["gradients"].append(len(gradient.matrix))
        add(self, where, hidden, gradient)

    monkeypatch.setattr(linear_head.LinearHead, "products_", counting_products)
    monkeypatch.setattr(linear_head.HeadGradients, "add", counting_add)
    return rows
