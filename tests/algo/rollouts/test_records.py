"""Rollouts: tensors of both stages, joining and indexing."""

import pytest
import torch
from made_rollouts import ALL, CHAT, DROPPED, FIRST, NAN, SKIPPED, completion

from igrpo_algo.advantages.of_groups import standardize_by_group
from igrpo_algo.rollouts.records import DraftChoice, Rollout, Rollouts, Stage


def same(actual, expected, dtype):
    torch.testing.assert_close(
        actual, torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True
    )


def test_rewards_and_lengths_are_prompt_major():
    same(ALL.draft_rewards, [[0.0, 1.0], [NAN, NAN], [0.25, 0.0]], torch.float32)
    same(ALL.refinement_rewards, [[1.0, NAN], [NAN, NAN], [0.5, -1.0]], torch.float32)
    same(ALL.draft_lengths, [[2, 1], [0, 0], [1, 1]], torch.int64)
    same(ALL.refinement_lengths, [[1, 3], [0, 0], [1, 1]], torch.int64)


def test_what_was_chosen_and_why():
    same(ALL.chosen, [1, -1, 0], torch.int64)
    same(ALL.found, [True, False, True], torch.bool)
    same(ALL.failed, [False, True, True], torch.bool)
    same(ALL.dropped, [False, False, True], torch.bool)
    same(ALL.skipped, [False, True, False], torch.bool)
    same(ALL.conditioned, [True, False, False], torch.bool)
    same(ALL.tokens_cut, [4, 0, 0], torch.int64)
    same(ALL.cancelled, [0, 1, 0], torch.int64)
    same(ALL.times[0], [[0.0, 2.0], [2.0, 3.5]], torch.float64)
    assert ALL.times.shape == (3, 2, 2)


def test_completions_of_both_stages_and_their_tensors():
    assert ALL.prompts == ["q", CHAT, [7, 8]]
    assert ALL.drafts.prompts == ["q", CHAT, [7, 8]]
    assert ALL.refinements.prompts == ["q (3,)", CHAT, [7, 8]]
    assert ALL.refinements.owner.tolist() == [0, 0, 1, 1, 2, 2]
    ids = [[4, 0, 0], [5, 6, 7], [0, 0, 0], [0, 0, 0], [9, 0, 0], [9, 0, 0]]
    assert ALL.refinements.padded().ids.tolist() == ids
    assert ALL.refinements.packed().cu_seqlens.tolist() == [0, 1, 4, 4, 4, 5, 6]
    torch.testing.assert_close(
        ALL.refinements.packed().logprobs,
        torch.tensor([-0.4, -0.5, -0.6, -0.7, -0.9, -0.9]),
        rtol=0,
        atol=1e-7,  # float32 of the same decimals
    )
    assert ALL.drafts.packed().ids.tolist() == [1, 2, 3, 1, 2]
    assert ALL.drafts.packed().logprobs is None


def test_an_empty_rollout():
    empty = Rollouts([])
    assert len(empty) == 0
    assert empty.draft_rewards.shape == empty.refinement_lengths.shape == (0, 0)
    assert empty.chosen.shape == (0,)
    assert empty.times.shape == (0, 0, 2)
    assert empty.refinements.padded().ids.shape == (0, 0)
    assert empty.until_round(1) == empty


@pytest.mark.parametrize("groups", [[SKIPPED], [SKIPPED, FIRST], [FIRST, SKIPPED, DROPPED]])
def test_skipped_prompts_keep_their_rows(groups):
    rollouts = Rollouts(groups)
    rewards, batch = rollouts.refinement_rewards, rollouts.refinements.padded()
    assert rewards.shape == (len(groups), 2)
    advantages = standardize_by_group(rewards).flatten()
    assert len(batch.mask) == len(batch.logprobs) == len(advantages)
    assert batch.mask.any(dim=1).tolist() == (~rollouts.skipped).repeat_interleave(2).tolist()
    assert advantages[rollouts.skipped.repeat_interleave(2)].tolist() == [0.0, 0.0]


def test_join_index_iterate():
    assert Rollouts.of(iter([DROPPED, FIRST, SKIPPED])) == ALL
    assert ALL[-1] == DROPPED
    assert ALL[::2] == Rollouts([FIRST, DROPPED])
    assert Rollouts.concat([ALL[:1], ALL[1:]]) == ALL
    assert list(ALL) == ALL.rollouts
    assert len(ALL) == 3


def test_earlier_rounds():
    late = Stage("q again", [completion(8)] * 2, [0.0, 0.0])
    group = Rollout(
        0, FIRST.drafts, [*FIRST.choices, DraftChoice(2, 1.0, "(4,)")], [*FIRST.refinements, late]
    )
    rollouts = Rollouts([group])
    assert rollouts.chosen.tolist() == [2]
    assert rollouts.refinements.prompts == ["q again"]
    assert rollouts.until_round(2) == rollouts
    assert rollouts.until_round(1) == Rollouts([FIRST])
    with pytest.raises(ValueError, match="number must be a round from 1 to 2, got 3"):
        rollouts.until_round(3)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"drafts": Stage("q", [completion(1)], [0.0])}, r"equally many drafts, got \[1, 2\]"),
        ({"refinements": [], "choices": []}, r"equally many rounds, got \[0, 1\]"),
        (
            {"refinements": [Stage("q", [completion(1)], [0.0])]},
            r"equally many refinements, got \[1, 2\]",
        ),
    ],
)
def test_groups_of_other_sizes(change, match):
    with pytest.raises(ValueError, match=match):
        Rollouts([DROPPED, Rollout(**{**vars(FIRST), **change})])


def test_a_broken_file_among_several_ends_their_joining(tmp_path):
    """`map` would take a StopIteration from the loader for the end of the files."""
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        ALL.save(path)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(ValueError, match=str(paths[1])):
        Rollouts.concat(map(Rollouts.load, paths))


@pytest.mark.parametrize(
    ("rollouts", "message"),
    [
        (None, "rollouts must be a list"),
        ([FIRST, "b"], r"rollouts\[1\] must be a Rollout, got str"),
    ],
)
def test_what_is_no_rollout_is_named(rollouts, message):
    with pytest.raises(TypeError, match=message):
        Rollouts(rollouts)
