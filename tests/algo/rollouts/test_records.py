"""Rollouts: tensors of both stages, joining and indexing, the file and the journal."""

import json
import math
import os
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from igrpo_algo.advantages.of_groups import standardize_by_group
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.journal import Header, Journal, load_journal, resume_journal
from igrpo_algo.rollouts.records import Choice, Group, Rollouts, Stage

NAN = math.nan
CHAT = [{"role": "user", "content": "große Frage\n"}]


def completion(*ids, reason="stop", known=True):
    return Completion(list(ids), str(ids), [-0.1 * i for i in ids] if known else None, reason)


FIRST = Group(
    index=0,
    drafts=Stage("q", [completion(1, 2), completion(3)], [0.0, 1.0], 0.0, 2.0),
    choices=[Choice(1, 1.0, "(3,)", tokens_cut=4)],
    refinements=[
        Stage("q (3,)", [completion(4), completion(5, 6, 7, reason="length")], [1.0, NAN], 2.0, 3.5)
    ],
)
SKIPPED = Group(
    index=1,
    drafts=Stage(CHAT, [completion(known=False), completion(reason="cancelled")], [NAN, NAN]),
    choices=[Choice(-1, NAN, failed=True, skipped=True)],
    refinements=[Stage(CHAT, [completion(reason="skipped")] * 2, [NAN, NAN], 1.0, 1.0)],
)
DROPPED = Group(
    index=2,
    drafts=Stage([7, 8], [completion(1), completion(2)], [0.25, 0.0]),
    choices=[Choice(0, 0.25, failed=True, dropped=True)],
    refinements=[Stage([7, 8], [completion(9), completion(9)], [0.5, -1.0])],
)
ALL = Rollouts([FIRST, SKIPPED, DROPPED])
HEADER = Header.of(["q", CHAT, [7, 8]], 2, 2, 1, seed=5)


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
    assert Rollouts.concat([ALL[:1], ALL[1:]]) == ALL
    assert Rollouts.of(iter([DROPPED, FIRST, SKIPPED])) == ALL
    assert ALL[-1] == DROPPED
    assert ALL[::2] == Rollouts([FIRST, DROPPED])
    assert list(ALL) == ALL.groups
    assert len(ALL) == 3


def test_earlier_rounds():
    late = Stage("q again", [completion(8)] * 2, [0.0, 0.0])
    group = Group(
        0, FIRST.drafts, [*FIRST.choices, Choice(2, 1.0, "(4,)")], [*FIRST.refinements, late]
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
        Rollouts([DROPPED, Group(**{**vars(FIRST), **change})])


def test_times_are_not_compared_but_kept(tmp_path):
    late = Group(**{**vars(FIRST), "drafts": Stage("q", *vars_of(FIRST.drafts), 8.0, 9.0)})
    assert late == FIRST
    Rollouts([late]).save(tmp_path / "r")
    assert Rollouts.load(tmp_path / "r").times[0, 0].tolist() == [8.0, 9.0]


def vars_of(stage):
    return stage.completions, stage.rewards


def test_file_holds_everything(tmp_path):
    ALL.save(tmp_path / "rollouts.safetensors")
    loaded = Rollouts.load(str(tmp_path / "rollouts.safetensors"))
    assert loaded == ALL
    assert loaded.groups[0].refinements[0].started == 2.0
    assert os.listdir(tmp_path) == ["rollouts.safetensors"]


def test_file_of_nothing(tmp_path):
    Rollouts([]).save(tmp_path / "r")
    assert Rollouts.load(tmp_path / "r") == Rollouts([])


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rollouts.safetensors"
    ALL.save(path)

    def full(handle):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        ALL[:1].save(path)
    assert Rollouts.load(path) == ALL
    assert os.listdir(tmp_path) == ["rollouts.safetensors"]


def test_other_files_are_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors holds no rollouts"):
        Rollouts.load(tmp_path / "weights.safetensors")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ValueError, match="torn is no safetensors file"):
        Rollouts.load(tmp_path / "torn")
    with pytest.raises(FileNotFoundError):
        Rollouts.load(tmp_path / "missing")


def test_what_json_cannot_say_is_refused(tmp_path):
    image = Stage([{"role": "user", "content": [object()]}], [], [])
    with pytest.raises(TypeError, match="JSON"):
        Rollouts([Group(0, image, [Choice(-1, NAN)], [image])]).save(tmp_path / "r")
    assert os.listdir(tmp_path) == []


def test_journal_keeps_each_group(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        journal.append(SKIPPED)
        assert load_journal(path) == [SKIPPED]
        journal.append(FIRST)
    with Journal(path, HEADER) as journal:
        journal.append(DROPPED)
    assert load_journal(path) == [SKIPPED, FIRST, DROPPED]
    strict = {"parse_constant": lambda name: pytest.fail(f"{name} is not JSON")}
    lines = path.read_text().splitlines()
    assert [json.loads(line, **strict)["index"] for line in lines[1:]] == [1, 0, 2]


def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path):
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        journal.append(FIRST)
        journal.append(DROPPED)
    whole = path.read_bytes()
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:-cut])
        finished = load_journal(path)
        assert finished == [FIRST, DROPPED][: max(0, whole[:-cut].count(b"\n") - 1)]
    path.write_bytes(whole[:-5])
    with Journal(path, HEADER) as journal:
        journal.append(SKIPPED)
    assert load_journal(path) == [FIRST, SKIPPED]


def test_a_line_is_on_disk_when_append_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.append(FIRST)
        assert synced[1:] == [(tmp_path / "j").stat().st_size]


@pytest.mark.parametrize("line", [b"{}\n", b"not json\n", b"[]\n", b'{"index": 0}\n'])
def test_a_whole_line_that_is_no_group_is_an_error(tmp_path, line):
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        journal.append(FIRST)
    with open(path, "ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"line 3 of .*journal\.jsonl holds no group"):
        load_journal(path)


@pytest.mark.parametrize(
    ("index", "match"),
    [
        (0, r"line 3 of .*j repeats index 0"),
        (-1, r"line 3 of .*j has index -1, but there are 3 prompts"),
        (3, r"line 3 of .*j has index 3, but there are 3 prompts"),
    ],
)
def test_a_journal_has_each_prompt_once(tmp_path, index, match):
    with Journal(tmp_path / "j", HEADER) as journal:
        journal.append(FIRST)
        journal.append(replace(DROPPED, index=index))
    with pytest.raises(ValueError, match=match):
        load_journal(tmp_path / "j")


@pytest.mark.parametrize("line", [b"{}", b"[]", b"not json", json.dumps(FIRST.to_json()).encode()])
def test_a_journal_begins_with_its_header(tmp_path, line):
    (tmp_path / "j").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"line 1 of .*j is no header"):
        load_journal(tmp_path / "j")


def test_a_journal_with_a_torn_header_starts_anew(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"num_prom')
    assert load_journal(path) == resume_journal(path, HEADER) == []
    with Journal(path, HEADER) as journal:
        journal.append(FIRST)
    assert resume_journal(path, HEADER) == [FIRST]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_prompts": 4}, "num_prompts = 3, this one 4"),
        ({"num_drafts": 4}, "num_drafts = 2, this one 4"),
        ({"num_refinements": 8}, "num_refinements = 2, this one 8"),
        ({"rounds": 2}, "rounds = 1, this one 2"),
        ({"seed": None}, "seed = 5, this one None"),
        ({"prompts": "other"}, "prompts = '[0-9a-f]{32}', this one 'other'"),
    ],
)
def test_a_journal_of_another_rollout_is_refused(tmp_path, change, match):
    with Journal(tmp_path / "j", HEADER):
        pass
    assert resume_journal(tmp_path / "j", HEADER) == []
    with pytest.raises(ValueError, match=f"belongs to another rollout: .*j has {match}"):
        resume_journal(tmp_path / "j", replace(HEADER, **change))


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_file_has_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        ALL.save(tmp_path / "r")
    finally:
        os.umask(before)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o666 & ~mask
