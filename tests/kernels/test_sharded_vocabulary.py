"""A vocabulary cut over ranks: the same numbers as the whole one, the same bits on every rank."""

import importlib.util
import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.row_checks as row_checks
from igrpo_kernels import VocabularyShard, linear_policy_loss, linear_token_logprobs
from igrpo_kernels.head_softmax import is_one_chunk
from igrpo_kernels.linear_head import HeadGradients, LinearHead
from igrpo_kernels.relative_softmax import SoftmaxRows
from igrpo_kernels.row_softmax import LogitTransform, ProductGradient

WORKER = Path(__file__).with_name("sharded_ranks.py")


def load_worker() -> Any:
    spec = importlib.util.spec_from_file_location("sharded_ranks", WORKER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sharded_ranks"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


ranks = load_worker()
OF_A_SLICE = {"weight", "bias"}


@dataclass
class Run:
    """What the ranks of one group saw, and what there is to compare it with."""

    ranks: list[dict[str, Any]]
    unsharded: dict[str, Any]

    def pairs(self, got: Callable[[Any], Any], wanted: Any, split: str) -> Iterator[Any]:
        """Each rank's outputs beside the unsharded ones, of the weight the rank's rows."""
        for seen in self.ranks:
            sizes, rank = seen["shards"][split]
            rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
            for (name, value), (wanted_name, whole) in zip(got(seen), wanted, strict=True):
                assert name == wanted_name
                yield value, whole[rows] if name in OF_A_SLICE else whole


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run every case on as many processes as the group has ranks: one start for all tests."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(str, sys.path)))
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, str(rank), str(world), folder],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * world, "\n".join(said)[-6000:]
    seen = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    return Run(seen, torch.load(folder / "unsharded.pt"))


each_split = pytest.mark.parametrize("split", ["uneven", "empty"])
each_case = pytest.mark.parametrize("name", ranks.CASES)


@each_split
def test_sizes_are_gathered_in_rank_order(group: Run, split: str) -> None:
    sizes = ranks.SPLITS[len(group.ranks)][split]
    assert [seen["shards"][split] for seen in group.ranks] == [
        (sizes, rank) for rank in range(len(sizes))
    ]
    assert sum(sizes) == 507


@each_split
@each_case
def test_the_whole_vocabularys_values_and_gradients(group: Run, split: str, name: str) -> None:
    wanted = group.unsharded["wanted"][name]
    for value, exact in group.pairs(lambda seen: seen["cases"][split, name][0], wanted, split):
        # float64 on both sides; logits of size 900 carry 1e-13 each
        torch.testing.assert_close(value, exact, rtol=1e-11, atol=1e-12, equal_nan=True)


@each_split
@each_case
def test_the_same_bits_on_every_rank_and_again(group: Run, split: str, name: str) -> None:
    shared = []
    for seen in group.ranks:
        first, again = seen["cases"][split, name]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
        shared.append([value for part, value in first if part not in OF_A_SLICE])
    for other in shared[1:]:
        assert all(torch.equal(a, b) for a, b in zip(shared[0], other, strict=True))


@each_split
@pytest.mark.parametrize("dtype", ranks.DTYPES, ids=str)
@pytest.mark.parametrize("name", ranks.ROUNDED)
def test_rounds_no_more_than_unsharded(
    group: Run, split: str, name: str, dtype: torch.dtype
) -> None:
    exact = group.unsharded["exact"][name, dtype]
    plain = group.unsharded["rounded"][name, dtype]
    bounds = []
    for (_, value), (_, wanted) in zip(plain, exact, strict=True):
        rounding = torch.finfo(value.dtype).eps * wanted.abs().max()
        # twice the error of one head in the same dtype, plus the rounding of the result
        bounds.append(2 * (value.double() - wanted).abs().max() + rounding)
    pairs = group.pairs(lambda seen: seen["rounded"][split, name, dtype], exact, split)
    for bound, (value, wanted) in zip(itertools.cycle(bounds), pairs, strict=False):
        assert ((value.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("group", [2], indirect=True)
@pytest.mark.parametrize("name", ["log-probs", "loss"])
def test_compiles_without_a_graph_break(group: Run, name: str) -> None:
    for seen in group.ranks:
        for (_, value), (_, eager) in zip(*seen["compiled"][name], strict=True):
            # one op or two passes: float64 on both sides
            torch.testing.assert_close(value, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [3], indirect=True)
def test_a_group_of_some_ranks(group: Run) -> None:
    first, outsider, last = [seen["smaller"] for seen in group.ranks]
    assert "group must be a process group of this rank" in outsider
    for rows, outputs in [(slice(0, 400), first), (slice(400, 507), last)]:
        for op, unsharded in zip(outputs, group.unsharded["smaller"], strict=True):
            for (name, value), (_, whole) in zip(op, unsharded, strict=True):
                wanted = whole[rows] if name in OF_A_SLICE else whole
                torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-12)


@each_split
def test_ranks_that_count_other_rows_are_all_told(group: Run, split: str) -> None:
    rows = [8] + [9] * (len(group.ranks) - 1)  # of 12, less 3 of advantage zero
    for seen in group.ranks:
        assert f"must bring the same rows, got {rows} rows" in seen["refused", split]


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_a_group_of_one_rank_gives_the_bits_of_no_group() -> None:
    for make, run in ranks.CASES.values():
        batch = make()
        sharded = batch.sliced(VocabularyShard.of(batch.weight))
        for (_, value), (_, wanted) in zip(run(sharded), run(batch), strict=True):
            assert torch.equal(value.nan_to_num(), wanted.nan_to_num())


@pytest.fixture
def collectives(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every collective, and how many numbers each rank brings."""
    calls = []
    all_gather, all_reduce = dist.all_gather, dist.all_reduce

    def counting_gather(gathered: list[Tensor], values: Tensor, **options: Any) -> Any:
        calls.append(("gather", values.numel()))
        return all_gather(gathered, values, **options)

    def counting_reduce(values: Tensor, **options: Any) -> Any:
        calls.append(("reduce", values.numel()))
        return all_reduce(values, **options)

    monkeypatch.setattr(dist, "all_gather", counting_gather)
    monkeypatch.setattr(dist, "all_reduce", counting_reduce)
    return calls


@pytest.mark.usefixtures("alone")
def test_two_sums_per_chunk_and_one_of_the_hidden_gradient(
    collectives: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = ranks.make_batch()
    batch = batch.sliced(VocabularyShard.of(batch.weight))
    monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 4 * 507 * 5)  # 5 rows
    collectives.clear()
    batch.loss(surrogate=ranks.Reinforce(), entropy_coef=0.1)
    # of 12 rows: the targets' logits, the sums and moments, the gradient of the hidden states
    chunk = [("gather", 4), ("gather", 2 * 4), ("reduce", 4 * ranks.H)]
    count = ("gather", 1)
    assert collectives == [count, *chunk, *chunk, *chunk, count]
    collectives.clear()
    logprobs = batch.logprobs()
    assert collectives == [count, *[("gather", 4), ("gather", 4)] * 3]
    collectives.clear()
    logprobs[1, :3].sum().backward()
    assert collectives == [count, ("reduce", 3 * ranks.H)]  # the forward's statistics are kept
    collectives.clear()
    batch.hidden = batch.hidden.detach()
    batch.loss()
    assert not [call for call in collectives if call[0] == "reduce"]


def test_chunks_are_cut_by_the_widest_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_head_softmax, "CHUNK_BYTES", 4 * 9 * 5)
    shard = VocabularyShard((3, 9), rank=0, group_name="0")
    head = LinearHead(torch.ones(3, 2), None, LogitTransform(), shard)
    assert cpu_head_softmax.rows_per_chunk(head, 100, keeps=True) == 5
    assert not is_one_chunk(head, range(6))
    assert is_one_chunk(head, range(5))


class BesideAShareOf255(VocabularyShard):
    """A shard whose other rank has a share of -255 in every gradient."""

    def sum_(self, values: Tensor) -> Tensor:
        return values.sub_(255)


def test_shares_are_summed_before_they_are_rounded() -> None:
    weight = torch.tensor([[255], [2**-7]]).bfloat16()  # their sum has more bits than bf16
    shard = BesideAShareOf255((2, 1), rank=0, group_name="0")
    head = LinearHead(weight, None, LogitTransform(), shard)
    one = torch.ones(1, 1).bfloat16()
    gradients = HeadGradients(head, one, [True, False, False], one_chunk=True)
    gradients.add(range(1), one, ProductGradient(torch.ones(1, 2).bfloat16()))
    (gradient,) = gradients.finish()
    assert gradient.item() == 2**-7


@pytest.mark.usefixtures("alone")
def test_opcheck() -> None:
    op = getattr(torch.ops, row_checks.NAMESPACE).linear_token_logprobs
    hidden = torch.randn(4, 3, requires_grad=True)
    weight = torch.randn(7, 3, requires_grad=True)
    shard = VocabularyShard.of(weight)
    given = (hidden, weight, None, torch.randint(0, 7, (4,)), None, torch.ones(1), None, 1.0, True)
    torch.library.opcheck(op, (*given, True, None, [shard.rank, *shard.sizes], shard.group_name))


@pytest.mark.usefixtures("alone")
def test_bad_input() -> None:
    hidden, weight, targets = torch.randn(3, 4), torch.randn(5, 4), torch.tensor([0, 6, 11])
    shard = VocabularyShard((5, 7), rank=0, group_name="0")
    advantages, options = torch.ones(3), {"surrogate": ranks.Clip(), "aggregate": ranks.TokenMean()}
    options["cu_seqlens"] = torch.tensor([0, 3])

    def both(weight: Tensor, targets: Tensor, **more: Any) -> Iterator[Callable[[], object]]:
        given = (hidden, weight, targets)
        yield lambda: linear_token_logprobs(*given, **more)
        yield lambda: linear_policy_loss(*given, advantages, **options, **more)

    for change, error, message in [
        ({"weight": weight[:4]}, ValueError, "must be the slice of rank 0, with 5 of the 12 rows"),
        ({"targets": targets + 1}, ValueError, r"targets must lie in \[0, V\) = \[0, 12\)"),
        ({"targets": targets - 1}, ValueError, r"targets must lie in \[0, V\) = \[0, 12\)"),
        ({"bias": torch.zeros(12)}, ValueError, r"bias must have shape \[V\] = \[5\]"),
        ({"shard": dist.group.WORLD}, TypeError, "shard must be a VocabularyShard, such as"),
        ({}, ValueError, "shard must be of rank 0 of the 1 of its group, got VocabularyShard"),
        ({"shard": None}, ValueError, r"targets must lie in \[0, V\) = \[0, 5\)"),
    ]:
        given = {"weight": weight, "targets": targets, "shard": shard, **change}
        for call in both(**given):
            with pytest.raises(error, match=message):
                call()
    with pytest.raises(ValueError, match=r"weight must have shape \[size, H\]"):
        VocabularyShard.of(weight[0])
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor"):
        VocabularyShard.of(5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group must be a process group of this rank"):
        VocabularyShard.of(weight, dist.GroupMember.NON_GROUP_MEMBER)  # type: ignore[arg-type]
    for sizes, rank, error, message in [
        ((5, -1), 0, ValueError, "sizes must be >= 0, got -1"),
        ((5, 1.0), 0, TypeError, "sizes must be an int"),
        ((0, 0), 0, ValueError, "sizes must sum to V >= 1"),
        ((), 0, ValueError, "sizes must sum to V >= 1"),
        ((5, 7), 2, ValueError, "rank must be < 2"),
        ((5, 7), -1, ValueError, "rank must be >= 0"),
    ]:
        with pytest.raises(error, match=message):
            VocabularyShard(sizes, rank, "0")


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


@pytest.mark.usefixtures("alone")
def test_a_sharded_head_is_refused_in_words_trl_6858() -> None:
    weight = distribute_tensor(torch.randn(5, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    targets = torch.tensor([0, 4])
    with pytest.raises(TypeError, match=r"weight must be a plain tensor.*full_tensor\(\).*shard="):
        linear_token_logprobs(torch.randn(2, 4), weight, targets)
    # what is left of a parameter that ZeRO-3 took away
    with pytest.raises(ValueError, match=r"weight must have shape \[V, H\]"):
        linear_token_logprobs(torch.randn(2, 4), torch.empty(0), targets)
