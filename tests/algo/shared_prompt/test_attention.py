"""Attention over a row against the softmax of each sequence by itself, in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from igrpo_algo.shared_prompt.attention import attend_shared_prompt

WIDTH = 4
sizes = st.tuples(st.integers(1, 7), st.lists(st.integers(0, 7), min_size=1, max_size=5))
rows = st.lists(sizes.map(lambda group: (group[0], *group[1])), min_size=1, max_size=3)


def states_of(lengths, heads=4, key_heads=2, value_width=WIDTH) -> list[Tensor]:
    size = sum(map(sum, lengths))
    shapes = [(1, count, size, WIDTH) for count in (heads, key_heads)]
    shapes.append((1, key_heads, size, value_width))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


def plain(
    query: Tensor, key: Tensor, value: Tensor, lengths, scale: float, window: int | None
) -> Tensor:
    """Take the tokens of each [prompt, completion] out, and attend to them with a dense softmax."""
    result = value.new_empty(*query.shape[:3], value.shape[3])
    start = 0
    for prompt, *tails in lengths:
        shared = list(range(start, start + prompt))
        start += prompt
        for tail in (0, *tails):
            places = shared + list(range(start, start + tail))
            q, k, v = (
                states[0, :, places].repeat_interleave(query.shape[1] // states.shape[1], 0)
                for states in (query, key, value)
            )
            at = torch.arange(len(places))
            hidden = at[None] > at[:, None]
            if window is not None:
                hidden |= at[None] <= at[:, None] - window
            scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
            fresh = slice(prompt, None) if tail else slice(None)
            result[0, :, places[fresh]] = (scores.softmax(-1) @ v)[:, fresh]
            start += tail
    return result.transpose(1, 2)


def check(lengths, window: int | None, *sizes: int) -> None:
    states = states_of(lengths, *sizes)
    wanted = plain(*states, lengths, 0.7, window)
    actual = attend_shared_prompt(*states, lengths, scale=0.7, window=window)
    upstream = torch.randn_like(wanted)
    exact = torch.autograd.grad(wanted, states, upstream)
    found = torch.autograd.grad(actual, states, upstream)
    for ours, theirs in zip([actual, *found], [wanted, *exact], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@given(lengths=rows, window=st.one_of(st.none(), st.integers(1, 16)), seed=st.integers(0, 99))
def test_equals_each_sequence_by_itself(lengths, window, seed) -> None:
    torch.manual_seed(seed)
    check(lengths, window)


@pytest.mark.parametrize("window", [None, 1, 4, 5, 6, 20])
@pytest.mark.parametrize(("heads", "key_heads"), [(2, 2), (4, 1)])
def test_windows_and_grouped_heads(window: int | None, heads: int, key_heads: int) -> None:
    check([(5, 7, 1, 0, 8, 6), (1, 1), (6, 0)], window, heads, key_heads)


def test_values_may_be_narrower_than_keys() -> None:
    check([(3, 2, 0, 2)], None, 2, 2, WIDTH - 1)


def test_gradients_are_finite_differences() -> None:
    states = states_of([(3, 2, 1)], 2, 1)
    assert torch.autograd.gradcheck(lambda *x: attend_shared_prompt(*x, [(3, 2, 1)]), states)


def test_the_scale_defaults_to_that_of_the_width() -> None:
    states = states_of([(2, 3)])
    actual = attend_shared_prompt(*states, [(2, 3)])
    torch.testing.assert_close(actual, plain(*states, [(2, 3)], WIDTH**-0.5, None))


def test_dropout_drops_weights_of_prompt_and_completions() -> None:
    states = states_of([(40, 40, 40)])
    states[2] = torch.ones_like(states[2])  # so that each output is the sum of its weights
    sums = attend_shared_prompt(*states, [(40, 40, 40)], dropout=0.5)[0, ..., 0]
    for part in sums.split(40):
        assert (part - 1).abs().mean() > 0.05  # without dropout each sum is 1
        assert part.mean().item() == pytest.approx(1.0, abs=0.2)  # what stays is scaled up


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an op returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return result


@pytest.mark.parametrize("window", [None, 30])
def test_nothing_of_the_size_of_the_row_squared_exists(window: int | None) -> None:
    lengths = [(20, *[40] * 16)]
    states = [state.float() for state in states_of(lengths, 1, 1)]
    with Sizes() as sizes:
        attend_shared_prompt(*states, lengths, window=window).sum().backward()
    states_after_prompt = 16 * (20 + 40) * WIDTH
    assert sizes.largest == states_after_prompt
    assert sizes.largest < 660**2 / 100


def test_completions_of_unlike_length_are_not_padded_to_the_longest() -> None:
    lengths = [(4, 100, *[10] * 20, 90)]
    states = states_of(lengths, 8, 8)
    with Sizes() as sizes:
        attend_shared_prompt(*states, lengths)
    assert sizes.largest == 394 * 8 * WIDTH  # the row itself; 22 times 104 keys would be 73,216


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
def test_cuda_gives_what_the_cpu_gives(window: int | None) -> None:
    lengths = [(70, 50, 33, 0, 1), (5, 64)]
    states = states_of(lengths, 4, 2, 64)
    states[:2] = [torch.randn(*state.shape[:3], 64).double() for state in states[:2]]
    wanted = plain(*states, lengths, 0.125, window)
    on_device = [state.detach().float().cuda() for state in states]
    actual = attend_shared_prompt(*on_device, lengths, scale=0.125, window=window)
    torch.testing.assert_close(actual.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
