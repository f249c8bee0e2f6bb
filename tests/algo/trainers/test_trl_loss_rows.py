"""A micro-batch as values: two stages in one, rows chosen, weights given."""

from typing import Any

import torch
from tiny_qwen import third_party

from igrpo_algo.trainers.given_weights import GivenWeights
from igrpo_algo.trainers.trl.loss_rows import LossRows, join_stages
from igrpo_kernels import SequenceMean
from igrpo_kernels.sequences import Sequences

pytestmark = third_party


def stage(rows: int, prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    numbers = torch.arange(1, rows * (prompt + completion) + 1).view(rows, -1)
    return {
        "prompt_ids": numbers[:, :prompt],
        "prompt_mask": torch.ones(rows, prompt, dtype=torch.long),
        "completion_ids": numbers[:, prompt:],
        "completion_mask": torch.ones(rows, completion, dtype=torch.long),
        "advantages": torch.arange(rows) / 2,
        "num_items_in_batch": torch.tensor(rows * completion),
        **more,
    }


def test_joined_stages_keep_every_row_and_pad_outwards() -> None:
    refinements = stage(2, 4, 2, old_per_token_logps=torch.full((2, 2), -1.0))
    drafts = stage(3, 2, 3, old_per_token_logps=torch.full((3, 3), -2.0))
    joined = join_stages([refinements], drafts, pad_token_id=99)
    assert joined["prompt_ids"][:2].equal(refinements["prompt_ids"])
    assert joined["prompt_ids"][2].tolist() == [99, 99, 1, 2]
    assert joined["prompt_mask"][2].tolist() == [0, 0, 1, 1]
    assert joined["completion_ids"][0].tolist() == [5, 6, 99]
    assert joined["completion_mask"][0].tolist() == [1, 1, 0]
    assert joined["completion_ids"][2:].equal(drafts["completion_ids"])
    assert joined["old_per_token_logps"][1].tolist() == [-1.0, -1.0, 0.0]
    assert joined["old_per_token_logps"][4].tolist() == [-2.0, -2.0, -2.0]
    assert joined["advantages"].tolist() == [0.0, 0.5, 0.0, 0.5, 1.0]
    assert joined["is_draft"].tolist() == [False, False, True, True, True]
    assert (int(joined["num_items_in_batch"]), int(joined["num_draft_items_in_batch"])) == (4, 9)


def test_joined_stages_keep_a_ratio_per_sequence() -> None:
    refinements = stage(2, 2, 2, importance_sampling_ratio=torch.tensor([[1.0], [2.0]]))
    drafts = stage(1, 2, 4, importance_sampling_ratio=torch.tensor([[3.0]]))
    joined = join_stages([refinements], drafts, pad_token_id=0)
    assert joined["importance_sampling_ratio"].tolist() == [[1.0], [2.0], [3.0]]


def test_rounds_are_joined_and_their_tokens_added_up() -> None:
    joined = join_stages([stage(2, 2, 2), stage(2, 3, 4)], None, pad_token_id=9)
    assert joined["prompt_ids"].tolist() == [[9, 1, 2], [9, 5, 6], [1, 2, 3], [8, 9, 10]]
    assert int(joined["num_items_in_batch"]) == 2 * 2 + 2 * 4
    assert "is_draft" not in joined


def test_rows_are_taken_with_all_that_belongs_to_them() -> None:
    inputs = stage(3, 2, 2, ref_per_token_logps=torch.arange(6.0).view(3, 2))
    inputs["advantages"] = torch.tensor([0.0, 2.0, -1.0])
    rows = LossRows.of(inputs, torch.tensor(0.5))
    taught = rows.that_teach()
    assert taught.advantages.tolist() == [2.0, -1.0]
    assert taught.ref_logprobs is not None
    assert taught.ref_logprobs.tolist() == [[2.0, 3.0], [4.0, 5.0]]
    assert taught.input_ids.equal(rows.input_ids[1:])
    assert taught.weights.tolist() == [[0.5, 0.5]] * 2
    assert taught.old_logprobs is None
    assert taught.sequences.count == 2


def test_one_row_is_left_where_none_teaches() -> None:
    inputs = stage(3, 2, 2) | {"advantages": torch.zeros(3)}
    assert len(LossRows.of(inputs, torch.tensor(1.0)).that_teach().mask) == 1


def test_weights_of_some_rows_are_those_of_the_whole_batch() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    whole = SequenceMean().weights(Sequences.of(mask, mask), torch.float32).expand(3, 3)
    part = GivenWeights(whole[1:]).weights(Sequences.of(mask[1:], mask[1:]), torch.float64)
    assert part.dtype == torch.float64
    assert part[0].tolist() == [float(torch.tensor(1 / 3))] * 3
