"""The two layouts: one view, one answer."""

import pytest
import torch

from igrpo_kernels.sequences import Sequences
from igrpo_kernels.surrogates import Tokens

MASK = torch.tensor([[1, 1, 0], [0, 0, 0], [1, 1, 1]])
VALUES = torch.tensor([[1.0, 2.0, float("nan")], [float("inf")] * 3, [4.0, 5.0, 6.0]])
PADDED = Sequences.of(VALUES, MASK)
PACKED = Sequences.of(VALUES[MASK.bool()], cu_seqlens=torch.tensor([0, 2, 2, 5]))


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_sums_means_and_lengths_by_hand(layout):
    sequences, values = {
        "padded": (PADDED, VALUES),
        "packed": (PACKED, VALUES[MASK.bool()]),
    }[layout]
    assert sequences.count == 3
    assert sequences.lengths.tolist() == [2, 0, 3]
    assert sequences.sum(values).tolist() == [3.0, 0.0, 15.0]
    assert sequences.mean(values).tolist() == [1.5, 0.0, 5.0]


def aligned(sequences, values):
    return sequences.select_aligned(sequences.align("x", values))


def test_spread_gives_each_token_the_value_of_its_sequence():
    per_sequence = torch.tensor([7.0, 8.0, 9.0])
    assert PADDED.spread(per_sequence).tolist() == [[7.0], [8.0], [9.0]]
    assert PACKED.spread(per_sequence).tolist() == [7.0, 7.0, 9.0, 9.0, 9.0]
    per_sequence[1] = float("nan")  # of a sequence without a counted token
    assert aligned(PADDED, per_sequence).tolist() == [[7.0], [0.0], [9.0]]
    assert aligned(PACKED, per_sequence[:, None]).tolist() == [7, 7, 9, 9, 9]
    assert aligned(PADDED, VALUES).tolist() == [[1, 2, 0], [0, 0, 0], [4, 5, 6]]


def test_one_token_per_sequence_is_told_from_one_value_per_sequence():
    square = Sequences.of(torch.zeros(2, 2))
    assert aligned(square, torch.tensor([1.0, 2.0])).tolist() == [[1.0], [2.0]]
    column = Sequences.of(torch.zeros(2, 1))
    assert aligned(column, torch.tensor([1.0, 2.0])).tolist() == [[1.0], [2.0]]


def test_packed_values_as_many_as_sequences_belong_to_these():
    """L = B with an empty sequence: one advantage per sequence is what losses are given."""
    sequences = Sequences.of(torch.zeros(2), cu_seqlens=torch.tensor([0, 2, 2]))
    assert aligned(sequences, torch.tensor([1.0, -5.0])).tolist() == [1.0, 1.0]


def test_tokens_hold_a_ratio_that_stays_finite():
    logprobs, old = torch.tensor([[0.0, -1.0]]), torch.tensor([[-500.0, -1.0]])
    tokens = Tokens(logprobs, old, torch.ones(1, 2), Sequences.of(logprobs))
    assert tokens.log_ratio.tolist() == [[500.0, 0.0]]
    assert tokens.ratio.isfinite().all()
    assert tokens.ratio[0, 1].item() == 1.0


@pytest.mark.parametrize("offsets", [[0, 3, 2, 5], [1, 2, 5], [0, 6], [0]])
def test_offsets_that_do_not_rise_to_the_length_are_refused(offsets):
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to L = 5, got \["):
        Sequences.of(torch.zeros(5), cu_seqlens=torch.tensor(offsets))
