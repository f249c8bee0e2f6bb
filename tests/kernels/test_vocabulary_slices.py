"""Slices of one vocabulary in threads of one process: their softmax is that of the whole."""

import itertools
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
from igrpo_kernels import VocabularyShard
from igrpo_kernels.linear_head import LinearHead
from igrpo_kernels.relative_softmax import SoftmaxRows
from igrpo_kernels.row_softmax import LogitTransform


class Exchange:
    """Where the slices of one vocabulary, each in a thread, meet in the place of a group."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = tuple(sizes)
        self.brought: list[Tensor] = [torch.empty(0)] * len(sizes)
        self.barrier = threading.Barrier(len(sizes), timeout=60)

    def gather(self, rank: int, values: Tensor) -> Tensor:
        self.brought[rank] = values
        self.barrier.wait()
        gathered = torch.stack(self.brought)
        self.barrier.wait()
        return gathered


@dataclass(frozen=True)
class InAThread(VocabularyShard):
    """A slice that meets the others through an exchange."""

    exchange: Exchange | None = None

    def add(self, values: Tensor) -> Tensor:
        assert self.exchange is not None
        return self.exchange.gather(self.rank, values).sum(0)

    def maximum(self, values: Tensor) -> Tensor:
        assert self.exchange is not None
        return self.exchange.gather(self.rank, values).amax(0)


class GivenLogits(LinearHead):
    """A head whose products are the hidden states themselves, of this slice's columns."""

    def products_(self, memory: Tensor, hidden: Tensor) -> Tensor:
        assert self.shard is not None
        start = self.shard.start
        memory[: len(hidden)] = hidden[:, start : start + self.shard.size]
        return memory[: len(hidden)]


def in_slices(
    products: Tensor, targets: Tensor, transform: LogitTransform, cuts: list[int]
) -> list[SoftmaxRows]:
    """Run each slice of the columns in a thread of its own."""
    ends = [0, *cuts, products.shape[1]]
    exchange = Exchange([b - a for a, b in itertools.pairwise(ends)])

    def run(rank: int) -> SoftmaxRows:
        shard = InAThread(exchange.sizes, rank, "0", exchange)
        head = GivenLogits(products.new_zeros(shard.size, 1), None, transform, shard)
        memory = cpu_head_softmax.new_memory(head, len(products), keeps=True)
        options = {"entropy": True, "keeps": True}
        return cpu_head_softmax.softmax_of_rows(
            head, memory, products, targets, transform, **options
        )

    with ThreadPoolExecutor(len(exchange.sizes)) as pool:
        return list(pool.map(run, range(len(exchange.sizes))))


def gradients_of(slices: list[SoftmaxRows], *upstream: Tensor) -> Tensor:
    parts = [rows.gradient_(*upstream, dtype=rows.exponentials.dtype) for rows in slices]
    return torch.cat([part.multiplied(part.matrix.dtype) for part in parts], 1)


@settings(max_examples=60)
@given(st.data())
def test_slices_add_up_to_the_softmax_of_the_whole(data: st.DataObject) -> None:
    vocabulary = data.draw(st.integers(1, 40))
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    level = data.draw(st.sampled_from([0.0, -100.0, 1e4, -1e6]))
    products = torch.randn(5, vocabulary, dtype=torch.float64)
    products = products * data.draw(st.sampled_from([0.1, 3.0, 500.0])) + level
    products[torch.rand(5, vocabulary) < data.draw(st.sampled_from([0.0, 0.5]))] = -torch.inf
    targets = torch.randint(0, vocabulary, (5,))
    products[torch.arange(5), targets] = level
    cuts = sorted(data.draw(st.lists(st.integers(0, vocabulary), max_size=4)))
    transform = LogitTransform(torch.linspace(0.5, 2, 5, dtype=torch.float64))
    slices = in_slices(products, targets, transform, cuts)

    leaf = products.clone().requires_grad_()
    log_p = (leaf / transform.temperature[:, None]).log_softmax(-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    surprise = torch.where(log_p > -torch.inf, log_p, 0) * log_p.exp()
    entropy = -surprise.sum(-1)
    upstream = torch.randn(2, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad((logprobs, entropy), leaf, list(upstream))
    # float64; a logit carries 1e-16 of its level, and its temperature at least halves it
    close = {"rtol": 1e-10, "atol": 1e-12 + 1e-15 * abs(level) * 10}
    for rows in slices:
        torch.testing.assert_close(rows.statistics.logprobs, logprobs, **close)
        torch.testing.assert_close(rows.statistics.entropy, entropy, **close)
    torch.testing.assert_close(gradients_of(slices, *upstream), grad.nan_to_num(), **close)


def test_a_slice_without_columns_beside_the_largest_logits() -> None:
    products = torch.tensor([[3e38, 3e38]])
    slices = in_slices(products, torch.tensor([1]), LogitTransform(), [0])
    for rows in slices:
        assert rows.statistics.logprobs.item() == pytest.approx(-math.log(2), rel=1e-6)
        assert rows.statistics.entropy is not None
        assert rows.statistics.entropy.item() == pytest.approx(math.log(2), rel=1e-6)
    grads = gradients_of(slices, torch.ones(1), torch.ones(1))
    torch.testing.assert_close(grads, torch.tensor([[-0.5, 0.5]]))


def test_a_slice_without_columns_has_no_maximum() -> None:
    unlikely = torch.tensor([[-2000.0, -1900.0]])  # done again relative to the maximum
    for rows in in_slices(unlikely, torch.tensor([0]), LogitTransform(), [0]):
        assert rows.statistics.logprobs.item() == pytest.approx(-100.0, rel=1e-6)


@pytest.mark.parametrize("margin", [8.0, 17.0, 30.0])
def test_a_confident_token_keeps_its_digits_in_slices(margin: float) -> None:
    products = torch.zeros(2, 6)
    products[0, 4], products[1, 0] = margin, margin
    others = 5 * math.exp(-margin)
    slices = in_slices(products, torch.tensor([4, 0]), LogitTransform(), [2, 2, 5])
    for rows in slices:
        wanted = torch.full((2,), -math.log1p(others))
        torch.testing.assert_close(rows.statistics.logprobs, wanted, rtol=1e-5, atol=0)
    grads = gradients_of(slices, torch.ones(2))
    at_target = torch.full((2,), others / (1 + others))
    torch.testing.assert_close(grads[[0, 1], [4, 0]], at_target, rtol=1e-5, atol=0)


def test_a_row_of_minus_infinity_alone_gives_nan_as_unsharded() -> None:
    products = torch.full((1, 4), -torch.inf)
    for rows in in_slices(products, torch.tensor([3]), LogitTransform(), [2]):
        assert rows.statistics.logprobs.isnan().all()
