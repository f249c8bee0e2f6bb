"""A vocabulary cut over ranks: the same numbers as the whole one, the same bits on every rank."""

import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import igrpo_kernels.cpu_head_softmax as cpu_head_softmax
import igrpo_kernels.row_checks as row_checks
from igrpo_kernels import VocabularyShard, linear_policy_loss, linear_token_logprobs
from igrpo_kernels.head_softmax import is_one_chunk
from igrpo_kernels.linear_head import HeadGradients, LinearHead
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


@pytest.mark.usefixtures("alone")
def test_a_sharded_head_is_refused_in_words_trl_6858() -> None:
    weight = distribute_tensor(torch.randn(5, 4), init_device_mesh("cpu", (1,)), [Shard(0)])
    targets = torch.tensor([0, 4])
    with pytest.raises(TypeError, match=r"weight must be a plain tensor.*full_tensor\(\).*shard="):
        linear_token_logprobs(torch.randn(2, 4), weight, targets)
    # what is left of a parameter that ZeRO-3 took away
    with pytest.raises(ValueError, match=r"weight must have shape \[V, H\]"):
        linear_token_logprobs(torch.randn(2, 4), torch.empty(0), targets)
