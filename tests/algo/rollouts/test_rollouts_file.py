"""The file of rollouts: it holds everything, and everything else in it is refused by name."""

import json
import os
from dataclasses import replace

import pytest
import torch
from made_rollouts import ALL, FIRST, NAN
from safetensors.torch import load_file, save_file

from igrpo_algo.rollouts.records import DraftChoice, Rollout, Rollouts, Stage
from igrpo_algo.rollouts.rollouts_file import FORMAT


def test_times_are_not_compared_but_kept(tmp_path):
    late = replace(FIRST, drafts=replace(FIRST.drafts, started=8.0, ended=9.0))
    assert late == FIRST
    Rollouts([late]).save(tmp_path / "r")
    assert Rollouts.load(tmp_path / "r").times[0, 0].tolist() == [8.0, 9.0]


def test_file_holds_everything(tmp_path):
    ALL.save(tmp_path / "rollouts.safetensors")
    loaded = Rollouts.load(str(tmp_path / "rollouts.safetensors"))
    assert loaded == ALL
    assert loaded[0].refinements[0].started == 2.0
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
    with pytest.raises(ValueError, match=r"weights\.safetensors: holds no rollouts"):
        Rollouts.load(tmp_path / "weights.safetensors")
    (tmp_path / "torn").write_bytes(b"torn")
    with pytest.raises(ValueError, match="torn: is not a safetensors file"):
        Rollouts.load(tmp_path / "torn")
    with pytest.raises(FileNotFoundError):
        Rollouts.load(tmp_path / "missing")


def rewritten(path, change):
    """Write a whole file of rollouts again, its tensors or its records changed."""
    ALL.save(path)
    tensors = load_file(path)
    records = json.loads(bytes(tensors["json"].numpy()))
    change(tensors, records)
    if "json" in tensors and tensors["json"].dtype == torch.uint8:
        text = records if isinstance(records, bytes) else json.dumps(records).encode()
        tensors["json"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": FORMAT})


def tensor(name, new):
    return lambda tensors, records: tensors.update({name: new(tensors[name])})


def record(change):
    return lambda tensors, records: change(records[0])


def shorter(tensors, records):
    """Take a refinement from the prompt that was skipped: it has no tokens."""
    for rows in ("completions", "rewards"):
        records[1]["refinements"][0][rows].pop()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (tensor("token_ids", lambda ids: ids[:-1]), r"wants 1 of token_ids, and 0 are left"),
        (tensor("token_ids", lambda ids: ids.repeat(2)), r"token_ids holds 22, the records 11"),
        (tensor("token_ids", lambda ids: ids.float()), "token_ids must be int64 in one axis"),
        (
            tensor("token_ids", lambda ids: ids[None]),
            r"one axis, got .* \[1, \d+\]",
        ),
        (tensor("prompt_ids", lambda ids: ids[:-1]), "wants 3 of prompt_ids, and 2 are left"),
        (tensor("logprobs", lambda x: x[:-1]), "wants 1 of logprobs, and 0 are left"),
        (tensor("logprobs", lambda x: x.float()), "logprobs must be float64"),
        (lambda tensors, _: tensors.pop("logprobs"), r"must hold the tensors \['json', 'logprobs'"),
        (lambda tensors, _: tensors.update(more=torch.zeros(1)), r"got \['json', .*'more'"),
        (record(lambda r: r["drafts"]["completions"][0].update(token_ids=-1)), "got -1"),
        (record(lambda r: r["drafts"]["completions"][0].update(token_ids=1.0)), "must be int"),
        (record(lambda r: r["drafts"]["completions"][0].update(token_ids=[1])), "must be int"),
        (record(lambda r: r["drafts"]["completions"][0].update(logprobs=1)), "must be bool"),
        (record(lambda r: r["drafts"].update(prompt_ids=True)), "prompt_ids must be int"),
        (record(lambda r: r["drafts"].update(rewards=["0", 1.0])), r"rewards\[0\] must be float"),
        (record(lambda r: r.pop("drafts")), r"rollouts\[0\] lacks the field 'drafts'"),
        (shorter, "equally many refinements"),
    ],
)
def test_a_changed_file_names_itself_and_the_field(tmp_path, change, match):
    path = tmp_path / "rollouts.safetensors"
    rewritten(path, change)
    with pytest.raises(ValueError, match=rf"path: .*rollouts\.safetensors: .*{match}"):
        Rollouts.load(path)


@pytest.mark.parametrize("text", [b"{}", b"not json", b"\xff", b"[" * 100_000, b'[{"index": NaN}]'])
def test_a_file_of_other_json_is_refused(tmp_path, text):
    path = tmp_path / "r"
    rewritten(path, lambda tensors, records: None)
    tensors = load_file(path) | {"json": torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    save_file(tensors, path, metadata={"format": FORMAT})
    with pytest.raises(ValueError, match=f"path: {path}: "):
        Rollouts.load(path)


def test_what_json_cannot_say_is_refused(tmp_path):
    image = Stage([{"role": "user", "content": [object()]}], [], [])
    with pytest.raises(TypeError, match="JSON"):
        Rollouts([Rollout(0, image, [DraftChoice(-1, NAN)], [image])]).save(tmp_path / "r")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_file_has_the_mode_that_the_umask_gives(tmp_path, mask):
    before = os.umask(mask)
    try:
        ALL.save(tmp_path / "r")
    finally:
        os.umask(before)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o666 & ~mask
