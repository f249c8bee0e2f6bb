"""Options that `train` and `eval` share, and what is loaded by them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..prompts import check_chat_template_kwargs
from ..rewards import exact_match_reward, load_reward, math_reward
from ..rewards.judge import shared_judge
from ..rollouts.scoring import Reward
from .data import PAPER_SYSTEM_PROMPT, Row, load_prompts

Model = Annotated[str, typer.Option(help="Model: a folder, or a name on the hub.")]
Dataset = Annotated[
    str, typer.Option(help="Prompts: .jsonl, .json, .parquet, a saved folder, or a hub name.")
]
Rewards = Annotated[
    str,
    typer.Option(
        "--reward",
        help="math, exact, format, format-opened or module:function; several separated by commas.",
    ),
]
Split = Annotated[str | None, typer.Option(help="Split of a hub set (train; eval: test).")]
DatasetConfig = Annotated[str | None, typer.Option(help="Configuration of a hub set.")]
QuestionColumn = Annotated[str | None, typer.Option(help="Column with the question.")]
AnswerColumn = Annotated[str | None, typer.Option(help="Column with the reference answer.")]
SystemPrompt = Annotated[
    str | None, typer.Option(help="System message for each prompt; 'paper' takes the paper's.")
]
Limit = Annotated[int | None, typer.Option(help="Use this many rows only.")]
ChatTemplateKwargs = Annotated[
    str | None,
    typer.Option(help='JSON for the chat template, such as {"enable_thinking": false}.'),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")
]

MODEL_FILES = ("config.json", "adapter_config.json")
TAKEN = frozenset({
    "prompts", "completion", "completions", "completion_ids", "trainer_state", "log_extra",
    "log_metric",
})  # fmt: skip
"""Columns that TRL leaves out, or gives rewards something else by their name."""


def parse_kwargs(text: str | None) -> dict[str, Any] | None:
    """Read --chat-template-kwargs, if it is given."""
    if text is None:
        return None
    try:
        kwargs = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--chat-template-kwargs wants JSON, got {text!r}: {error}") from None
    return check_chat_template_kwargs(kwargs)


def load_rewards(names: str) -> dict[str, Reward]:
    """Load rewards by their names, separated by commas."""
    rewards: dict[str, Reward] = {}
    for name in map(str.strip, names.split(",")):
        if name in rewards:
            raise ValueError(f"--reward names {name!r} twice; to count it more, use a weight")
        rewards[name] = load_reward(name)
    if math_reward in rewards.values():
        shared_judge()  # says now, not at the first score, that math-verify is not installed
    return rewards


def load_rows(
    source: str,
    tokenizer: Any,
    rewards: Sequence[Reward],
    *,
    system_prompt: str | None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> list[Row]:
    """Load prompts in the form that the model takes, with the answers that the rewards need."""
    if system_prompt == "paper":
        system_prompt = PAPER_SYSTEM_PROMPT
    chat = tokenizer.chat_template is not None
    if chat_template_kwargs and not chat:
        raise ValueError("--chat-template-kwargs has no effect: the model has no chat template")
    rows = load_prompts(source, system_prompt=system_prompt, chat=chat, **options)
    if taken := sorted(TAKEN & rows[0].keys()):
        raise ValueError(
            f"{source} has a column {taken[0]!r}, which training can't pass on to rewards: TRL "
            "uses the name itself; rename the column, or leave it out"
        )
    needs_answer = [r for r in rewards if r in (math_reward, exact_match_reward)]
    if needs_answer and "answer" not in rows[0]:
        raise ValueError(
            f"{source} has no column answer or solution, which {needs_answer[0].__name__} needs; "
            "name it with --answer-column"
        )
    return rows


def load_tokenizer(model: str, *, trust_remote_code: bool) -> Any:
    """Load a tokenizer for generation; a path that looks like a folder must be one."""
    from transformers import AutoTokenizer

    folder = Path(model)
    looks_local = model.startswith((".", "/")) or folder.exists()
    if looks_local and not any((folder / name).is_file() for name in MODEL_FILES):
        raise ValueError(f"model {model} is not a folder with a {' or '.join(MODEL_FILES)}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=trust_remote_code, padding_side="left"
        )
    except OSError as error:  # of the hub, which may not name the model
        raise ValueError(f"tokenizer of model {model!r} could not be loaded: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
