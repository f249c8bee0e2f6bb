r"""Prompt sets: hub names and local files become rows of a prompt and a reference answer.

Known shapes are GSM8K's (`question`, `answer` with `####`), MATH's (`problem`, `solution` with
`\boxed{}`) and rows that are ready (`prompt`, `answer`). Other column names are arguments. Every
error names the file, the line and the column: that is why JSON is not read by `datasets` here.
Nothing unpickles and no remote code runs.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from igrpo_kernels.checks import check_count, check_flag, describe

from ..rewards.answers import extract_gold

Row = dict[str, Any]

QUESTION_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution", "final_answer", "ground_truth")

PAPER_SYSTEM_PROMPT = (
    "Think the problem through first, between <think> and </think>, and then give the final "
    "answer between <answer> and </answer>. If the prompt holds feedback or an earlier draft, use "
    "it as guidance, not as truth: keep what is right, correct what is wrong, fill the gaps and "
    "argue more clearly, so that your final answer is strictly better. Do not repeat the draft "
    "word for word."
)
"""System prompt in the sense of iGRPO, arXiv:2602.09000, App. C, in our own words."""


def load_prompts(
    source: str | Path,
    *,
    split: str | None = None,
    default_split: str = "train",
    config: str | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    system_prompt: str | None = None,
    chat: bool = True,
    limit: int | None = None,
) -> list[Row]:
    r"""Load a prompt set and bring each row to the form that trainers and rewards take.

    A path that exists (`~` is your home) is read as what its name says, in either case: `.jsonl`,
    `.json` (a list of objects), `.parquet`, or a folder that `datasets` saved to disk. A name with
    one of these endings, or one that begins with `.`, `/` or `~`, must exist. Anything else is a
    name on the hub.

    Each row becomes `{"prompt": ..., "answer": ..., **other columns}`. The question is the first
    column present of prompt, question, problem, and must be in every row. The answer is the first
    that is not empty of answer, solution, final_answer, ground_truth, of which
    `rewards.answers.extract_gold` keeps the final answer; a row must have one of these columns that
    are in the set. Of any other column a row may lack its cell: that is None. A set without an
    answer column yields rows without `answer`: a reward of your own may not need one.

    Args:
        source: A path, or a name on the hub.
        split: Which split of a hub set, or of a saved folder that has several; None takes
            `default_split`.
        default_split: See `split`.
        config: Which configuration of a hub set ("main" of openai/gsm8k).
        question_column: Name of the column that holds the question, a string or chat messages.
        answer_column: Name of the column that holds the reference answer; no other is read then.
        system_prompt: Put before each prompt as a system message; `PAPER_SYSTEM_PROMPT` is one.
        chat: Whether prompts become chat messages; False leaves them strings, with the system
            prompt and an empty line in front, for models without a chat template.
        limit: Keep this many rows from the start; None keeps all.

    Returns:
        One dict per row, all with the same columns.

    Raises:
        FileNotFoundError: The source looks like a path and does not exist.
        ModuleNotFoundError: `datasets` is needed and not installed.
        TypeError: A cell is of the wrong type.
        ValueError: A file is malformed, empty or of an unknown kind, lacks a column, or holds half
            of a surrogate pair, which is not text.

    Examples:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:
        ...     _ = file.write('{"question": "6 * 7?", "answer": "6 * 7 = 42\\n#### 42"}')
        ...     file.flush()
        ...     load_prompts(file.name)
        [{'prompt': [{'role': 'user', 'content': '6 * 7?'}], 'answer': '42'}]
    """
    if not isinstance(source, str | Path):
        raise TypeError(f"source must be a path or a name on the hub, got {describe(source)}")
    if limit is not None:
        check_count("limit", limit)
    check_flag("chat", chat)
    rows = list(itertools.islice(_read(source, split, default_split, config), limit))
    if not rows:
        raise ValueError(f"{source} holds no rows")
    columns = dict.fromkeys(name for _, row in rows for name in row)
    question, answers = _choose_columns(columns, str(source), question_column, answer_column)
    others = [name for name in columns if name not in (question, *answers[:1])]
    format_ = _RowFormat(question, answers, others, system_prompt, chat)
    return [format_.prepare(row, place) for place, row in rows]


def prepare_prompt(
    question: object, *, system_prompt: str | None = None, chat: bool = True
) -> str | list[dict[str, Any]]:
    r"""Turn a question into a prompt: chat messages, or a string for models without a template.

    Args:
        question: A string, or a list of messages with `role` and `content`.
        system_prompt: Put in front; refused where the messages begin with a system message.
        chat: Whether the prompt is a list of messages.

    Returns:
        The prompt; the argument is not changed.

    Raises:
        TypeError: The question is neither a string nor a list of messages.
        ValueError: It is empty, holds messages none of which is the user's, has a system message
            besides `system_prompt`, or is a list of messages where `chat` is False.

    Examples:
        >>> prepare_prompt("6 * 7?", system_prompt="Be brief.", chat=False)
        'Be brief.\n\n6 * 7?'
    """
    check_flag("chat", chat)
    if not isinstance(question, str):
        return _prepare_messages(question, system_prompt, chat)
    if not question.strip():
        raise ValueError("a prompt must not be empty")
    if chat:
        system = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
        return [*system, {"role": "user", "content": question}]
    return question if system_prompt is None else f"{system_prompt}\n\n{question}"


def _prepare_messages(
    question: object, system_prompt: str | None, chat: bool
) -> list[dict[str, Any]]:
    if not isinstance(question, Sequence) or not all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and "content" in m
        for m in question
    ):
        raise TypeError(
            f"a prompt must be a string or a list of messages, got {describe(question)}"
        )
    if not question:
        raise ValueError("a prompt must not be empty")
    if all(message["role"] != "user" for message in question):
        raise ValueError("a prompt of messages must hold one with the role 'user'")
    if not chat:
        raise ValueError("chat messages need a model with a chat template")
    messages = [dict(message) for message in question]
    if system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise ValueError("system_prompt can't be added: the messages begin with a system message")
    return [{"role": "system", "content": system_prompt}, *messages]


@dataclass(frozen=True)
class _RowFormat:
    """Which columns hold what, and what a prompt looks like."""

    question: str
    answers: Sequence[str]
    others: Sequence[str]
    system_prompt: str | None
    chat: bool

    def prepare(self, row: Row, place: str) -> Row:
        for name, value in row.items():
            with _locate_errors(place, name):
                _check_text(value)
        question = _cell(row, self.question, place)
        prepared = {name: row.get(name) for name in self.others}
        with _locate_errors(place, self.question):
            prepared["prompt"] = prepare_prompt(
                question, system_prompt=self.system_prompt, chat=self.chat
            )
        if self.answers:
            prepared["answer"] = self._answer(row, place)
        return prepared

    def _answer(self, row: Row, place: str) -> str | None:
        """Return the answer of the first column that holds one."""
        for name in [name for name in self.answers if name in row] or self.answers[:1]:
            cell = _cell(row, name, place)
            with _locate_errors(place, name):
                answer = extract_gold(cell)
            if answer is not None:
                return answer
        return None


def _choose_columns(
    columns: Iterable[str], source: str, question_column: str | None, answer_column: str | None
) -> tuple[str, list[str]]:
    """Choose the named columns, or else the first known question and all known answers."""
    there = sorted(columns)
    for argument, name in (("question", question_column), ("answer", answer_column)):
        if not isinstance(name, str | None):
            raise TypeError(f"{argument}_column must be a string or None, got {describe(name)}")
        if name is not None and name not in there:
            raise ValueError(f"{source}: {argument}_column {name!r} is not among {there}")
    question = question_column or next((name for name in QUESTION_COLUMNS if name in there), None)
    if question is None:
        raise ValueError(
            f"{source}: no column {', '.join(QUESTION_COLUMNS)} among {there}; "
            "name it with question_column"
        )
    return question, [answer_column] if answer_column else [n for n in ANSWER_COLUMNS if n in there]


def _check_text(value: object) -> None:
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = error.object[error.start]
        raise ValueError(f"{half!r} is half of a surrogate pair, not text") from None


def _cell(row: Row, column: str, place: str) -> object:
    if column not in row:
        raise ValueError(f"{place}: column {column!r} is missing, the row has {sorted(row)}")
    return row[column]


@contextmanager
def _locate_errors(place: str, column: str) -> Iterator[None]:
    """Add place and column to the errors of a block."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{place}, column {column!r}: {error}") from error


def _read(
    source: str | Path, split: str | None, default_split: str, config: str | None
) -> Iterator[tuple[str, Row]]:
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.exists() and config is not None:
        raise ValueError(f"--dataset-config {config} has no effect: {path} is not a set on the hub")
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".parquet": _read_parquet}
    if path.is_file():
        if suffix not in readers:
            raise ValueError(f"{path}: unknown kind of file, wanted {', '.join(readers)}")
        _check_no_split(path, split)
        return readers[suffix](path)
    if path.is_dir():
        return _read_saved(path, split, default_split)
    if suffix in readers or str(source).startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} does not exist")
    return _read_hub(str(source), split or default_split, config)


def _check_no_split(path: Path, split: str | None) -> None:
    if split is not None:
        raise ValueError(f"split {split!r} has no effect: {path} has no splits")


def _read_jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield f"{path}, line {number}", _object(line, f"{path}, line {number}")


def _object(line: bytes, place: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON, no UTF-8, or nested too deeply
        raise ValueError(f"{place}: not JSON: {error}") from error
    return _checked(row, place)


def _checked(row: object, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place}: wanted an object, got {type(row).__name__}")
    return row


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path}: wanted a list of objects, got {type(rows).__name__}")
    for number, row in enumerate(rows, 1):
        yield f"{path}, row {number}", _checked(row, f"{path}, row {number}")


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path}: not parquet: {error}") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def _read_saved(path: Path, split: str | None, default: str) -> Iterator[tuple[str, Row]]:
    import datasets

    if not any((path / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        raise ValueError(f"{path}: not a folder saved by datasets; name a file inside it instead")
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        name = split or default
        if name not in saved:
            raise ValueError(f"{path}: no split {name!r} among {sorted(saved)}")
        saved = saved[name]
    else:
        _check_no_split(path, split)
    return _numbered(str(path), saved)


def _read_hub(name: str, split: str, config: str | None) -> Iterator[tuple[str, Row]]:
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:
        raise ValueError(
            f"dataset {name!r} (config {config!r}, split {split!r}) is not a local file and could "
            f"not be loaded from the hub: {error}"
        ) from error
    return _numbered(f"{name}[{split}]", rows)


def _numbered(name: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{name}, row {number}", dict(row)) for number, row in enumerate(rows, 1))
