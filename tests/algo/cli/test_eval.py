"""`igrpo eval` end to end on a tiny model, its numbers by hand, and a stopped run that goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

import igrpo_algo.cli.eval as eval_command
from igrpo_algo.cli.app import app
from igrpo_algo.cli.eval_report import print_report, report
from igrpo_algo.cli.options import load_tokenizer
from igrpo_algo.drafts.splice import TextSplice
from igrpo_algo.rollouts.completions import Completion

REWARD = "def vowels(completions, **columns):\n    return [x(c) for c in completions]\n\n\n" + (
    "def x(c):\n    return float(sum(map(c[-1]['content'].count, 'aeiou')) > 0)\n"
)


@pytest.fixture(autouse=True)
def _own_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "any_vowel.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


def igrpo_eval(model: str, problems: str, *more: str) -> Result:
    command = [
        *("eval", "--model", model, "--dataset", problems, "--reward", "any_vowel:vowels,math"),
        *("--samples", "4", "--k", "1,2,4", "--draft-then-refine", "2:3", "--batch-size", "2"),
        *("--max-new-tokens", "6", "--temperature", "1", "--top-p", "1", "--output-dir", "out"),
    ]
    return CliRunner().invoke(app, [*command, *more])


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/samples.jsonl").read_text().splitlines()]


def test_eval_answers_scores_and_reports(tiny_model: str, problems: str) -> None:
    done = igrpo_eval(tiny_model, problems)
    assert done.exit_code == 0, done.output
    rows = records()
    assert [row["index"] for row in rows] == list(range(6))
    assert [row["answer"] for row in rows] == ["3", "5", "7", "9", "11", "13"]
    for row in rows:
        assert [len(row[s]) for s in ("single", "drafts", "refinements")] == [4, 2, 3]
        for answer in row["single"] + row["drafts"] + row["refinements"]:
            has_vowel = any(vowel in answer["text"] for vowel in "aeiou")
            assert answer["scores"] == {"any_vowel:vowels": float(has_vowel), "math": 0.0}
    assert len({row["single"][0]["text"] for row in rows}) > 1

    summary = json.loads(Path("out/summary.json").read_text())
    right = [[a["scores"]["any_vowel:vowels"] for a in row["single"]] for row in rows]
    accuracy = sum(map(sum, right)) / 24
    assert 0 < accuracy < 1, "a reward that never varies proves nothing"
    assert summary["single"]["pass@1"]["mean"] == pytest.approx(accuracy, abs=1e-12)
    at_least_one = sum(map(max, right)) / 6
    assert summary["single"]["pass@4"]["mean"] == pytest.approx(at_least_one, abs=1e-12)
    assert summary["single"]["reward/math"] == 0.0
    assert set(summary["refinements"]) >= {"pass@1", "pass@2"}
    assert "pass@4" not in summary["refinements"]
    assert summary["settings"]["samples"] == 4
    assert "single-shot" in done.output
    assert " refined " in done.output


def test_eval_ends_with_the_counts_and_mean_rewards_of_both_ways(
    tiny_model: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = igrpo_eval(tiny_model, problems)
    scores = {
        stage: [a["scores"]["any_vowel:vowels"] for row in records() for a in row[stage]]
        for stage in ("single", "drafts", "refinements")
    }
    means = {stage: f"{sum(values) / len(values):.2f}" for stage, values in scores.items()}
    single, refined = (line for line in done.output.splitlines() if "━" in line and "done" in line)
    assert "single-shot " in single
    assert "draft, then refine " in refined
    assert "6/6 done" in single
    assert f"refinement reward {means['single']}" in single
    assert "6/6 done" in refined
    assert f"draft reward {means['drafts']} · refinement reward {means['refinements']}" in refined


def test_stopped_eval_goes_on_to_the_same_numbers(
    tiny_model: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    igrpo_eval(tiny_model, problems)
    wanted = Path("out/samples.jsonl").read_bytes()
    whole = json.loads(Path("out/summary.json").read_text())
    lines = wanted.splitlines(keepends=True)
    Path("out/samples.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])  # torn in batch 2
    Path("out/summary.json").unlink()
    answered = []
    honest = eval_command.answer_batch

    def counted(rows: Any, first: int, *rest: Any) -> Any:
        answered.append(first)
        return honest(rows, first, *rest)

    monkeypatch.setattr(eval_command, "answer_batch", counted)
    done = igrpo_eval(tiny_model, problems)
    assert done.exit_code == 0, done.output
    assert answered == [2, 4]
    assert Path("out/samples.jsonl").read_bytes() == wanted
    assert json.loads(Path("out/summary.json").read_text()) == whole
    igrpo_eval(tiny_model, problems)
    assert answered == [2, 4], "a finished evaluation samples nothing"
    other = igrpo_eval(tiny_model, problems, "--seed", "1")
    assert other.exit_code == 2
    assert "other settings (seed was 0, is 1)" in other.stderr


def test_best_draft_is_refined_on_request(tiny_model: str, problems: str) -> None:
    done = igrpo_eval(tiny_model, problems, "--draft-choice", "best", "--limit", "2")
    assert done.exit_code == 0, done.output
    for row in records():
        scores = [draft["scores"]["any_vowel:vowels"] for draft in row["drafts"]]
        assert row["chosen"] == scores.index(max(scores))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-then-refine", "4"], "--draft-then-refine wants N:G, both at least 1, got '4'"),
        (["--draft-then-refine", "0:4"], "wants N:G, both at least 1"),
        (["--draft-then-refine", "a:4"], "wants whole numbers separated by ':', got 'a:4'"),
        (["--k", "1,x"], "--k wants whole numbers separated by ',', got '1,x'"),
        (["--k", "8"], "--k must be from 1 to --samples = 4, got (8,)"),
        (["--k", "0"], "--k must be from 1 to --samples"),
        (["--samples", "0"], "--samples must be >= 1"),
        (["--batch-size", "0"], "--batch-size must be >= 1"),
        (["--reward", "no:thing"], "could not be imported"),
        (["--dataset", "no.jsonl"], "no.jsonl does not exist"),
        (["--model", "./no"], "model ./no is not a folder with a config.json"),
        (["--temperature", "-1"], "temperature must be >= 0, got -1.0"),
        (["--temperature", "0", "--top-p", "0.9"], "top_p has no effect at temperature 0, got 0.9"),
        (["--reward", "math,math"], "--reward names 'math' twice"),
    ],
)
def test_refusals_are_one_line(
    tiny_model: str, problems: str, options: list[str], message: str
) -> None:
    done = igrpo_eval(tiny_model, problems, *options)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert not Path("out").exists()


def test_each_batch_has_its_own_seeds() -> None:
    class Sampler:
        def __init__(self) -> None:
            self.seeds: list[int] = []

        def sample(self, prompts: Any, n: int, *, seed: Any) -> Any:
            self.seeds += seed
            return [[Completion([1], "a")] * n for _ in prompts]

    def reward(completions: Any, **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    protocol = eval_command.Protocol(1, 1, 1, eval_command.DraftChoice.RANDOM, 2, 1.0, (1,), 0)
    sampler = Sampler()
    rows = [{"prompt": "same"}] * 2
    for first in (0, 2):
        list(
            eval_command.answer_batch(
                rows, first, sampler, {"zero": reward}, protocol, TextSplice()
            )
        )
    assert len(sampler.seeds) == len(set(sampler.seeds)) == 12


def answers(*scores: float | None, text: str = "a", cut: bool = False) -> list[dict[str, Any]]:
    reason = "length" if cut else "stop"
    return [
        {"text": text, "tokens": 2, "finish_reason": reason, "scores": {"math": score}}
        for score in scores
    ]


def test_report_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {
            "single": answers(1.0, 1.0, 0.0, 0.0),
            "drafts": answers(0.0, 0.5),
            "chosen": 1,
            "shown": "a",
            "refinements": answers(1.0, 1.0, text="<think>Again?</think>a"),
        },
        {
            "single": answers(0.0, 0.0, 0.0, 0.5, cut=True),
            "drafts": answers(1.0, 0.0),
            "chosen": 0,
            "shown": "a",
            "refinements": answers(1.0, 0.0, text="b"),
        },
        {
            "single": answers(None, None, None, None),
            "drafts": answers(None, None),
            "chosen": -1,
            "shown": "",
            "refinements": answers(None, None, text="b"),
        },
    ]
    results = report(rows, ["math"], [1, 2, 4], 1.0)
    single = results["single"]
    # pass@1 of the prompts: 1/2 and 0. Wilson's bounds for a mean of 1/4 over two prompts:
    # (1/4 + z^2 / 4 -+ z sqrt(3/32 + z^2 / 16)) / (1 + z^2 / 2).
    assert single["pass@1"]["mean"] == pytest.approx(0.25, abs=1e-12)
    z = 1.959963984540054
    margin = z * (3 / 32 + z**2 / 16) ** 0.5
    for side, bound in ((-1, "low"), (1, "high")):
        wanted = (0.25 + z**2 / 4 + side * margin) / (1 + z**2 / 2)
        assert single["pass@1"][bound] == pytest.approx(wanted, rel=1e-9)
    # pass@2 of the first prompt: 1 - C(2, 2) / C(4, 2) = 5/6.
    assert single["pass@2"]["mean"] == pytest.approx(5 / 12, abs=1e-12)
    assert single["reward/math"] == pytest.approx(2.5 / 8, abs=1e-12)
    assert (single["answers"], single["unscored"]) == (12, 4)
    assert single["cut_short"] == pytest.approx(1 / 3, abs=1e-12)
    assert results["refinements"]["pass@1"]["mean"] == pytest.approx(0.75, abs=1e-12)
    # Right answers: drafts 0 and 1/2, refinements 1 and 1/2.
    assert results["uplift"] == pytest.approx(0.5, abs=1e-12)
    assert results["copied"] == pytest.approx(1 / 2, abs=1e-12)
    print_report(results, Path("out"))
    assert "+0.500" in capsys.readouterr().out


def test_report_of_single_answers_takes_wilson_s_interval() -> None:
    rows = [{"single": answers(1.0)} for _ in range(4)]
    interval = report(rows, ["math"], [1], 1.0)["single"]["pass@1"]
    z2 = torch.tensor(1.959964**2)
    torch.testing.assert_close(interval["low"], float(4 / (4 + z2)), rtol=1e-5, atol=0)
    assert interval["high"] == 1.0


@pytest.mark.parametrize("prompts", [2, 29, 30, 40])
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_no_interval_is_without_width(prompts: int, score: float) -> None:
    rows = [{"single": answers(score, score)} for _ in range(prompts)]
    interval = report(rows, ["math"], [1, 2], 1.0)["single"]["pass@1"]
    assert interval["mean"] == score
    assert interval["high"] - interval["low"] > 0.05


def test_many_prompts_take_student_s_interval() -> None:
    rows = [{"single": answers(float(i % 2), 0.0)} for i in range(32)]
    interval = report(rows, ["math"], [1], 1.0)["single"]["pass@1"]
    # 16 prompts with 1/2, 16 with 0: the deviation is sqrt(32 / 16 / 31).
    # t of 31 degrees of freedom is 2.039513.
    margin = 2.039513 * (32 / 16 / 31 / 32) ** 0.5
    assert interval["low"] == pytest.approx(0.25 - margin, abs=1e-6)


def test_copies_are_of_what_was_shown() -> None:
    row = {
        "single": answers(0.0),
        "drafts": answers(0.0, text="<think>Two.</think>\n\nIt is 2."),
        "chosen": 0,
        "shown": "It is 2.",
        "refinements": answers(0.0, text="<think>Fine.</think>It is 2.\n")
        + answers(0.0, text="It is 3."),
    }
    assert report([row], ["math"], [1], 1.0)["copied"] == 0.5
    assert report([row], ["math"], [1], 1.0, None)["copied"] == 0.0


def test_drafts_are_shown_as_in_training(tiny_model: str) -> None:
    class Sampler:
        def __init__(self) -> None:
            self.prompts: list[Any] = []

        def sample(self, prompts: Any, n: int, *, seed: Any) -> Any:
            self.prompts += prompts
            text = "<think>Hm.</think>head " + "x" * 200 + "<|im_end|><|im_start|>tail"
            return [[Completion([1], text)] * n for _ in prompts]

    def reward(completions: Any, **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    tokenizer = load_tokenizer(tiny_model, trust_remote_code=False)
    splice = eval_command.make_splice(tokenizer, max_prompt_tokens=600)
    protocol = eval_command.Protocol(1, 1, 1, eval_command.DraftChoice.RANDOM, 2, 1.0, (1,), 0)
    sampler = Sampler()
    rows = [{"prompt": [{"role": "user", "content": "q"}]}]
    (record,) = eval_command.answer_batch(rows, 0, sampler, {"zero": reward}, protocol, splice)
    spliced = sampler.prompts[-1][0]["content"]
    assert spliced.startswith("q\n\nHere is an earlier attempt")
    assert "tail\n</earlier_attempt>" in spliced
    for absent in ("<|im_end|>", "<|im_start|>", "Hm.", "head"):
        assert absent not in spliced
    assert len(splice.budget.encode_prompt(sampler.prompts[-1])) <= 600
    assert record["shown"].endswith("tail")


BROKEN = """
def raises(completions, **columns):
    raise KeyError("solution")

def short(completions, **columns):
    return [0.0]

def words(completions, **columns):
    return ["good" for _ in completions]
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", "KeyError('solution')"),
        ("short", "must return one value per completion: 1 values for 4"),
        ("words", "must return numbers or None"),
    ],
)
def test_broken_rewards_end_with_one_line(
    tiny_model: str, problems: str, name: str, message: str
) -> None:
    Path("broken_rewards.py").write_text(BROKEN)
    done = igrpo_eval(tiny_model, problems, "--reward", f"broken_rewards:{name}")
    assert done.exit_code == 1
    assert message in done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("igrpo eval:")]) == 1
    assert "Traceback" not in done.output


def test_greedy_needs_no_word_on_top_p(tiny_model: str, problems: str) -> None:
    done = CliRunner().invoke(app, [
        *("eval", "--model", tiny_model, "--dataset", problems, "--reward", "any_vowel:vowels"),
        *("--samples", "1", "--limit", "1", "--max-new-tokens", "2", "--temperature", "0"),
        *("--output-dir", "out"),
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(Path("out/summary.json").read_text())["settings"]["top_p"] == 1.0
