"""From hidden states to gradients over the kernels, in Triton's interpreter on CPU tensors.

Run by `test_triton_interpreter.py` in a process of its own. Both products run: the fused one at a
tile of a few rows and columns and in fp32 (the interpreter's bf16 product over descriptors is
wrong), and the library's with the pass that follows it. The oracle is torch in float64.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels._triton import exp_product, exp_rows, head_softmax
from igrpo_kernels.linear_head import LinearHead
from igrpo_kernels.row_softmax import LogitTransform
from igrpo_kernels.row_statistics import LARGEST, RowStatistics
from igrpo_kernels.vocabulary_shard import VocabularyShard
from tests.kernels.triton_problem import (
    ONE,
    SHAPES,
    SMALL,
    TRANSFORMS,
    Problem,
    assert_close,
    assert_rows_close,
    both_products,  # noqa: F401  # runs by itself
)


@pytest.mark.parametrize(("bias", "entropy"), [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_to_gradients(
    shape: tuple[int, int, int], name: str, bias: bool, entropy: bool
) -> None:
    problem = Problem(shape, TRANSFORMS[name], bias=bias)
    softmax = problem.run(entropy=entropy)
    logprobs, entropies = problem.exact(problem.products())
    assert_close(softmax.statistics.logprobs, logprobs)
    if entropy:
        assert_close(softmax.statistics.entropy, entropies)
    upstream = torch.randn(shape[0])
    on_entropy = torch.randn(shape[0]) if entropy else None
    found = softmax.gradient_(upstream, on_entropy, dtype=torch.float32, scales_hidden=True)
    wanted = problem.gradient(upstream, on_entropy)
    assert_rows_close(found.matrix * found.factors[:, None], wanted)
    assert_rows_close(found.matrix.t() @ found.scaled_hidden, wanted.t() @ problem.hidden.double())


@pytest.mark.parametrize("name", TRANSFORMS)
def test_what_a_backward_knows_from_the_forward(name: str) -> None:
    problem = Problem((20, 70, 20), TRANSFORMS[name], bias=True)
    for entropy in (False, True):
        forward = problem.run(entropy=entropy, keeps=False)
        assert forward.exponentials is None
        upstream = torch.randn(20), torch.randn(20) if entropy else None
        found = problem.run(known=forward.statistics).gradient_(*upstream, dtype=torch.float32)
        assert_rows_close(found.matrix * found.factors[:, None], problem.gradient(*upstream))


def test_forward_alone_keeps_nothing_of_the_size_of_the_logits(product: str) -> None:
    problem = Problem((20, 70, 20))
    head = LinearHead(problem.weight, None, problem.transform)
    memory = head_softmax.new_memory(head, 20, keeps=False)
    assert memory.numel() == (0 if product == "fused" else 20 * 70)


def far_from_the_target() -> Problem:
    """Rows whose target's logit is 43 to 700 below the maximum, or at -inf; and rows in range."""
    problem = Problem((20, 70, 4), bias=True)
    assert problem.bias is not None
    problem.bias[3], problem.bias[7], problem.bias[9:12] = 43.0, 700.0, -torch.inf
    problem.targets[:10] = torch.tensor([5, 5, 5, 7, 7, 3, 9, 10, 5, 69])
    problem.weight[7] = 0.0
    return problem


@pytest.mark.parametrize("entropy", [False, True])
def test_rows_out_of_range_are_done_again(entropy: bool) -> None:
    problem = far_from_the_target()
    softmax = problem.run(entropy=entropy)
    logprobs, entropies = problem.exact(problem.products())
    assert (logprobs < -100).sum() > 10
    assert_close(softmax.statistics.logprobs, logprobs)
    assert (softmax.statistics.total < LARGEST).all()
    if entropy:
        assert_close(softmax.statistics.entropy, entropies)
    upstream = torch.randn(20), torch.randn(20) if entropy else None
    found = softmax.gradient_(*upstream, dtype=torch.float32)
    assert problem.bias is not None
    problem.bias.clamp_(min=-1e4)  # whose gradient torch knows
    assert_rows_close(found.matrix * found.factors[:, None], problem.gradient(*upstream))


def test_small_gradients_of_unlikely_tokens_keep_their_digits() -> None:
    # others = e^87 fits fp32; 1e-6 / others is a dozen of its smallest steps, and keeps no digits
    problem = Problem((20, 70, 4), bias=True)
    assert problem.bias is not None
    problem.bias[3], problem.targets[:] = problem.bias[5] + 87.0, 5
    problem.weight[3] = problem.weight[5]
    softmax = problem.run()
    found = softmax.gradient_(torch.full((20,), 1e-6), dtype=torch.float32, scales_hidden=True)
    wanted = problem.gradient(torch.ones(20), None)
    assert_rows_close(1e6 * found.factors[:, None] * found.matrix, wanted)
    by_weight = 1e6 * found.matrix.t() @ found.scaled_hidden
    assert_rows_close(by_weight, wanted.t() @ problem.hidden.double())


def test_rows_in_range_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem((20, 70, 4), bias=True)
    assert problem.bias is not None
    problem.bias[3], problem.targets[:] = 25.0, 5
    near = problem.run()
    assert (near.statistics.total > 2**20).all()
    problem.hidden[4] *= -100
    with_one = problem.run()
    others = torch.arange(20) != 4
    assert with_one.statistics.logprobs[4] < -100
    assert torch.equal(with_one.exponentials[others], near.exponentials[others])
    problem.hidden[4] /= -100
    monkeypatch.setattr(exp_rows, "products_tile", None)  # nothing is multiplied again
    assert torch.equal(problem.run().exponentials[others], near.exponentials[others])


@pytest.mark.parametrize("others", [-torch.inf, -200.0])
def test_all_others_without_weight(others: float) -> None:
    problem = Problem((3, 40, 4), bias=True)
    assert problem.bias is not None
    problem.bias[:] = others
    problem.targets[:] = torch.tensor([4, 4, 39])
    problem.bias[4] = problem.bias[39] = 0.0
    problem.weight[39] = problem.weight[4]
    got = problem.run(entropy=True).statistics
    assert_close(got.logprobs, -torch.full((3,), 2.0).log())
    problem.bias[39] = others
    got = problem.run(entropy=True).statistics
    assert (got.logprobs[:2] == 0).all()
    assert (got.entropy[:2] == 0).all()


def test_a_row_that_is_not_a_number_stays_one() -> None:
    problem = Problem((20, 40, 4))
    problem.hidden[3] = torch.nan
    logprobs = problem.run().statistics.logprobs
    assert logprobs[3].isnan()
    assert logprobs[torch.arange(20) != 3].isfinite().all()


@pytest.mark.parametrize("margin", [8.0, 16.0, 30.0])
def test_confident_tokens_keep_their_digits(margin: float) -> None:
    problem = Problem((16, 40, 4), bias=True)
    assert problem.bias is not None
    problem.targets[:], problem.weight[5] = 5, 0.0
    problem.bias[5] = (problem.products().amax() + margin).item()
    logits = problem.products()
    others = (logits - logits[:, 5:6]).exp()
    others[:, 5] = 0.0
    others = others.sum(1)
    softmax = problem.run()
    assert_close(softmax.statistics.logprobs, -others.log1p(), 2e-5, 0.0)
    found = softmax.gradient_(torch.ones(16), dtype=torch.float32)
    got = (found.matrix * found.factors[:, None])[:, 5]
    assert_close(got, others / (1 + others), 2e-5, 0.0)


def test_bf16_exponentials_take_the_front_half_of_the_products(product: str) -> None:
    if product == "fused":
        return  # the interpreter's bf16 product is wrong; its rounding is seen in the compiled code
    problem = Problem((20, 70, 20), TRANSFORMS["cap"], bias=True, dtype=torch.bfloat16)
    softmax = problem.run()
    assert softmax.exponentials.dtype == torch.bfloat16
    upstream = torch.randn(20)
    found = softmax.gradient_(upstream, dtype=torch.bfloat16)
    # rounded once, and the interpreter truncates
    assert_rows_close(found.matrix * found.factors[:, None], problem.gradient(upstream, None), 8e-3)


class WaitsError(Exception):
    """A slice waits for the others."""


class Replay:
    """In place of a shard: hands back what earlier runs of all slices came to, then stops."""

    def __init__(self, start: int, known: list[Tensor]) -> None:
        self.start, self.known, self.seen = start, known, 0
        self.own: tuple[Any, Tensor] = (None, torch.empty(0))

    def add(self, values: Tensor) -> Tensor:
        return self._exchange(torch.Tensor.sum, values)

    def maximum(self, values: Tensor) -> Tensor:
        return self._exchange(torch.Tensor.amax, values)

    def _exchange(self, merge: Callable[..., Tensor], values: Tensor) -> Tensor:
        self.seen += 1
        if self.seen <= len(self.known):
            return self.known[self.seen - 1]
        self.own = merge, values
        raise WaitsError


def over_slices(problem: Problem, cuts: list[int], **options: Any) -> list[Any]:
    """Run all slices until none waits."""
    known: list[Tensor] = []
    while True:
        done, waiting = [], []
        for start, end in pairwise([0, *cuts, len(problem.weight)]):
            part = Problem((len(problem.hidden), 1, 1))
            part.__dict__ |= problem.__dict__
            part.weight = problem.weight[start:end]
            part.bias = None if problem.bias is None else problem.bias[start:end]
            shard = Replay(start, known)
            try:
                done.append(part.run(shard=shard, **options))
            except WaitsError:
                waiting.append(shard.own)
        if not waiting:
            return done
        assert not done
        merge = waiting[0][0]
        known.append(merge(torch.stack([values for _, values in waiting]), 0))


@pytest.mark.parametrize(("cuts", "entropy"), [([1, 69], False), ([0, 30, 30], True)])
@pytest.mark.parametrize("kind", ["temperature per row", "cap", "out of range"])
def test_slices_of_the_vocabulary(kind: str, cuts: list[int], entropy: bool) -> None:
    if kind == "out of range":
        problem = far_from_the_target()
    else:
        problem = Problem((20, 70, 20), TRANSFORMS[kind], bias=True)
    count = len(problem.hidden)
    logprobs, entropies = problem.exact(problem.products())
    upstream = torch.randn(count), torch.randn(count) if entropy else None
    grads = []
    for softmax in over_slices(problem, cuts, entropy=entropy):
        assert_close(softmax.statistics.logprobs, logprobs)
        if entropy:
            assert_close(softmax.statistics.entropy, entropies)
        found = softmax.gradient_(*upstream, dtype=torch.float32)
        grads.append(found.matrix * found.factors[:, None])
    if problem.bias is not None:
        problem.bias.clamp_(min=-1e4)
    assert_rows_close(torch.cat(grads, 1), problem.gradient(*upstream))


def test_a_chunk_budget_below_one_row(product: str) -> None:
    head = LinearHead(torch.randn(70, 8), None, LogitTransform(ONE), chunk_bytes=1)
    assert head_softmax.rows_per_chunk(head, 20, keeps=True) == 1
    assert head_softmax.rows_per_chunk(head, 20, keeps=False) == 1
    widths = {"fused": 2, "library": 4}
    budget = replace(head, chunk_bytes=widths[product] * 70 * 5)
    assert head_softmax.rows_per_chunk(budget, 20, keeps=True) == 5


@pytest.mark.parametrize(
    ("rows", "vocabulary", "width", "trains", "chunk"),
    [
        (8192, 151_936, 4096, True, 8833),  # fits
        (8192, 262_144, 4096, True, 8192),  # two chunks and an fp32 dW would take as much
        (8192, 262_144, 4096, False, 5120),
        (8192, 151_936, 1024, True, 4416),  # here they take less, and so does a smaller chunk
        (32_768, 151_936, 4096, True, 8833),
    ],
)
def test_rows_go_at_once_where_that_takes_no_more_memory(
    rows: int, vocabulary: int, width: int, trains: bool, chunk: int, product: str
) -> None:
    with torch.device("meta"):
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).requires_grad_(trains)
    if product == "fused":
        head = LinearHead(weight, None, LogitTransform(ONE))
        assert head_softmax.rows_per_chunk(head, rows, keeps=True) == chunk


def test_hidden_states_that_begin_off_a_boundary() -> None:
    problem = Problem((20, 70, 20))
    aligned = problem.run().statistics.logprobs
    moved = torch.empty(20 * 20 + 1)[1:].view(20, 20)
    moved.copy_(problem.hidden)
    assert moved.data_ptr() % 16
    problem.hidden = moved
    assert torch.equal(problem.run().statistics.logprobs, aligned)


def test_rows_of_exponentials_begin_at_multiples_of_16_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head_softmax, "tile_for", lambda weight: SMALL)
    for vocabulary in (1, 7, 70, 72):
        head = LinearHead(torch.randn(vocabulary, 8), None, LogitTransform(ONE))
        memory = head_softmax.new_memory(head, 3, keeps=True)
        assert memory.stride(0) * memory.element_size() % 16 == 0
        assert memory.shape[1] >= vocabulary


def test_float64_is_refused_in_words() -> None:
    problem = Problem((2, 5, 4), dtype=torch.float64)
    with pytest.raises(TypeError, match="float64 has no kernel: cast to float32, or move"):
        problem.run()


def test_statistics_are_of_the_twins_kind() -> None:
    assert isinstance(Problem((2, 5, 4)).run().statistics, RowStatistics)


# Which product runs


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., torch.device]]:
    """A GPU of some capability, asked for and not used."""

    def make(capability: tuple[int, int], hip: str | None = None) -> torch.device:
        exp_product.tile_of_device.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        monkeypatch.setattr(torch.version, "hip", hip)
        return torch.device("cuda", 0)

    yield make
    exp_product.tile_of_device.cache_clear()


@pytest.mark.parametrize(
    ("capability", "hip", "fuses"),
    [
        ((9, 0), None, True),
        ((10, 0), None, True),
        ((8, 0), None, False),  # no copy engine
        ((8, 9), None, False),
        ((12, 0), None, False),  # too little shared memory
        ((9, 4), "6.4", False),  # AMD's gfx942 calls itself so,
        ((9, 0), "6.4", False),  # and gfx90a so
    ],
)
def test_the_product_of_a_device(
    capability: tuple[int, int], hip: str | None, fuses: bool, device: Any
) -> None:
    assert (exp_product.tile_of_device(device(capability, hip)) is not None) == fuses


def test_the_product_of_a_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exp_product, "tile_of_device", lambda device: SMALL)
    weight = torch.randn(40, 16).bfloat16()
    assert exp_product.tile_for(weight) is SMALL
    for other in (
        weight.half(),
        weight.float(),
        weight[:, :12].contiguous(),  # rows of 24 bytes
        weight[:, 1:9],  # begins off a boundary
        weight.t(),
        torch.randn(40, 1).bfloat16(),
        weight[:, :12],  # 32 bytes apart, but rows of hidden states are 24
        weight[:1].expand(40, 16),
    ):
        assert exp_product.tile_for(other) is None
    assert exp_product.tile_for(weight[:, :8]) is SMALL  # rows 32 bytes apart


def test_all_ranks_cut_the_same_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the product of the weight itself
    monkeypatch.setattr(exp_product, "tile_of_device", lambda device: SMALL)
    memory = torch.randn(40 * 16 + 1).bfloat16()
    slices = [memory[:-1].view(40, 16), memory[1:].view(40, 16), memory[:0].view(0, 16)]
    assert [exp_product.tile_for(weight) for weight in slices[:2]] == [SMALL, None]
    for keeps in (True, False):
        most = set()
        for rank, weight in enumerate(slices):
            shard = VocabularyShard(sizes=(40, 40, 0), rank=rank, group_name="tp")
            head = LinearHead(weight, None, LogitTransform(ONE), shard, chunk_bytes=1000)
            most.add(head_softmax.rows_per_chunk(head, 20, keeps))
        assert len(most) == 1


def test_every_tile_fits_what_a_block_has() -> None:
    for tile in exp_product.TILES.values():
        operands = tile.stages * (tile.rows + tile.columns) * tile.depth * 2
        assert operands + tile.rows * (tile.columns // 2) * 2 <= 227 * 1024
        assert tile.columns // 4 * 2 >= 16  # the least box of the copy engine, in bytes
