"""The journal: what a crash leaves, what is refused, and one writer at a time."""

import asyncio
import json
import os
from contextlib import aclosing
from dataclasses import replace

import pytest
from canned_rollouts import PROMPTS, canned, graded, listed, streamed
from made_rollouts import DROPPED, FIRST, HEADER, SKIPPED

from igrpo_algo.rollouts.from_json import to_json
from igrpo_algo.rollouts.journal import Journal, check_journal, load_journal
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout


def test_journal_keeps_each_prompt(tmp_path):
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


def changed(*path, to):
    """Give the line of a rollout in which one field holds something else; `...` takes it out."""
    record = json.loads(json.dumps(to_json(DROPPED)))
    place = record
    for key in path[:-1]:
        place = place[key]
    if to is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = to
    return json.dumps(record).encode()


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"not json", "Expecting value"),
        (b"[]", r"rollout must be an object, got list \[\]"),
        (b"{}", "rollout lacks the field 'index'"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b'{"index": NaN}', "NaN is not JSON"),
        (b"\xff", "utf-8"),
        (changed("index", to=1.0), r"rollout.index must be int, got float 1.0"),
        (changed("index", to=True), r"rollout.index must be int, got bool True"),
        (changed("more", to=1), "rollout has an unknown field 'more'"),
        (changed("choices", to=...), "rollout lacks the field 'choices'"),
        (changed("choices", to=[]), "rollout: choices must hold one per round"),
        (changed("choices", 0, "draft", to=None), r"rollout.choices\[0\].draft must be str"),
        (
            changed("drafts", "rewards", to=[0.5, "1"]),
            r"rewards\[1\] must be float, got str",
        ),
        (changed("drafts", "rewards", to=[0.5]), "rollout.drafts: rewards must hold one number"),
        (changed("drafts", "prompt", to=3), "rollout.drafts.prompt must be str or list"),
        (changed("drafts", "prompt", to=[1, "a"]), "rollout.drafts.prompt must be str or list"),
        (changed("drafts", "prompt_ids", to=[1.5]), r"drafts.prompt_ids\[0\] must be int"),
        (
            changed("refinements", 0, "completions", 1, "token_ids", to=[9.0]),
            r"refinements\[0\].completions\[1\].token_ids\[0\] must be int, got float 9.0",
        ),
        (
            changed("refinements", 0, "completions", 1, "logprobs", to=[]),
            r"completions\[1\]: logprobs must hold one number per token: 0 .* for 1",
        ),
    ],
)
def test_a_whole_line_that_is_not_a_rollout_names_its_field(tmp_path, line, match):
    path = tmp_path / "journal.jsonl"
    with Journal(path, HEADER) as journal:
        journal.append(FIRST)
    with open(path, "ab") as file:
        file.write(line + b"\n")
    with pytest.raises(ValueError, match=rf"journal: line 3 of .*journal\.jsonl: .*{match}"):
        load_journal(path)
    with pytest.raises(ValueError, match="line 3"), Journal(path, HEADER):
        pass


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


@pytest.mark.parametrize("line", [b"{}", b"[]", b"not json", json.dumps(to_json(FIRST)).encode()])
def test_a_journal_begins_with_its_header(tmp_path, line):
    (tmp_path / "j").write_bytes(line + b"\n")
    for read in (load_journal, lambda path: check_journal(path, HEADER)):
        with pytest.raises(ValueError, match=r"line 1 of .*j: (header|Expecting)"):
            read(tmp_path / "j")


def test_a_journal_with_a_torn_header_starts_anew(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b'{"num_prom')
    check_journal(path, HEADER)
    assert load_journal(path) == []
    with Journal(path, HEADER) as journal:
        assert journal.finished == []
        journal.append(FIRST)
    with Journal(path, HEADER) as journal:
        assert journal.finished == [FIRST]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_prompts": 4}, "num_prompts was 3, is 4"),
        ({"num_drafts": 4}, "num_drafts was 2, is 4"),
        ({"num_refinements": 8}, "num_refinements was 2, is 8"),
        ({"rounds": 2}, "rounds was 1, is 2"),
        ({"seed": None}, "seed was 5, is None"),
        ({"prompts": "other"}, "prompts was '[0-9a-f]{32}', is 'other'"),
    ],
)
def test_a_journal_of_another_rollout_is_refused(tmp_path, change, match):
    with Journal(tmp_path / "j", HEADER):
        pass
    check_journal(tmp_path / "j", HEADER)
    other = replace(HEADER, **change)
    with pytest.raises(ValueError, match=rf"j holds a run with other settings \(.*{match}"):
        check_journal(tmp_path / "j", other)
    with pytest.raises(ValueError, match="other settings"), Journal(tmp_path / "j", other):
        pass


def test_a_journal_has_one_writer_at_a_time(tmp_path):
    path = tmp_path / "j"
    with Journal(path, HEADER) as journal:
        journal.append(FIRST)
        with pytest.raises(BlockingIOError, match="j is being written by another run"):
            Journal(path, HEADER).__enter__()
        assert load_journal(path) == [FIRST]
        journal.append(DROPPED)
    with Journal(path, HEADER) as journal:
        assert journal.finished == [FIRST, DROPPED]


def test_a_journal_that_is_refused_is_let_go(tmp_path):
    path = tmp_path / "j"
    path.write_bytes(b"{}\n")
    with pytest.raises(ValueError, match="line 1"):
        Journal(path, HEADER).__enter__()
    path.unlink()
    with Journal(path, HEADER):
        pass


def test_a_second_stream_on_a_journal_is_refused_and_leaves_it_whole(tmp_path):
    async def main():
        options = {"seed": 1, "journal": tmp_path / "j"}
        first = stream_two_stage_rollout(PROMPTS, canned, graded, **options)
        async with aclosing(first):
            done = [await anext(first)]
            with pytest.raises(BlockingIOError, match="written by another run"):
                await anext(stream_two_stage_rollout(PROMPTS, canned, graded, **options))
            return done + [rollout async for rollout in first]

    assert Rollouts.of(asyncio.run(main())) == Rollouts.of(load_journal(tmp_path / "j"))


def test_a_finished_journal_draws_nothing(tmp_path):
    path = tmp_path / "journal.jsonl"
    first = streamed(PROMPTS, canned, graded, seed=1, journal=path)
    again = streamed(PROMPTS, listed(), graded, seed=1, journal=path)
    assert again == first


def test_a_journal_of_other_prompts_or_sizes_is_refused_at_once(tmp_path):
    path = tmp_path / "journal.jsonl"
    streamed(PROMPTS, canned, graded, seed=1, journal=path)
    with pytest.raises(ValueError, match=r"prompts was .*, is"):
        stream_two_stage_rollout(PROMPTS[::-1], canned, graded, seed=1, journal=path)
    for change in ({"num_drafts": 2}, {"num_refinements": 8}, {"rounds": 2}, {"seed": 2}):
        ((name, value),) = change.items()
        with pytest.raises(ValueError, match=f"{name} was [14], is {value}"):
            stream_two_stage_rollout(PROMPTS, canned, graded, **{"seed": 1, **change}, journal=path)
    with pytest.raises(TypeError, match="JSON"):
        stream_two_stage_rollout(
            [[{"role": "user", "content": b"bytes"}]], canned, graded, num_drafts=0, journal=path
        )
