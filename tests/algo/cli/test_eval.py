"""`igrpo eval` end to end on a tiny model, and a stopped run that goes on."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

import igrpo_algo.cli.eval as eval_command
from igrpo_algo.cli import answers
from igrpo_algo.cli.app import app
from igrpo_algo.cli.options import load_tokenizer
from igrpo_algo.drafts.rules import DraftRules
from igrpo_algo.engines.base import EngineSampler
from igrpo_algo.engines.distribution import Distribution
from igrpo_algo.rollouts.completions import Completion

GREEDY = ("--temperature", "0", "--samples", "1", "--k", "1")
RANDOM = answers.RefinedDraft.RANDOM
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
    assert f"tok/s · reward {means['single']}" in single
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
    honest = answers.answer_batch

    def counted(rows: Any, first: int, *rest: Any) -> Any:
        answered.append(first)
        return honest(rows, first, *rest)

    monkeypatch.setattr(answers, "answer_batch", counted)
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


def test_a_choice_of_draft_needs_drafts() -> None:
    for drafts in (0, 1):
        with pytest.raises(ValueError, match=r"--draft-choice needs .* at least 2 drafts"):
            answers.Protocol(4, drafts, 4, answers.RefinedDraft.BEST, 8, 1.0, (1,), 0)


def test_another_model_or_other_rows_under_the_same_path_are_refused(
    tiny_model: str, problems: str, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "trained")
    assert igrpo_eval(str(model), problems, "--limit", "2").exit_code == 0
    rows = Path(problems).read_text()
    Path(problems).write_text(rows.replace("shells", "pearls"))
    other_rows = igrpo_eval(str(model), problems, "--limit", "2")
    assert (other_rows.exit_code, "(rows was" in other_rows.stderr) == (2, True)
    Path(problems).write_text(rows)
    weights = model / "model.safetensors"
    os.utime(weights, (0, 0))  # the same weights, fetched again
    assert igrpo_eval(str(model), problems, "--limit", "2").exit_code == 0
    trained = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in trained.items()}, weights, {"format": "pt"})
    again = igrpo_eval(str(model), problems, "--limit", "2")
    assert (again.exit_code, "(weights was" in again.stderr) == (2, True)


def test_a_second_writer_is_refused_and_a_dead_one_is_not_waited_for(
    tiny_model: str, problems: str
) -> None:
    hold = "import os; from igrpo_algo.files import sole_writer\n" + (
        "with sole_writer('out'): print('held', flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1) as writer:
        assert writer.stdout.readline() == b"held\n"
        refused = igrpo_eval(tiny_model, problems)
        assert refused.exit_code == 2
        assert "igrpo eval: out is being written by another run" in refused.stderr
        assert not Path("out").exists()
        writer.kill()
    assert igrpo_eval(tiny_model, problems, "--limit", "1").exit_code == 0


def test_the_chat_template_gets_the_keywords(
    tiny_model: str, problems: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, "model")
    Path("model/chat_template.jinja").write_text("{{ messages[0].content }}{{ effort }}")
    used: list[Any] = []
    monkeypatch.setattr(eval_command, "answer_all", lambda *arguments: used.extend(arguments))
    monkeypatch.setattr(eval_command, "report", lambda *_: {"prompts": 0})
    done = igrpo_eval("model", problems, "--chat-template-kwargs", '{"effort": " low"}')
    assert done.exit_code == 0, done.output
    sampler, rules = used[1], used[4]
    prompt = [{"role": "user", "content": "q"}]
    assert sampler.tokenizer.decode(sampler.encode(prompt)) == "q low"
    assert rules.splice.budget.encode_prompt(prompt) == sampler.encode(prompt)
    settings = json.loads(Path("out/run.json").read_text())
    assert settings["chat_template_kwargs"] == {"effort": " low"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--draft-then-refine", "4"], "--draft-then-refine wants N:G, both at least 1, got '4'"),
        (["--draft-then-refine", "0:4"], "wants N:G, both at least 1"),
        (["--draft-then-refine", "a:4"], "wants whole numbers separated by ':', got 'a:4'"),
        (["--k", "1,x"], "--k wants whole numbers separated by ',', got '1,x'"),
        (["--k", "8"], "--k must be from 1 to --samples = 4, got (8,)"),
        (["--k", "0"], "--k must be from 1 to --samples"),
        (["--samples", "0"], "--samples must be >= 1, got 0"),
        (["--batch-size", "0"], "--batch-size must be >= 1, got 0"),
        (["--seed", "-1"], "--seed must be >= 0, got -1"),
        (["--reward", "no:thing"], "could not be imported"),
        (["--dataset", "no.jsonl"], "no.jsonl does not exist"),
        (["--model", "./no"], "model ./no is not a folder with a config.json"),
        (["--model", "someone/none"], "tokenizer of model 'someone/none' could not be loaded"),
        (["--temperature", "-1"], "temperature must be >= 0, got -1.0"),
        (["--temperature", "0"], "--temperature 0 gives the same answer each time"),
        (
            [*GREEDY, "--draft-then-refine", "1:1", "--top-p", "0.9"],
            "top_p has no effect at temperature 0, got 0.9",
        ),
        (["--split", "dev"], "split 'dev' has no effect"),
        (["--reward", "math,math"], "--reward names 'math' twice"),
        (["--success-reward", "nan"], "--success-reward must be finite, got nan"),
        (["--dataset-config", "main"], "--dataset-config main has no effect"),
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

    protocol = answers.Protocol(1, 1, 1, RANDOM, 2, 1.0, (1,), 0)
    sampler, rules = Sampler(), DraftRules()
    rows = [{"prompt": "same"}] * 2
    for first in (0, 2):
        list(answers.answer_batch(rows, first, sampler, {"zero": reward}, protocol, rules))
    assert len(sampler.seeds) == len(set(sampler.seeds)) == 12


class Rambling(EngineSampler):
    """Says the same at length, and asks for a turn of its own."""

    max_prompt_tokens = 300

    def sample(self, prompts: Any, n: int, *, seed: Any) -> Any:
        self.prompts = prompts
        text = "<think>Hm.</think>head " + "x" * 200 + "<|im_end|><|im_start|>tail"
        return [[Completion([1], text)] * n for _ in prompts]


def test_drafts_are_shown_as_in_training(tiny_model: str) -> None:
    def reward(completions: Any, **columns: Any) -> list[float]:
        return [0.0 for _ in completions]

    tokenizer = load_tokenizer(tiny_model, trust_remote_code=False)
    tokenizer.chat_template += "{{ effort }}"
    sampler = Rambling(tokenizer, Distribution(), 1, {"effort": "much " * 20})
    rules = answers.draft_rules(RANDOM, sampler)
    protocol = answers.Protocol(1, 1, 1, RANDOM, 2, 1.0, (1,), 0)
    rows = [{"prompt": [{"role": "user", "content": "q"}]}]
    (record,) = answers.answer_batch(rows, 0, sampler, {"zero": reward}, protocol, rules)
    spliced = tokenizer.decode(sampler.prompts[-1])
    draft = spliced.partition("q\nEarlier attempt, which may be wrong: ")[2]
    draft = draft.partition("tail")[0]
    assert draft
    for absent in ("<|im_end|>", "<|im_start|>", "Hm.", "head"):
        assert absent not in draft
    assert len(sampler.prompts[-1]) <= 300
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
