"""The shared fixtures do what the tests that lean on them take for granted."""

import random

import pytest
import torch
from hypothesis import settings
from torch.fx.experimental.proxy_tensor import make_fx

ALLOCATIONS = {
    "empty": lambda dtype: torch.empty(3, dtype=dtype),
    "empty_like": lambda dtype: torch.empty_like(torch.ones(3, dtype=dtype)),
    "empty_strided": lambda dtype: torch.empty_strided((3,), (1,), dtype=dtype),
    "new_empty": lambda dtype: torch.ones(3, dtype=dtype).new_empty(3),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("poisoned_empty")
def test_fresh_memory_is_nan(name: str, dtype: torch.dtype) -> None:
    fresh = ALLOCATIONS[name](dtype)
    assert fresh.dtype == dtype
    assert fresh.isnan().all()


@pytest.mark.parametrize("name", ALLOCATIONS)
@pytest.mark.usefixtures("poisoned_empty")
def test_fresh_integers_are_the_largest(name: str) -> None:
    assert ALLOCATIONS[name](torch.int32).tolist() == [2**31 - 1] * 3
    assert ALLOCATIONS[name](torch.bool).tolist() == [True] * 3


@pytest.mark.usefixtures("poisoned_empty")
def test_what_a_tracer_allocates_is_left_as_it_is() -> None:
    """As in a graph of torch 2.11, which fails on the poison."""

    def allocate(values: torch.Tensor) -> torch.Tensor:
        return values.new_empty(3) + torch.empty(3)

    graph = make_fx(allocate, tracing_mode="fake")(torch.ones(3)).graph
    assert not any("fill" in str(node.target) for node in graph.nodes)


def test_each_test_starts_from_the_same_seed() -> None:
    drawn = torch.rand(2), random.random()
    torch.manual_seed(0)
    random.seed(0)
    torch.testing.assert_close(drawn[0], torch.rand(2), rtol=0, atol=0)
    assert drawn[1] == random.random()


def test_examples_have_no_deadline() -> None:
    assert settings().deadline is None


@pytest.mark.gpu
def test_gpu_tests_run_only_where_there_is_one() -> None:
    assert torch.cuda.is_available()
