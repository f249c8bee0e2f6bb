"""Prompts to ids: what stands before and behind a prompt, and whose turn is left open."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from igrpo_algo.drafts.text import splice_prompt
from igrpo_algo.prompts import check_chat_template_kwargs, decode_completion, encode_prompt
from igrpo_algo.thinking import strip_thinking

SPECIALS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if thinks is false %}<think></think>{% endif %}{% endif %}"
)


def make_tokenizer(post_processor=None):
    """One token per character and per special token."""
    vocabulary = {name: i for i, name in enumerate([*SPECIALS, *map(chr, range(32, 127)), "\n"])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.Fuse()
    if post_processor is not None:
        core.post_processor = processors.TemplateProcessing(
            single=post_processor,
            special_tokens=[(name, vocabulary[name]) for name in SPECIALS[:2]],
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIALS[2:],
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def encoded(prompt, post_processor=None, **options):
    tokenizer = make_tokenizer(post_processor)
    return tokenizer.decode(encode_prompt(prompt, tokenizer, options))


@pytest.mark.parametrize(
    ("post_processor", "before"),
    [
        (None, ""),
        ("<s> $A", "<s>"),
        ("<s> $A </s>", "<s>"),
        ("$A </s>", ""),
        ("<s> <s> $A", 2 * "<s>"),
    ],
)
@pytest.mark.parametrize("text", ["hi", "", "hi</s>", "</s></s>", "</s>hi"])
def test_a_string_gets_what_stands_before_it_and_nothing_behind(post_processor, before, text):
    assert encoded(text, post_processor) == before + text


@pytest.mark.parametrize("post_processor", [None, "<s> $A </s>"])
def test_a_chat_has_the_one_bos_of_its_template(post_processor):
    chat = [{"role": "user", "content": "hi"}]
    want = "<s><|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert encoded(chat, post_processor) == want
    assert encoded(chat, post_processor, thinks=False) == want + "<think></think>"


@pytest.mark.parametrize("started", ["It is", "It is ", "", "I think</s>"])
def test_an_assistant_turn_at_the_end_is_continued(started):
    question = {"role": "user", "content": "6*7?"}
    chat = [question, {"role": "assistant", "content": started}]
    for prompt in (chat, splice_prompt(chat, "41")):
        assert encoded(prompt).endswith("<|im_end|>\n<|im_start|>assistant\n" + started)
    done = [*chat, question]
    assert encoded(done).endswith("6*7?<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize("are_special", [True, False])
@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_completions_text_has_its_thinking_marks_and_no_other_special_token(marks, are_special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=are_special) for mark in marks])
    opened, closed = marks
    text = f"<|im_start|>{opened}7?{closed} 8<|im_end|></s>"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len("7? 8") + 5
    assert decode_completion(ids, tokenizer) == f"{opened}7?{closed} 8"
    assert strip_thinking(decode_completion(ids, tokenizer), open=opened, close=closed) == "8"
    assert decode_completion(ids[:-4], tokenizer) == f"{opened}7?{closed}"
    assert decode_completion(tokenizer("8<|im_end|>")["input_ids"], tokenizer) == "8"
    assert decode_completion([], tokenizer) == ""


def test_marks_that_the_tokenizer_does_not_know_leave_unknown_tokens_hidden():
    vocabulary = {name: i for i, name in enumerate(["<unk>", *map(chr, range(32, 127))])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert decode_completion([0, vocabulary["8"], 0], tokenizer) == "8"


def test_token_ids_are_taken_as_they_are():
    assert encode_prompt([5, 1, 0], make_tokenizer("<s> $A </s>")) == [5, 1, 0]


def test_options_of_the_chat_template_leave_alone_what_each_prompt_sets():
    assert check_chat_template_kwargs(None) == {}
    assert check_chat_template_kwargs({"thinks": False}) == {"thinks": False}
    with pytest.raises(ValueError, match="must not set add_generation_prompt, tokenize"):
        check_chat_template_kwargs({"tokenize": False, "add_generation_prompt": True})
    with pytest.raises(TypeError, match="chat_template_kwargs must be a mapping, got list"):
        check_chat_template_kwargs([("thinks", False)])


def test_the_unknown_token_is_no_thinking_mark():
    """A tokenizer without such marks calls them its unknown token, which stays out of the text."""
    words = {"<unk>": 0, "7": 1, "8": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.convert_tokens_to_ids("<think>") == 0
    assert decode_completion([1, 0, 2], tokenizer) == "7 8"
