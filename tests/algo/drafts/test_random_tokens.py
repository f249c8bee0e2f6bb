"""Random tokens in a draft's place."""

from igrpo_algo.cli.demo.model import build_tokenizer
from igrpo_algo.drafts.random_tokens import RandomTokens
from igrpo_algo.drafts.splice import TextSplice
from igrpo_algo.rollouts.completions import Completion


def test_as_many_tokens_none_of_them_special() -> None:
    tokenizer = build_tokenizer([" a", " b", " c", " d"])
    replace = RandomTokens(tokenizer)
    drawn: set[str] = set()
    for length in range(1, 40):
        text = replace(" b" * length)
        ids = tokenizer(text).input_ids
        assert len(ids) == length
        assert not set(ids) & set(tokenizer.all_special_ids)
        drawn |= set(tokenizer.convert_ids_to_tokens(ids))
    assert drawn == {" a", " b", " c", " d"}


def test_the_same_draft_gives_the_same_tokens_and_another_gives_others() -> None:
    replace = RandomTokens(build_tokenizer())
    drafts = ["12 4 0 0 2", "12 4 0 0 3", "1 2 3 4 5"]
    assert [replace(draft) for draft in drafts] == [replace(draft) for draft in drafts]
    assert len({replace(draft) for draft in drafts}) == 3
    assert not {replace(draft) for draft in drafts} & set(drafts)


def test_the_draft_is_counted_as_it_would_be_shown() -> None:
    tokenizer = build_tokenizer()
    thought = "<think>1 2 3</think>4 5"
    assert RandomTokens(tokenizer)(thought) == RandomTokens(tokenizer)("4 5")
    assert len(RandomTokens(tokenizer, None)(thought)) > len(RandomTokens(tokenizer)(thought))


def test_nothing_stands_for_an_empty_draft() -> None:
    splice = TextSplice(strip=RandomTokens(build_tokenizer()))
    assert splice("7 +5", Completion([], "")).draft == ""
