"""What adapters refuse, in the same words."""

from types import SimpleNamespace

import pytest

from igrpo_algo.trainers.refusals import refuse_long, refuse_media, refuse_on, refuse_templated

TOKENIZER = SimpleNamespace(
    all_special_tokens=["<end>"], added_tokens_decoder={}, chat_template=None, unk_token_id=None
)


@pytest.mark.parametrize("value", [True, "a name", [len], {"path": "x"}])
def test_an_option_that_contradicts_drafts_must_be_off(value: object) -> None:
    for off in (False, None, "", [], {}):
        refuse_on("turns", off, "a draft is one answer")
    with pytest.raises(ValueError, match=r"^turns must be off: a draft is one answer$"):
        refuse_on("turns", value, "a draft is one answer")


def test_a_prompt_that_fits_is_left_alone() -> None:
    refuse_long(7, 7, "raise max_len")
    refuse_long(7, None, "raise max_len")
    message = "prompt has 8 tokens, and there is room for 7: raise max_len, since a question"
    with pytest.raises(ValueError, match=message):
        refuse_long(8, 7, "raise max_len")


def test_images_are_refused() -> None:
    refuse_media([])
    with pytest.raises(ValueError, match="images, videos and audios can't be combined with drafts"):
        refuse_media(["x.png"])


def test_a_string_with_a_template_around_it_is_refused() -> None:
    refuse_templated("1 + 1?", TOKENIZER, "leave it off")
    refuse_templated([{"role": "user", "content": "<end>"}], TOKENIZER, "leave it off")
    with pytest.raises(ValueError, match=r"'<end>' in it: .* turn; leave it off and give chat"):
        refuse_templated("1 + 1?<end>", TOKENIZER, "leave it off")
