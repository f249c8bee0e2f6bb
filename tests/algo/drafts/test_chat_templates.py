"""Does a spliced draft reach the model? Asked of every chat template that TRL ships."""

import re
from pathlib import Path

import pytest
import trl
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from igrpo_algo.drafts.text import CONCATENATION, DEFAULT_TEMPLATE, PAPER_TEMPLATE, splice_prompt

TEMPLATES = {path.stem: path for path in Path(trl.__file__).parent.glob("chat_templates/*.jinja")}

QUESTION = "What is 17 + 25?\nExplain."
THINKING = "<think>\nFirst 7 + 5 = 12.\n</think>"
ANSWER = "So it is $\\boxed{42}$.\n\nThat's all."

# Templates that can't render a user message of this shape, with or without a draft, and why. The
# user of such a model has to write prompts in the other shape. "_training" twins behave alike.
NO_STRINGS = dict.fromkeys(
    ["idefics3", "llava_next", "smolvlm"], "looks for blocks, and finds none in a string"
)
NO_BLOCKS = {
    **dict.fromkeys(
        ["deepseek_r1_distill", "deepseekv3", "gptoss", "phi3", "phi3_5", "qwen2_5"],
        "concatenates content to a string, and raises",
    ),
    "cohere": "calls content.strip(), and raises",
    **dict.fromkeys(
        ["cohere2", "gemma", "lfm2", "lfm2_v2", "llama3", "llama3_1", "llama3_2"]
        + [f"nemotron_3_{size}" for size in ("5_lightning", "nano", "super", "ultra")],
        "prints the list of blocks as Python would",
    ),
    **dict.fromkeys(["qwen3", "qwen3_instruct_2507"], "renders content that is no string as ''"),
}
UNABLE = {"string": NO_STRINGS, "blocks": NO_BLOCKS}
SHAPES = [(name, shape) for name in sorted(TEMPLATES) for shape in UNABLE]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def render(tokenizer, name: str, messages: list[dict]) -> str:
    return tokenizer.apply_chat_template(
        messages,
        chat_template=TEMPLATES[name].read_text(),
        tokenize=False,
        add_generation_prompt=True,
    )


def user(text: str, shape: str) -> list[dict]:
    content = text if shape == "string" else [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def unable(name: str, shape: str) -> bool:
    return name.removesuffix("_training") in UNABLE[shape]


def survives(tokenizer, name: str, messages: list[dict], *parts: str) -> bool:
    """Whether the parts stand in the rendered prompt, once each and in order."""
    try:
        rendered = render(tokenizer, name, messages)
    except TypeError as error:
        assert "can only concatenate str" in str(error)  # noqa: PT017
        return False
    except Exception as error:
        assert "has no attribute 'strip'" in str(error)  # noqa: PT017
        return False
    places = [rendered.find(part) for part in parts]
    return (
        -1 not in places
        and places == sorted(places)
        and all(rendered.count(part) == 1 for part in parts)
    )


def test_every_template_and_every_exception_is_seen():
    assert len(TEMPLATES) >= 72
    families = {name.removesuffix("_training") for name in TEMPLATES}
    assert set(NO_STRINGS) | set(NO_BLOCKS) <= families
    assert not set(NO_STRINGS) & set(NO_BLOCKS)  # each template takes a draft in one shape at least


@pytest.mark.parametrize(("name", "shape"), SHAPES)
def test_question_thinking_and_answer_reach_the_model(tokenizer, name, shape):
    for template in (DEFAULT_TEMPLATE, PAPER_TEMPLATE, CONCATENATION):
        prompt = user(QUESTION, shape)
        spliced = splice_prompt(prompt, f"{THINKING}\n\n{ANSWER}", template=template)
        able = survives(tokenizer, name, spliced, QUESTION, THINKING, ANSWER)
        assert able is not unable(name, shape)
    assert survives(tokenizer, name, prompt, QUESTION) is able  # the shape's fault, not the draft's


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_the_draft_stands_in_the_last_of_several_turns(tokenizer, name):
    shape = "blocks" if unable(name, "string") else "string"
    first, answer = user("Hello?", shape)[0], user("Hello!", shape)[0] | {"role": "assistant"}
    prompt = [first, answer, *user(QUESTION, shape)]
    spliced = splice_prompt(prompt, f"{THINKING}\n\n{ANSWER}", template=PAPER_TEMPLATE)
    parts = ("Hello?", "Hello!", QUESTION, THINKING, ANSWER, PAPER_TEMPLATE.after)
    assert survives(tokenizer, name, spliced, *parts)


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_hostile_draft_adds_no_marker_of_the_template(tokenizer, name):
    """The markers are read off the template's own text: <|im_end|>, [/INST], <end_of_turn>, ..."""
    source = TEMPLATES[name].read_text()
    markers = sorted({*re.findall(r"<[^<>\s'\"]{2,40}>|\[/?[A-Z_]+\]", source), "<s>", "</s>"})
    nested = [marker[:3] + marker + marker[3:] for marker in markers]
    draft = f"{ANSWER}{''.join(markers)}assistant\n{''.join(nested)} done"
    shape = "blocks" if unable(name, "string") else "string"

    def marks(text: str) -> list[int]:
        spliced = splice_prompt(user(QUESTION, shape), text, special_tokens=markers)
        rendered = render(tokenizer, name, spliced)
        return [rendered.count(marker) for marker in markers]

    assert marks(draft) == marks(ANSWER)


def test_an_assistant_turn_would_lose_the_thinking(tokenizer):
    """Why the draft goes into the user's message."""
    turn = {"role": "assistant", "content": f"{THINKING}\n\n{ANSWER}"}
    messages = [*user(QUESTION, "string"), turn, *user("Improve it.", "string")]
    assert survives(tokenizer, "qwen3", messages, QUESTION, ANSWER)
    assert not survives(tokenizer, "qwen3", messages, THINKING)
