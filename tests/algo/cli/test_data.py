"""Loading prompt sets: GSM8K- and MATH-style rows, ready rows, and files that are wrong."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from igrpo_algo.cli.data import PAPER_SYSTEM_PROMPT, load_prompts, prepare_prompt
from igrpo_algo.cli.options import load_rows
from igrpo_algo.rewards import math_reward

GSM8K_STYLE = [
    {
        "question": "A crate holds 12 jars. Nadia fills 3 crates and breaks 5 jars. How many "
        "jars are whole?",
        "answer": "3 crates hold 3 * 12 = <<3*12=36>>36 jars.\n36 - 5 = <<36-5=31>>31.\n#### 31",
    },
    {
        "question": "A tram ticket costs $2 and 1,000 are sold. How much money is that?",
        "answer": "1,000 * 2 = $<<1000*2=2000>>2,000.\n#### 2,000",
    },
]
MATH_STYLE = [
    {
        "problem": r"Compute $\frac{1}{3}+\frac{1}{6}$.",
        "level": "Level 1",
        "type": "Prealgebra",
        "solution": r"$\frac{1}{3}+\frac{1}{6}=\frac{2}{6}+\frac{1}{6}=\boxed{\frac{1}{2}}$.",
    },
    {
        "problem": r"For which real $x$ is $x^2 - 4x + 4 \le 0$?",
        "level": "Level 2",
        "type": "Algebra",
        "solution": r"$(x-2)^2 \le 0$ holds only at $x = \boxed{2}$.",
    },
]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gsm8k_rows_from_jsonl(tmp_path: Path) -> None:
    rows = load_prompts(write_jsonl(tmp_path / "train.jsonl", GSM8K_STYLE))
    assert rows == [
        {"prompt": user(GSM8K_STYLE[0]["question"]), "answer": "31"},
        {"prompt": user(GSM8K_STYLE[1]["question"]), "answer": "2,000"},
    ]
    golds = [row["answer"] for row in rows]
    assert math_reward(["#### 31", r"\boxed{\$2000}"], answer=golds) == [1.0, 1.0]
    assert math_reward(["#### 36", "#### 2"], answer=golds) == [0.0, 0.0]


def test_math_rows_from_json_keep_other_columns(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(MATH_STYLE))
    rows = load_prompts(path)
    assert rows[0] == {
        "prompt": user(MATH_STYLE[0]["problem"]),
        "answer": r"\frac{1}{2}",
        "level": "Level 1",
        "type": "Prealgebra",
    }
    golds = [row["answer"] for row in rows]
    assert math_reward([r"\boxed{0.5}", r"\boxed{x=2}"], answer=golds) == [1.0, 1.0]


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    data = Dataset.from_list(GSM8K_STYLE)
    data.to_parquet(str(tmp_path / "train.parquet"))
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"test": data}).save_to_disk(str(tmp_path / "several"))
    wanted = load_prompts(write_jsonl(tmp_path / "train.jsonl", GSM8K_STYLE))
    assert load_prompts(tmp_path / "train.parquet") == wanted
    assert load_prompts(tmp_path / "one") == wanted
    assert load_prompts(str(tmp_path / "several"), split="test") == wanted
    with pytest.raises(ValueError, match=r"no split 'train' among \['test'\]"):
        load_prompts(tmp_path / "several")
    assert load_prompts(tmp_path / "several", default_split="test") == wanted
    for source in ("one", "train.parquet"):
        with pytest.raises(ValueError, match=r"split .test. has no effect: .* has no splits"):
            load_prompts(tmp_path / source, split="test")
    with pytest.raises(ValueError, match="not a folder saved by datasets"):
        load_prompts(tmp_path)


def test_chat_template_kwargs_need_a_template(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "x.jsonl", GSM8K_STYLE)
    base = SimpleNamespace(chat_template=None)
    first, _ = load_rows(source, base, [], system_prompt=None)
    assert first["prompt"] == GSM8K_STYLE[0]["question"]
    with pytest.raises(ValueError, match="--chat-template-kwargs has no effect"):
        load_rows(source, base, [], system_prompt=None, chat_template_kwargs={"think": False})


def test_ready_rows_and_own_columns(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *user("6 * 7?")]
    ready = write_jsonl(tmp_path / "ready.jsonl", [{"prompt": messages, "solution": 42, "id": 1}])
    assert load_prompts(ready) == [{"prompt": messages, "answer": "42", "id": 1}]
    own = [{"q": "6 * 7?", "a": "42", "answer": "not this", "note": None}]
    path = write_jsonl(tmp_path / "own.jsonl", own)
    rows = load_prompts(path, question_column="q", answer_column="a", chat=False)
    assert rows == [{"prompt": "6 * 7?", "answer": "42", "note": None}]


def test_rows_without_answers_limit_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('\n{"prompt": "a"}\n\n{"prompt": "b"}\n{"prompt": "c"}')
    assert load_prompts(path) == [{"prompt": user(text)} for text in "abc"]
    assert load_prompts(path, limit=2) == [{"prompt": user(text)} for text in "ab"]
    path.write_text('{"prompt": "a", "answer": null}')
    assert load_prompts(path) == [{"prompt": user("a"), "answer": None}]


def test_a_column_may_be_missing_anywhere(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2", "level": 3}]
    for order in (rows, rows[::-1]):
        loaded = load_prompts(write_jsonl(tmp_path / "a.jsonl", order))
        assert {row["answer"]: row["level"] for row in loaded} == {"1": None, "2": 3}
    with pytest.raises(ValueError, match=r"line 1: column 'answer' is missing, the row has"):
        load_prompts(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "a"}, rows[0]]))


def test_paths_in_the_home_folder_and_upper_case_endings(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_jsonl(tmp_path / "x.JSONL", [{"prompt": "a"}])
    assert load_prompts("~/x.JSONL") == [{"prompt": user("a")}]
    with pytest.raises(FileNotFoundError, match=r"missing.JSON does not exist"):
        load_prompts("missing.JSON")


def test_the_next_column_serves_where_the_answer_is_empty(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "answer": "1", "solution": r"\boxed{2}", "ground_truth": "3"},
        {"prompt": "b", "answer": " ", "solution": r"So \boxed{2}.", "ground_truth": "3"},
        {"prompt": "c", "answer": None, "solution": "", "ground_truth": 3},
        {"prompt": "d", "solution": r"\boxed{2}"},
        {"prompt": "e", "answer": "", "solution": None, "ground_truth": ""},
    ]
    path = write_jsonl(tmp_path / "several.jsonl", rows)
    assert [row["answer"] for row in load_prompts(path)] == ["1", "2", "3", "2", None]
    named = load_prompts(path, answer_column="ground_truth", limit=3)
    assert [row["answer"] for row in named] == ["3", "3", "3"]
    with pytest.raises(ValueError, match=r"line 4: column 'ground_truth' is missing"):
        load_prompts(path, answer_column="ground_truth")
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "answer": "", "solution": [1]}])
    with pytest.raises(TypeError, match=r"line 1, column 'solution': an answer must be a string"):
        load_prompts(bad)


def test_a_missing_number_is_no_answer(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "answer": 1.5}, {"prompt": "b", "answer": float("nan")}]
    answers = [row["answer"] for row in load_prompts(write_jsonl(tmp_path / "a.jsonl", rows))]
    assert answers == ["1.5", None]


def test_system_prompt_stands_in_front(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", GSM8K_STYLE[:1])
    question = GSM8K_STYLE[0]["question"]
    (row,) = load_prompts(path, system_prompt=PAPER_SYSTEM_PROMPT)
    assert row["prompt"] == [{"role": "system", "content": PAPER_SYSTEM_PROMPT}, *user(question)]
    (row,) = load_prompts(path, system_prompt="Be brief.", chat=False)
    assert row["prompt"] == f"Be brief.\n\n{question}"
    messages = user("hi")
    assert prepare_prompt(messages, system_prompt="s")[0] == {"role": "system", "content": "s"}
    assert messages == user("hi")


@pytest.mark.parametrize(
    ("name", "text", "error", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": ', ValueError, r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", '{"prompt": "a"}\n[1]\n', ValueError, r"line 2: wanted an object, got list"),
        ("a.jsonl", b'{"prompt": "\xff"}', ValueError, r"line 1: not JSON"),
        ("a.jsonl", "", ValueError, r"a\.jsonl holds no rows"),
        ("a.jsonl", '{"text": "a"}', ValueError, r"a\.jsonl: no column prompt.*among \['text'\]"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": "1"}\n{"prompt": "b"}',
            ValueError,
            r"line 2: column 'answer' is missing, the row has \['prompt'\]",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n\n{"prompt": "b", "tags": ["c", {"d": "e\\ud83d"}]}',
            ValueError,
            r"a\.jsonl, line 3, column 'tags': '\\ud83d' is half of a surrogate pair",
        ),
        ("a.jsonl", '{"prompt": "a"}\n{}', ValueError, r"line 2: column 'prompt' is missing"),
        ("a.jsonl", '{"prompt": 3}', TypeError, r"line 1, column 'prompt': a prompt must be a str"),
        ("a.jsonl", '{"prompt": [3]}', TypeError, r"column 'prompt': a prompt must be a string or"),
        ("a.jsonl", '{"prompt": []}', ValueError, r"column 'prompt': a prompt must not be empty"),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": [{"role": "system", "content": "s"}]}',
            ValueError,
            r"line 2, column 'prompt': a prompt of messages must hold one with the role 'user'",
        ),
        (
            "a.jsonl",
            '{"prompt": "a"}\n{"prompt": ' + "[" * 200_000,
            ValueError,
            r"a\.jsonl, line 2: not JSON",
        ),
        ("a.json", "[" * 200_000, ValueError, r"a\.json: not JSON"),
        ("a.jsonl", '{"question": " "}', ValueError, r"column 'question': a prompt must not be em"),
        (
            "a.jsonl",
            '{"prompt": "a", "answer": [1]}',
            TypeError,
            r"line 1, column 'answer': an answer must be a string, a number or None, got list",
        ),
        ("a.json", '{"prompt": "a"}', ValueError, r"a\.json: wanted a list of objects, got dict"),
        ("a.json", "[", ValueError, r"a\.json: not JSON"),
        ("a.json", '[{"prompt": "a"}, 2]', ValueError, r"a\.json, row 2: wanted an object, got in"),
        ("a.parquet", "no", ValueError, r"a\.parquet: not parquet"),
        ("a.csv", "prompt", ValueError, r"a\.csv: unknown kind of file, wanted \.jsonl, \.json, "),
    ],
)
def test_errors_name_file_line_and_column(
    tmp_path: Path, name: str, text: str | bytes, error: type[Exception], message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(error, match=message):
        load_prompts(path)


def test_errors_of_arguments(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", GSM8K_STYLE)
    with pytest.raises(ValueError, match=r"question_column 'q' is not among \['answer', 'questio"):
        load_prompts(path, question_column="q")
    with pytest.raises(ValueError, match="answer_column 'a' is not among"):
        load_prompts(path, answer_column="a")
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        load_prompts(path, limit=0)
    for missing in ("missing.jsonl", "./missing", str(tmp_path / "missing")):
        with pytest.raises(FileNotFoundError, match=r"missing.* does not exist"):
            load_prompts(missing)
    with pytest.raises(ValueError, match=r"'someone/no-such-set'.*not be loaded from the hub"):
        load_prompts("someone/no-such-set")
    with pytest.raises(ValueError, match="chat messages need a model with a chat template"):
        prepare_prompt(user("a"), chat=False)
    with pytest.raises(ValueError, match="the messages begin with a system message"):
        prepare_prompt([{"role": "system", "content": "s"}, *user("a")], system_prompt="t")
