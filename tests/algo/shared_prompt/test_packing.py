"""Rows in which a prompt stands once: the layout, and what a loss makes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igrpo_algo import Completion
from igrpo_algo.shared_prompt.packing import SharedPromptRow, pack_shared_prompt
from igrpo_kernels import Clip, SequenceMean, linear_policy_loss, token_logprobs
from igrpo_kernels.loss_from_logprobs import policy_loss

PROMPTS = [[5, 6], [4]]
COMPLETIONS = [[[7, 8], [], [9]], [[3]]]

ids = st.lists(st.integers(0, 99), max_size=6)
groups = st.tuples(ids.filter(len), st.lists(ids, min_size=1, max_size=5))
batches = st.lists(groups, min_size=1, max_size=5)


def test_a_row_worked_by_hand() -> None:
    (row,) = pack_shared_prompt(PROMPTS, COMPLETIONS)
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 3]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 2, 0, 1]]
    assert row.lengths == ((2, 2, 0, 1), (1, 1))
    assert row.index.tolist() == [0, 1, 2, 3]
    assert row.cu_seqlens.tolist() == [0, 2, 2, 3, 4]
    assert row.targets.tolist() == [7, 8, 9, 3]
    assert row.predictors.tolist() == [1, 2, 1, 5]


def sequences(row: SharedPromptRow) -> dict[int, tuple[list[int], list[int]]]:
    """Read (prompt, completion) of each index back, by following positions and predictors."""
    found = {}
    numbers = iter(range(len(row.index)))
    start = 0
    for prompt, *tails in row.lengths:
        body = row.input_ids[0, start : start + prompt].tolist()
        assert row.position_ids[0, start : start + prompt].tolist() == list(range(prompt))
        last = start + prompt - 1
        start += prompt
        for tail in tails:
            number = next(numbers)
            own = list(range(start, start + tail))
            span = slice(*row.cu_seqlens[number : number + 2].tolist())
            assert row.position_ids[0, own].tolist() == list(range(prompt, prompt + tail))
            assert row.predictors[span].tolist() == [last, *own][:tail]
            assert row.targets[span].tolist() == row.input_ids[0, own].tolist()
            found[int(row.index[number])] = (body, row.targets[span].tolist())
            start += tail
    assert start == row.input_ids.shape[1]
    return found


@given(batch=batches, slack=st.one_of(st.none(), st.integers(0, 20)))
def test_every_completion_stands_once_after_its_prompt(batch, slack) -> None:
    prompts, completions = [list(part) for part in zip(*batch, strict=True)]
    need = max(len(p) + len(tail) for p, tails in batch for tail in tails)
    limit = None if slack is None else need + slack
    rows = pack_shared_prompt(prompts, completions, max_tokens=limit)
    found = [item for row in rows for item in sequences(row).items()]
    wanted = [(p, tail) for p, tails in batch for tail in tails]
    assert found == list(enumerate(wanted))
    if limit is None:
        assert len(rows) == 1
    else:
        assert all(row.input_ids.shape[1] <= limit for row in rows)
    whole = [len(p) + sum(map(len, tails)) for p, tails in batch]
    laid = sum(len(row.lengths) for row in rows)
    assert (laid > len(batch)) == (limit is not None and max(whole) > limit)


def test_groups_stay_whole_where_a_row_can_hold_them() -> None:
    rows = pack_shared_prompt(
        [[1, 1], [2], [3]], [[[5], [6]], [[5], [6]], [[4], [4], [4]]], max_tokens=7
    )
    assert [row.lengths for row in rows] == [((2, 1, 1), (1, 1, 1)), ((1, 1, 1, 1),)]
    rows = pack_shared_prompt([[1, 1], [2]], [[[5] * 3, [6] * 2, [7] * 2], [[8]]], max_tokens=6)
    assert [row.lengths for row in rows] == [((2, 3),), ((2, 2, 2),), ((1, 1),)]
    assert [row.index.tolist() for row in rows] == [[0], [1, 2], [3]]


def test_completions_and_tensors_are_ids_too() -> None:
    (row,) = pack_shared_prompt([torch.tensor([5, 6])], [[Completion([7], "x"), torch.tensor([8])]])
    assert row.input_ids.tolist() == [[5, 6, 7, 8]]


def test_moving_takes_every_tensor_along() -> None:
    (row,) = pack_shared_prompt(PROMPTS, COMPLETIONS)
    moved = row.to("meta")
    tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
    assert [tensor.device.type for tensor in tensors] == ["meta"] * 6
    assert moved.lengths == row.lengths
    assert moved.model_inputs()["attention_mask"].device.type == "meta"


def test_the_loss_is_that_of_sequences_and_their_gradients_add_up() -> None:
    (row,) = pack_shared_prompt(PROMPTS, COMPLETIONS)
    hidden = torch.randn(1, 7, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(10, 3, dtype=torch.float64)
    advantages = torch.tensor([1.0, 5.0, -2.0, 0.5], dtype=torch.float64)
    terms = {"surrogate": Clip(), "aggregate": SequenceMean()}

    # two prompts' sequences, position by position, as padded rows of [completion, token]
    places = torch.tensor([[1, 2], [0, 0], [1, 0], [5, 0]])
    targets = torch.tensor([[7, 8], [0, 0], [9, 0], [3, 0]])
    mask = torch.tensor([[1, 1], [0, 0], [1, 0], [1, 0]])
    logprobs = token_logprobs(hidden[0, places] @ weight.t(), targets)
    wanted = policy_loss(logprobs, advantages, mask, **terms).loss
    wanted.backward()
    exact, hidden.grad = hidden.grad, None

    loss = linear_policy_loss(
        **row.loss_inputs(hidden),
        weight=weight,
        advantages=advantages,
        **terms,
    ).loss
    loss.backward()
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(hidden.grad, exact, rtol=1e-12, atol=1e-14)
    rows_of_one_axis = row.loss_inputs(hidden[0])["hidden"]
    torch.testing.assert_close(rows_of_one_axis, hidden[0, row.predictors], rtol=0, atol=0)


def test_a_prompt_whose_completions_are_all_empty_has_a_loss_of_zero() -> None:
    (row,) = pack_shared_prompt([[5, 6]], [[[], []]])
    hidden = torch.randn(1, 2, 3, requires_grad=True)
    loss = linear_policy_loss(
        **row.loss_inputs(hidden),
        weight=torch.randn(10, 3),
        advantages=torch.tensor([1.0, -1.0]),
        surrogate=Clip(),
        aggregate=SequenceMean(),
    ).loss
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((None, [[[1]]]), TypeError, "prompt_ids must be a list, got None"),
        ((torch.ones(1, 2), [[[1]]]), TypeError, r"prompt_ids must be a list, got a float32"),
        (([[1]], 3), TypeError, "completions must be a list, got int 3"),
        (([[]], [[[1]]]), ValueError, r"prompt_ids\[0\] must have at least one token"),
        (([], []), ValueError, "prompt_ids must hold at least one prompt"),
        (([[1]], []), ValueError, "one list per prompt = 1, got 0"),
        (([[1]], [[]]), ValueError, r"completions\[0\] must hold at least one completion"),
        (([[1]], ["text"]), TypeError, r"completions\[0\] must be a list"),
        (([1, 2], [[3], [4]]), TypeError, r"prompt_ids\[0\] must be token ids .* got int 1"),
        ((["text"], [[[1]]]), TypeError, r"prompt_ids\[0\] must be token ids"),
        (([[1]], [[[1.0]]]), TypeError, r"completions\[0\]\[0\] must be token ids"),
        (([torch.ones(1)], [[[1]]]), TypeError, r"prompt_ids\[0\] must be an integer tensor"),
        (([torch.ones(1, 1).long()], [[[1]]]), ValueError, r"must have shape \[T\]"),
    ],
)
def test_bad_input_is_named(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        pack_shared_prompt(*arguments)


def test_a_budget_that_cannot_hold_a_sequence_is_named() -> None:
    with pytest.raises(ValueError, match=r"completions\[0\]\[1\] = 2 \+ 3 tokens, got 4"):
        pack_shared_prompt([[1, 2]], [[[3], [3, 4, 5]]], max_tokens=4)
    with pytest.raises(ValueError, match="max_tokens must be >= 1"):
        pack_shared_prompt([[1]], [[[2]]], max_tokens=0)


def test_hidden_states_of_the_wrong_size_are_named() -> None:
    (row,) = pack_shared_prompt(PROMPTS, COMPLETIONS)
    with pytest.raises(ValueError, match=r"with S = 7, got \[2, 7, 3\]"):
        row.loss_inputs(torch.ones(2, 7, 3))
