"""FlexAttention's mask of a row against a dense one, and what it attends to against the rest."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from igrpo_algo.shared_prompt import attention as shared_attention
from igrpo_algo.shared_prompt import flex as shared_flex
from igrpo_algo.shared_prompt.attention import attend_shared_prompt
from igrpo_algo.shared_prompt.flex import BLOCK, attend_flex, block_mask, padded_size, suits_flex

CPU = torch.device("cpu")
sizes = st.tuples(st.integers(1, 300), st.lists(st.integers(0, 200), min_size=1, max_size=5))
rows = st.lists(sizes.map(lambda group: (group[0], *group[1])), min_size=1, max_size=4).map(tuple)
windows = st.one_of(st.none(), st.integers(1, 200))


def size_of(lengths) -> int:
    return sum(map(sum, lengths))


def dense(lengths, room: int, window: int | None) -> Tensor:
    """What each place sees, sequence by sequence. Shape [room, room]."""
    seen = torch.eye(room, dtype=torch.bool)
    start = 0
    for prompt, *tails in lengths:
        shared = list(range(start, start + prompt))
        start += prompt
        for tail in (0, *tails):
            places = torch.tensor(shared + list(range(start, start + tail)))
            at = torch.arange(len(places))
            distance = at[:, None] - at
            sees = (distance >= 0) & (distance < (window or room))
            seen[places[:, None], places] = sees
            start += tail
    return seen


@given(lengths=rows, window=windows)
def test_a_token_sees_what_its_own_sequence_holds_before_it(lengths, window) -> None:
    room = padded_size(size_of(lengths))
    sees = block_mask(lengths, room, window, CPU).mask_mod
    found = create_mask(sees, None, None, room, room, device="cpu")[0, 0]
    assert torch.equal(found, dense(lengths, room, window))


@given(lengths=rows, window=windows)
def test_blocks_are_those_of_the_dense_mask(lengths, window) -> None:
    room = padded_size(size_of(lengths))
    found = block_mask(lengths, room, window, CPU)
    exact = create_block_mask(found.mask_mod, None, None, room, room, "cpu", BLOCK_SIZE=BLOCK)
    assert torch.equal(found.to_dense(), exact.to_dense())
    assert found.full_kv_num_blocks.sum() + found.kv_num_blocks.sum() == exact.to_dense().sum()
    tiles = dense(lengths, room, window).unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK))
    full = tiles.all(3).all(1)
    for row, count in enumerate(found.full_kv_num_blocks[0, 0].tolist()):
        assert full[row, found.full_kv_indices[0, 0, row, :count].long()].all()


def test_whole_blocks_need_no_mask() -> None:
    lengths = ((3 * BLOCK, 2 * BLOCK),)
    found = block_mask(lengths, 6 * BLOCK, None, CPU)  # one block of padding
    assert found.full_kv_num_blocks[0, 0].tolist() == [0, 1, 2, 3, 4, 0]
    assert found.kv_num_blocks[0, 0].tolist() == [1] * 6


def test_a_row_of_many_groups_skips_almost_all_blocks() -> None:
    lengths = ((64, *[64] * 4),) * 64
    found = block_mask(lengths, padded_size(size_of(lengths)), None, CPU)
    assert found.sparsity() > 97  # per cent; each group is 2.5 of 160 blocks long


def states_of(size: int, heads: int, key_heads: int, width: int = 16) -> list[Tensor]:
    return [torch.randn(1, count, size, width) for count in (heads, key_heads, key_heads)]


def compilations() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # inductor's own
def test_one_compilation_serves_every_row_of_a_size_and_gives_what_the_split_gives() -> None:
    torch.compiler.reset()
    shared_flex._compiled.cache_clear()
    before = compilations()
    for lengths in ([(70, 50, 33, 0, 1), (5, 64)], [(140,)], [(7, *[40] * 9)]):
        for window in (None, 1, 40):
            states = states_of(size_of(lengths), 4, 2)
            with torch.no_grad():  # FlexAttention has no backward on a CPU
                found = attend_flex(*states, lengths, scale=0.7, window=window)
                wanted = attend_shared_prompt(*states, lengths, scale=0.7, window=window)
            # fp32 sums of up to 200 terms in another order
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert compilations() - before == 1


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_flex, "_compiled", lambda: shared_flex._flex)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 9])
def test_states_that_suit_take_the_one_kernel(
    window: int | None, heads: int, key_heads: int, uncompiled: None, monkeypatch
) -> None:
    lengths = [(30, 50, 0, 1), (5, 64)]
    states = states_of(size_of(lengths), heads, key_heads)
    wanted = attend_shared_prompt(*states, lengths, window=window)
    monkeypatch.setattr(shared_attention, "suits_flex", lambda *_: True)
    monkeypatch.setattr(shared_attention, "_attend", None)
    found = attend_shared_prompt(*states, lengths, window=window)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_suits() -> None:
    def suits(device="cuda", dtype=torch.bfloat16, width=64, values=64, dropout=0.0) -> bool:
        shape = (1, 4, 9)
        query = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(*shape, width))
        return suits_flex(query, SimpleNamespace(shape=(*shape, values)), dropout)

    assert suits()
    assert suits(dtype=torch.float32)
    assert suits(width=16, values=16)
    assert not suits(device="cpu")
    assert not suits(dtype=torch.float64)
    assert not suits(width=8)
    assert not suits(values=8)
    assert not suits(dropout=0.1)


@given(size=st.integers(1, 2**20))
def test_sizes_are_padded_by_half_at_most(size: int) -> None:
    room = padded_size(size)
    assert room % BLOCK == 0
    assert size <= room < max(3 * BLOCK + 1, 1.5 * size)


def test_few_sizes_are_compiled() -> None:
    assert len({padded_size(size) for size in range(1, 2**17, 64)}) <= 18


def test_layers_share_one_mask_and_one_made_for_scoring_serves_training() -> None:
    lengths = ((11, 5, 7),)
    with torch.inference_mode():
        made = block_mask(lengths, BLOCK, 3, CPU)
    assert block_mask(lengths, BLOCK, 3, CPU) is made
    assert not made.kv_indices.is_inference()
    assert not any(cell.cell_contents.is_inference() for cell in made.mask_mod.__closure__)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
def test_cuda_gives_the_gradients_of_the_split(window: int | None) -> None:
    lengths = [(70, 50, 33, 0, 1), (5, 64)]
    states = [s.cuda().requires_grad_() for s in states_of(size_of(lengths), 4, 2, 64)]
    assert suits_flex(states[0], states[2], 0.0)
    results = []
    for attend in (attend_shared_prompt, attend_flex):
        device = "cpu" if attend is attend_shared_prompt else "cuda"
        moved = [state.to(device) for state in states]
        found = attend(*moved, lengths, window=window)
        upstream = torch.linspace(-1, 1, found.numel(), device=device).view_as(found)
        results.append([found.cpu(), *torch.autograd.grad(found, states, upstream)])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
