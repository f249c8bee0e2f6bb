"""Rewards in TRL's convention: what they are given, and what they may return."""

import asyncio
import math

import pytest
import torch
from trl.rewards import think_format_reward

from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.scoring import RewardError, Scorer

CHAT = [{"role": "user", "content": "q"}]
TWO = [Completion([1], "x"), Completion([2], "y")]


def score(reward, prompts=("a", "b"), columns=None, index=1, completions=TWO):
    return asyncio.run(Scorer(reward, prompts, columns or {})(index, completions))


def test_what_the_reward_is_given():
    calls = []

    def reward(**arguments):
        calls.append(arguments)
        return [1.0, 0.5]

    assert score(reward, columns={"answer": ["no", "yes"]}) == [1.0, 0.5]
    assert calls == [{"prompts": ["b", "b"], "completions": ["x", "y"], "answer": ["yes", "yes"]}]


def test_chat_completions_are_messages_as_in_trl():
    def reward(prompts, completions):
        assert prompts == [CHAT, CHAT]
        assert completions[0] == [{"role": "assistant", "content": "x"}]
        return think_format_reward(completions=completions)

    assert score(reward, prompts=[CHAT], index=0) == [0.0, 0.0]


def test_token_id_prompts_get_text():
    def reward(prompts, completions):
        return [float(prompts == [[1, 2]] * 2), float(completions == ["x", "y"])]

    assert score(reward, prompts=[[1, 2]], index=0) == [1.0, 1.0]


def test_coroutine_functions():
    async def reward(prompts, completions):
        await asyncio.sleep(0)
        return [2, 3]

    assert score(reward) == [2.0, 3.0]


@pytest.mark.parametrize("values", [[True, 0], (1.0, 0), torch.tensor([1.0, 0.0])])
def test_numbers_of_any_kind(values):
    assert score(lambda prompts, completions: values) == [1.0, 0.0]


def test_none_and_nan_are_unscored():
    values = score(lambda prompts, completions: [None, float("nan")])
    assert values[0] is math.nan
    assert values[1] is math.nan


def test_nothing_to_score_is_not_asked():
    def reward(prompts, completions):
        raise AssertionError("called")

    assert score(reward, completions=[]) == []


@pytest.mark.parametrize(
    ("values", "error", "match"),
    [
        ([1.0], ValueError, r"1 values for 2 completions of prompt 1 \('b'\)"),
        ([1.0] * 3, ValueError, "3 values for 2 completions"),
        ([1.0, math.inf], ValueError, r"must be finite.*got float inf on prompt 1"),
        ([-math.inf, 1.0], ValueError, "got float -inf"),
        ([1.0, 1e39], ValueError, r"finite in float32.*got float 1e\+39 on prompt 1"),
        ([1.0, 10**400], ValueError, "finite in float32.*got an int of 1329 bits on prompt 1"),
        ([1.0, "high"], TypeError, r"numbers or None, got str 'high' on prompt 1 \('b'\)"),
        (3.0, TypeError, r"reward must return a list of numbers, got float 3.0 on prompt 1"),
        (None, TypeError, r"reward must return a list of numbers, got None"),
        ("10", TypeError, r"reward must return a list of numbers, got str '10'"),
        (b"10", TypeError, r"reward must return a list of numbers, got bytes b'10'"),
        ({1.0: 0, 0.0: 1}, TypeError, r"reward must return a list of numbers, got dict"),
        ({1.0, 0.0}, TypeError, r"reward must return a list of numbers, got set"),
        ([1.0, "0"], TypeError, r"numbers or None, got str '0' on prompt 1 \('b'\)"),
    ],
)
def test_what_a_reward_may_not_return(values, error, match):
    with pytest.raises(error, match=match):
        score(lambda prompts, completions: values)


@pytest.mark.parametrize("is_async", [False, True])
def test_a_reward_that_raises_names_its_prompt(is_async):
    def reward(prompts, completions):
        raise ZeroDivisionError("no answer")

    async def async_reward(prompts, completions):
        reward(prompts, completions)

    with pytest.raises(
        RewardError, match=r"reward failed on prompt 0 \('x{60}'\.\.\.\): Zero"
    ) as e:
        score(async_reward if is_async else reward, prompts=["x" * 200], index=0)
    assert isinstance(e.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize(
    ("columns", "error", "match"),
    [
        ({"answer": ["1"]}, ValueError, r"columns\['answer'\] .* 1 values for 2 prompts"),
        ({"answer": "12"}, TypeError, r"columns\['answer'\] must be a list, got str '12'"),
        ({"prompts": [1, 2]}, ValueError, "must not be named 'prompts'"),
        ({"completions": [1, 2]}, ValueError, "must not be named 'completions'"),
    ],
)
def test_wrong_columns(columns, error, match):
    with pytest.raises(error, match=match):
        score(lambda **_: [0.0, 0.0], columns=columns)


def test_a_column_is_not_lost_to_the_tokens_of_the_same_name():
    def reward(prompts, completions, completion_ids):
        return [0.0] * len(completions)

    reward.wants_completion_ids = True
    with pytest.raises(ValueError, match="must not be named 'completion_ids'"):
        score(reward, columns={"completion_ids": [[1], [2]]})


def test_a_reward_is_called():
    with pytest.raises(TypeError, match=r"selection_score must be callable, got float 1\.0"):
        Scorer(1.0, ["a"], {}, "selection_score")


def test_a_reward_may_change_what_it_is_given():
    def vandal(prompts, completions):
        prompts[0][0]["content"] = "changed"
        return [float(prompt[0]["content"] == "q") for prompt in prompts]

    chat = [{"role": "user", "content": "q"}]
    assert score(vandal, prompts=[chat], index=0) == [0.0, 1.0]
    assert chat == [{"role": "user", "content": "q"}]


def test_a_reward_that_raises_while_it_yields_names_its_prompt():
    def reward(prompts, completions):
        yield 1.0
        raise KeyError("answer")

    with pytest.raises(RewardError, match=r"reward failed on prompt 1 \('b'\): KeyError"):
        score(reward)


DRAWN = {0: [Completion([1], "w")], 2: TWO, 3: []}
LETTERS = ("a", "b", "c", "d")


def score_many(reward, **columns):
    return asyncio.run(Scorer(reward, LETTERS, columns).score(DRAWN))


def test_many_prompts_are_scored_in_one_call():
    calls = []

    def reward(**arguments):
        calls.append(arguments)
        return [1.0, None, 3.0]

    assert score_many(reward, answer=[1, 2, 3, 4]) == {0: [1.0], 2: [math.nan, 3.0], 3: []}
    assert calls == [
        {"prompts": ["a", "c", "c"], "completions": ["w", "x", "y"], "answer": [1, 3, 3]}
    ]


def raises(prompts, completions):
    if "c" in prompts:
        raise KeyError("answer")
    return [1.0] * len(prompts)


def too_few(prompts, completions):
    return [1.0] * (len(prompts) - ("c" in prompts))


def too_high(prompts, completions):
    return [math.inf if prompt == "c" else 1.0 for prompt in prompts]


@pytest.mark.parametrize(
    ("reward", "error", "match"),
    [
        (raises, RewardError, r"reward failed on prompt 2 \('c'\): KeyError\('answer'\)"),
        (too_few, ValueError, r"1 values for 2 completions of prompt 2 \('c'\)"),
        (too_high, ValueError, r"got float inf on prompt 2 \('c'\)"),
    ],
)
def test_the_prompt_at_fault_is_found_among_many(reward, error, match):
    with pytest.raises(error, match=match):
        score_many(reward)


def test_a_reward_that_fails_only_on_many_prompts_says_so():
    def reward(prompts, completions):
        if len(set(prompts)) > 1:
            raise MemoryError("too many")
        return [1.0] * len(prompts)

    with pytest.raises(RewardError, match="on 2 prompts together, and on none of them alone: Mem"):
        score_many(reward)


def test_an_engine_out_of_reach_is_not_blamed_on_the_reward():
    calls = []

    def reward(prompts, completions):
        calls.append(prompts)
        raise ConnectionRefusedError("the judge's server is down")

    with pytest.raises(ConnectionRefusedError, match="server is down"):
        score_many(reward)
    assert len(calls) == 1
