import itertools
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from igrpo_algo.drafts.markers import marker_tokens, neutralize
from igrpo_algo.drafts.text import CONCATENATION, PAPER_TEMPLATE, DraftTemplate, splice_prompt

SPECIALS = ["<|im_start|>", "<|im_end|>", "<|im_end|>|>", "</s>", "[/INST]", "|><|", "▁"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)

# Whole markers, their halves, and what a template engine or str.format would read as its own.
FRAGMENTS = [
    *(marker[:cut] for marker in SPECIALS for cut in (2, 5)),
    *(marker[cut:] for marker in SPECIALS for cut in (2, 5)),
    *SPECIALS,
    *PAPER_TEMPLATE.delimiters,
    "<earlier_",
    "</earlier_attempt",
    "attempt>",
    *("{draft}", "{{ 1 + 1 }}", "{% raw %}", "%s", "\\1", "$draft", "\n", " ", "42", "é"),
]
HOSTILE = st.lists(st.sampled_from([f for f in FRAGMENTS if f]), max_size=24).map("".join)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose control tokens nest, overlap and share their ends."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(marker, special=True) for marker in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", chat_template=CHATML
    )


@given(draft=HOSTILE)
@settings(max_examples=50)
@pytest.mark.parametrize("template", [PAPER_TEMPLATE, CONCATENATION])
def test_no_control_token_of_a_draft_survives_tokenization(tokenizer, template, draft):
    specials = marker_tokens(tokenizer)

    def special_ids(text: str, special_tokens: tuple[str, ...]) -> list[int]:
        prompt = [{"role": "user", "content": "1+1? </s>"}]
        spliced = splice_prompt(prompt, text, template=template, special_tokens=special_tokens)
        ids = tokenizer.apply_chat_template(spliced, return_dict=False)
        return [i for i in ids if i in set(tokenizer.convert_tokens_to_ids(list(specials)))]

    assert special_ids(draft, specials) == special_ids("", specials) == special_ids("42", ())
    assert special_ids("42▁", ()) != special_ids("42", ())  # the question is not vacuous


@given(
    st.text(st.sampled_from("ab<>"), max_size=24),
    st.lists(st.text(st.sampled_from("ab<> "), min_size=1, max_size=5), min_size=1, max_size=5),
    *[st.text(st.sampled_from("ab<>"), max_size=6)] * 3,
)
@settings(max_examples=200)
def test_no_marker_touches_what_neutralize_returns(draft, markers, before, after, rest):
    """Wherever a marker stands, it ends before the result begins or begins after its end."""
    result = neutralize(draft, markers, before=before, after=after)
    assert neutralize(result, markers, before=before, after=after) == result
    text = before + result + after + rest
    for marker, start in itertools.product(markers, range(len(text))):
        if result and text.startswith(marker, start):
            assert start + len(marker) <= len(before) or start >= len(before + result)


@given(st.text(st.sampled_from("xyz {}\n"), max_size=24), st.text(max_size=6), st.text(max_size=6))
@settings(max_examples=50)
def test_neutralize_changes_nothing_where_no_marker_is_near(draft, before, after):
    assert neutralize(draft, ["<|a|>", "[/B]"], before=before, after=after) == draft


@pytest.mark.parametrize(
    ("draft", "markers", "result"),
    [
        ("a</s>b", ["</s>"], "a b"),
        ("a<</s>/s>b", ["</s>"], "a< /s>b"),  # halves do not meet
        ("a</s></s>b", ["</s>"], "a  b"),
        ("aabb!", ["ab", "a b"], "a\nb!"),  # a space would make another one
        ("a §b", ["§", " "], "a\n\nb"),
        ("a §\n\tb", ["§", " ", "\n", "\t"], "a¡¡¡¡b"),
        ("1 < 2", ["</s>"], "1 < 2"),
        ("s> 2 </", ["</s>"], "s> 2 "),  # what follows could be "s>"
        ("</u>", [], "</u>"),
        ("", ["</s>"], ""),
        ("<|im_end|>|>", ["<|im_end|>", "<|im_end|>|>"], " "),  # the longest match goes first
        ("[x]]", ["[x]", "[x]]"], " "),
    ],
)
def test_neutralize_by_hand(draft, markers, result):
    assert neutralize(draft, markers) == result


@pytest.mark.parametrize(
    "marker",
    [
        *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|user|>", "<|endoftext|>"),
        *("<|start_header_id|>", "<|START_OF_TURN_TOKEN|>", "<|turn>", "<turn|>"),
        *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>", "<s>", "</s>"),
        *("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[TOOL_RESULTS]"),
        *("<\uff5cUser\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
    ],
)
def test_the_turns_of_well_known_models_need_no_tokenizer(marker):
    assert neutralize(f"4{marker}2") == "4 2"
    assert marker not in neutralize(marker[:3] + marker + marker[3:])
    assert "4 2" in splice_prompt("q", f"4{marker}2")


@pytest.mark.parametrize(
    "text",
    ["|x| < 3 > |y|", "a<|b|>c", "[B] [INSTANT] [ 1 ]", "<think>", "x <s y> z", "P(A|B)>0", "<b>"],
)
def test_mathematics_and_markup_are_no_markers(text):
    assert neutralize(text) == text


def test_what_a_chat_template_writes_as_plain_text_is_a_marker():
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' and loop.index0 < 9 %}"
        "{{ '<|user|>\\n' + m['content'] }}[INST]{{ '\\nUSER: ' }}{% else %}\n### Response:\n"
        "<reply>{{ m.text[1:] }}</reply> <think>{% endif %}{% endfor %}"
    )
    stub = SimpleNamespace(
        all_special_tokens=["<s>"], added_tokens_decoder={}, chat_template={"default": template}
    )
    literals = ["### Response:", "</reply>", "<reply>", "<s>", "<|user|>", "USER:", "[INST]"]
    assert marker_tokens(stub) == tuple(sorted(literals))
    assert marker_tokens(stub, "{{ messages }} Human :") == ("<s>", "Human :")
    stub.chat_template = None
    assert marker_tokens(stub) == ("<s>",)


@pytest.mark.parametrize("text", ["<", "<|im_start", "<|a>", ">", "<</s>/s>", "<|x|>"])
def test_cleaning_is_linear_in_the_text(text):
    markers = [f"<|reserved_special_token_{i}|>" for i in range(256)] + ["</s>", "<|im_start|>|"]

    def seconds(size):
        draft = (text * size)[:size]
        start = time.process_time()
        neutralize(draft, markers, before="<", after="")
        return time.process_time() - start

    seconds(1000)
    # Ten times the text takes ten times the processor's time, up to the noise of a busy machine in
    # milliseconds; quadratic cleaning takes a hundred times, which is minutes here.
    assert seconds(800_000) < 60 * max(min(seconds(80_000) for _ in range(3)), 0.05)


def test_a_marker_is_not_completed_by_the_text_around_the_draft():
    markers = ["\n\nHuman:", "<|end|>"]
    assert neutralize("Human: hi<|end", markers, before="q\n\n", after="|>") == "uman: hi<|en"
    assert neutralize("hi<|end", markers, after="|> and more") == "hi<|en"
    assert neutralize("hi<|end", markers, after="|") == "hi<|en"  # with ">" after that
    assert neutralize("|", ["<|>"], before="<", after=">") == ""
    assert neutralize("|>|", ["<|>"], before="<") == ">|"  # one character of it before the draft
    assert neutralize("5", markers, after=" <") == "5"  # the beginning of one, but not the draft's
    assert splice_prompt("q", "Human: hi", template=CONCATENATION, special_tokens=markers) == (
        "q\n\numan: hi"
    )
    joined = DraftTemplate(before="", after="")
    assert splice_prompt("q<|", "end|>!", template=joined, special_tokens=markers) == "q<|nd|>!"
    blocks = [{"role": "user", "content": [{"type": "text", "text": "q<|"}]}]
    spliced = splice_prompt(blocks, "end|>!", template=joined, special_tokens=markers)
    assert spliced[0]["content"][-1]["text"] == "nd|>!"


def test_marker_tokens_hold_those_that_all_special_tokens_misses(tokenizer):
    assert "</s>" not in tokenizer.all_special_tokens
    assert marker_tokens(tokenizer) == tuple(sorted(SPECIALS))
    thinking = {7: AddedToken("<think>", special=False), 8: AddedToken("</s>", special=True)}
    stub = SimpleNamespace(
        all_special_tokens=["<s>", "</s>"], added_tokens_decoder=thinking, chat_template=None
    )
    assert marker_tokens(stub) == ("</s>", "<s>")


def test_bad_arguments():
    with pytest.raises(TypeError, match=r"markers must be a collection of str, got int 3"):
        neutralize("d", 3)
    with pytest.raises(TypeError, match=r"each of markers must be a str, got int 3"):
        neutralize("d", [3])
    with pytest.raises(ValueError, match=r"each of markers must have at least one character"):
        neutralize("d", [""])
    with pytest.raises(TypeError, match=r"before must be a str"):
        neutralize("d", [], before=1)
    with pytest.raises(TypeError, match=r"after must be a str"):
        neutralize("d", [], after=1)
