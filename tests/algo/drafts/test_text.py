import copy
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igrpo_algo import thinking
from igrpo_algo.drafts import markers
from igrpo_algo.drafts import text as prompts
from igrpo_algo.drafts.text import (
    CONCATENATION,
    DEFAULT_TEMPLATE,
    PAPER_TEMPLATE,
    DraftTemplate,
    splice_prompt,
)

BRACKETS = DraftTemplate(before="\n[", after="]\nBetter:", delimiters=("]\n",))
SPECIALS = ["<|im_end|>", "</s>"]
PIECES = [*SPECIALS, *PAPER_TEMPLATE.delimiters, "<earlier_", "</earlier_attempt", "attempt>"]
DRAFTS = st.lists(
    st.sampled_from([*PIECES, "<|im_", "end|>", "{draft}", "\n", "42"]), max_size=16
).map("".join)


def conversation(content: object) -> list[dict]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": content},
    ]


def test_a_text_prompt_takes_the_draft_after_the_question():
    assert splice_prompt("1+1?", "3", template=BRACKETS) == "1+1?\n[3]\nBetter:"
    assert splice_prompt("1+1?", "", template=BRACKETS) == "1+1?\n[]\nBetter:"
    assert splice_prompt("1+1?", "3", template=CONCATENATION) == "1+1?\n\n3"


def test_the_last_user_message_takes_the_draft():
    prompt = conversation("1+1?")
    spliced = splice_prompt(prompt, "3", template=BRACKETS)
    assert spliced == conversation("1+1?\n[3]\nBetter:")


def test_messages_after_the_last_user_message_stay_after_it():
    tail = [{"role": "assistant", "content": "Let me see:"}, {"role": "tool", "content": "2"}]
    prompt = conversation("1+1?") + tail
    assert splice_prompt(prompt, "3", template=BRACKETS) == [
        *conversation("1+1?\n[3]\nBetter:"),
        *tail,
    ]


def test_blocks_keep_their_images_and_get_one_more_text():
    image = {"type": "image", "image": object()}
    question = {"type": "text", "text": "What is this?"}
    for blocks in ([image, question], [question, image], [image], []):
        spliced = splice_prompt(conversation(blocks), "A cat.", template=BRACKETS)
        added = {"type": "text", "text": "\n[A cat.]\nBetter:"}
        assert spliced == conversation([*blocks, added])
        assert all(new is old for new, old in zip(spliced[-1]["content"], blocks, strict=False))


@pytest.mark.parametrize("content", ["1+1?", [{"type": "text", "text": "1+1?"}]])
def test_the_argument_is_never_changed(content):
    prompt = [*conversation(content), {"role": "assistant", "content": "", "extra": 1}]
    before = copy.deepcopy(prompt)
    spliced = splice_prompt(prompt, "3")
    assert prompt == before
    spliced[-2]["content"] = spliced[-2]["content"][:0]
    spliced.clear()
    assert prompt == before


def test_other_keys_of_the_message_survive():
    spliced = splice_prompt([{"role": "user", "name": "Ann", "content": "?"}], "3")
    assert spliced[0]["name"] == "Ann"


@given(st.text(max_size=20), DRAFTS)
@settings(max_examples=50)
def test_text_and_conversation_hold_the_same_words(question, draft):
    as_text = splice_prompt(question, draft, special_tokens=SPECIALS)
    messages = splice_prompt(
        [{"role": "user", "content": question}], draft, special_tokens=SPECIALS
    )
    blocks = splice_prompt(
        [{"role": "user", "content": [{"type": "text", "text": question}]}],
        draft,
        special_tokens=SPECIALS,
    )
    assert messages == [{"role": "user", "content": as_text}]
    assert "".join(block["text"] for block in blocks[0]["content"]) == as_text
    assert as_text.startswith(question + DEFAULT_TEMPLATE.before)
    assert as_text.endswith(DEFAULT_TEMPLATE.after)


@pytest.mark.parametrize("draft", ["{draft} {0} {{ 7 * 7 }} {% for %} %s \\1 \\g<0> $x", "a\\b\n"])
@pytest.mark.parametrize("template", [DEFAULT_TEMPLATE, PAPER_TEMPLATE, CONCATENATION, BRACKETS])
def test_a_draft_is_never_read_as_a_template(draft, template):
    expected = "{q}" + template.before + draft + template.after
    assert splice_prompt("{q}", draft, template=template, special_tokens=["</s>"]) == expected


def test_the_default_is_one_line():
    spliced = splice_prompt("1+1?", "3")
    assert spliced == "1+1?\nEarlier attempt, which may be wrong: 3"


def test_the_papers_template_says_what_the_paper_asks_for():
    text = " ".join((PAPER_TEMPLATE.before + PAPER_TEMPLATE.after).split())
    asked = ["guidance, not the truth", "strictly better", "mistakes", "gaps", "justification"]
    asked += ["clearer", "word for word", "incomplete", "correct it and go on"]
    assert [words for words in asked if words not in text] == []


@given(DRAFTS)
@settings(max_examples=50)
def test_a_draft_cannot_close_its_delimiters(draft):
    spliced = splice_prompt("1+1?", draft, template=PAPER_TEMPLATE)
    assert [spliced.count(mark) for mark in PAPER_TEMPLATE.delimiters] == [1, 1]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"before": 1, "after": ""}, TypeError, r"before must be a str, got int 1"),
        ({"before": "", "after": None}, TypeError, r"after must be a str, got NoneType"),
        ({"delimiters": ["<d>"]}, TypeError, r"delimiters must be a tuple of str, got \['<d>'\]"),
        ({"delimiters": (1,)}, TypeError, r"each of delimiters must be a str, got int 1"),
        ({"delimiters": ("",)}, ValueError, r"each of delimiters must have at least one"),
        ({"delimiters": ("<e>",)}, ValueError, r"must occur in before or after, got '<e>'"),
    ],
)
def test_bad_templates(fields, error, message):
    with pytest.raises(error, match=message):
        DraftTemplate(**{"before": "<d>", "after": "</d>", **fields})


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        (("q",), TypeError, r"prompt must be a str or a list of messages, got tuple"),
        (["q"], TypeError, r"prompt\[0\] must be a message \(a dict\), got 'q'"),
        ([], ValueError, r"prompt must have a user message to take the draft, got roles \[\]"),
        ([{"role": "system", "content": "q"}], ValueError, r"got roles \['system'\]"),
        ([{"role": "user", "content": None}], TypeError, r"content of the last user .* got None"),
        ([{"role": "user"}], TypeError, r"content of the last user message must be a str"),
    ],
)
def test_bad_prompts(prompt, error, message):
    with pytest.raises(error, match=message):
        splice_prompt(prompt, "d")


def test_bad_options():
    with pytest.raises(TypeError, match=r"draft must be a str, got NoneType"):
        splice_prompt("q", None)
    with pytest.raises(TypeError, match=r"template must be a DraftTemplate, got '\{draft\}'"):
        splice_prompt("q", "d", template="{draft}")
    with pytest.raises(TypeError, match=r"special_tokens must be a collection of str, got str"):
        splice_prompt("q", "d", special_tokens="</s>")


def test_these_modules_need_nothing_but_the_standard_library(tmp_path):
    """Import them as a package of their own, in a process that has no installed packages."""
    (tmp_path / "alone" / "drafts").mkdir(parents=True)
    shutil.copy(thinking.__file__, tmp_path / "alone")
    for module in (prompts, markers):  # text.py and markers.py
        shutil.copy(module.__file__, tmp_path / "alone" / "drafts")
    code = "import sys; sys.path.insert(0, sys.argv[1]); import alone.drafts.text"
    command = [sys.executable, "-S", "-I", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
