"""Samplers in each of their forms, and what they may not return."""

import asyncio
import math
import threading

import pytest
import torch

from igrpo_algo.prompts import check_prompts
from igrpo_algo.rollouts.completions import Completion, pack_completions, pad_completions
from igrpo_algo.rollouts.sampling import (
    Samples,
    run_blocking,
    sample_group,
    sample_one,
)
from igrpo_algo.seeds import derive_seed, prompt_seeds


def draw(prompt, n, seed):
    return [Completion([i], f"{prompt}/{i}/{seed}") for i in range(n)]


def plain(prompts, n, seed):
    seeds = seed or [None] * len(prompts)
    return [draw(p, n, s) for p, s in zip(prompts, seeds, strict=True)]


async def plain_async(prompts, n, seed):
    await asyncio.sleep(0)
    return plain(prompts, n, seed)


class Batch:
    def sample(self, prompts, n, *, seed=None):
        return plain(prompts, n, seed)


class AsyncBatch:
    async def sample(self, prompts, n, *, seed=None):
        await asyncio.sleep(0)
        return plain(prompts, n, seed)


class One:
    async def sample_one(self, prompt, n, *, seed=None):
        await asyncio.sleep(0)
        return draw(prompt, n, seed)


class Both(Batch, One):
    pass


FORMS = [plain, plain_async, Batch(), AsyncBatch(), One(), Both()]


@pytest.mark.parametrize("sampler", FORMS)
@pytest.mark.parametrize("seed", [None, 3, [7, 8]])
def test_each_form_of_sampler_draws_the_same(sampler, seed):
    samples = sample_group(["a", "b"], sampler, 2, seed=seed)
    drawn = plain(["a", "b"], 2, prompt_seeds(seed, 2))
    assert samples == Samples(["a", "b"], drawn, [None, None])


@pytest.mark.parametrize("sampler", FORMS)
@pytest.mark.parametrize("seed", [None, 9])
def test_each_form_draws_one_prompt_without_blocking(sampler, seed):
    assert asyncio.run(sample_one(sampler, "a", 3, seed)) == draw("a", 3, seed)


class Encoding(Batch):
    """One token a character; asked with ids, it draws text that shows them."""

    def encode(self, prompt):
        return [ord(letter) for letter in prompt]


def test_a_sampler_that_encodes_is_asked_with_ids_and_they_are_kept():
    samples = sample_group(["ab", "c"], Encoding(), 1, seed=[7, 8])
    assert samples.prompts == ["ab", "c"]
    assert samples.prompt_ids == [[97, 98], [99]]
    assert samples.texts == [["[97, 98]/0/7"], ["[99]/0/8"]]


@pytest.mark.parametrize("ids", [{"input_ids": [1]}, "1", [1.0], torch.tensor([1])])
def test_what_encode_gives_must_be_token_ids(ids):
    sampler = Encoding()
    sampler.encode = lambda prompt: ids
    with pytest.raises(TypeError, match="the result of encode"):
        sample_group(["a"], sampler, 1)


def test_a_blocking_sampler_runs_off_the_loop_and_only_there():
    threads = []

    def sampler(prompts, n, seed):
        threads.append(threading.current_thread())
        return plain(prompts, n, seed)

    asyncio.run(sample_one(sampler, "a", 1, None))
    sample_group(["a"], sampler, 1)
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()


def test_works_inside_a_running_loop():
    async def notebook():
        return sample_group(["a"], One(), 1, seed=0)

    assert asyncio.run(notebook()) == sample_group(["a"], One(), 1, seed=0)


def test_run_blocking_passes_errors_on_inside_a_running_loop():
    async def fails():
        raise KeyError("lost")

    async def notebook():
        run_blocking(fails())

    with pytest.raises(KeyError, match="lost"):
        asyncio.run(notebook())


def test_no_prompts_give_no_samples_and_no_call():
    def sampler(prompts, n, seed):
        raise AssertionError("called")

    samples = sample_group([], sampler, 4)
    assert samples == Samples([], [], [])
    assert samples.padded().ids.shape == (0, 0)
    assert samples.packed().cu_seqlens.tolist() == [0]
    assert samples.owner.shape == (0,)


def test_a_prompts_seed_depends_on_its_place_alone():
    assert prompt_seeds(5, 3) == prompt_seeds(5, 7)[:3]
    assert len(set(prompt_seeds(5, 100) + prompt_seeds(6, 100))) == 200
    assert all(0 <= seed < 2**63 for seed in prompt_seeds(2**63, 50))
    assert derive_seed(1, 23) != derive_seed(12, 3)


def test_seeds_do_not_change_between_versions():
    assert derive_seed(0, 1, 2) == 603432347784401458


@pytest.mark.parametrize(
    "prompts",
    [["text"], [[{"role": "user", "content": "q"}]], [[1, 2, 3]], ["text", [1]], ("text",)],
)
def test_prompts_of_each_kind(prompts):
    assert check_prompts(prompts) == list(prompts)


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ("text", "prompts must be a list of prompts, got str 'text'"),
        (3, "prompts must be a list of prompts, got int 3"),
        ([1, 2], r"prompts\[0\] must be a string, or a non-empty list"),
        (["a", []], r"prompts\[1\] must be a string"),
        (["a", [1, "b"]], r"prompts\[1\] must be a string"),
        ([torch.tensor([1])], r"prompts\[0\] .* int64 tensor of shape \[1\]"),
    ],
)
def test_what_is_no_prompt(prompts, match):
    with pytest.raises(TypeError, match=match):
        sample_group(prompts, plain, 1)


@pytest.mark.parametrize(
    "broken",
    [
        "1 + \ud800?",
        [{"role": "user", "content": "\udfff"}],
        [{"role": "user", "content": [{"type": "text", "text": "a\ud800"}]}],
    ],
)
def test_half_a_character_is_named_by_its_prompt(broken):
    with pytest.raises(ValueError, match=r"prompts\[1\] holds '\\ud[8f].*half of a character"):
        sample_group(["\U0001f600 whole", broken], plain, 1)


@pytest.mark.parametrize(
    ("returned", "error", "match"),
    [
        ([[]], ValueError, "1 groups for 2 prompts"),
        (
            [[Completion([], "")] * 2, [Completion([], "")]],
            ValueError,
            "n = 2 .* got 1 for prompt 1",
        ),
        ([[Completion([], "")] * 3] * 2, ValueError, r"n = 2 .* got 3 for prompt 0"),
        ("text", TypeError, "must return a list of groups, got str"),
        (None, TypeError, "must return a list of groups, got NoneType"),
        (["ab", "cd"], TypeError, "list of completions per prompt, got str 'ab' for prompt 0"),
        ([["a", "b"]] * 2, TypeError, "must return Completion values, got str 'a' for prompt 0"),
    ],
)
def test_what_a_sampler_may_not_return(returned, error, match):
    with pytest.raises(error, match=match):
        sample_group(["a", "b"], lambda prompts, n, seed: returned, 2)


def test_one_prompt_with_a_wrong_count():
    class Short:
        async def sample_one(self, prompt, n, *, seed=None):
            return []

    with pytest.raises(ValueError, match="n = 2 completions per prompt, got 0"):
        asyncio.run(sample_one(Short(), "a", 2, None))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((["a"], plain, 0), ValueError, "n must be >= 1, got 0"),
        ((["a"], plain, 1.0), TypeError, "n must be an int, got float 1.0"),
        ((["a"], "plain", 1), TypeError, "sampler must have sample"),
    ],
)
def test_wrong_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        sample_group(*arguments)


def test_as_many_seeds_as_prompts():
    with pytest.raises(ValueError, match="one int per prompt: 1 for 2 prompts"):
        sample_group(["a", "b"], plain, 1, seed=[1])


def test_log_probs_are_one_per_token():
    with pytest.raises(ValueError, match="1 log-probs for 2 token_ids"):
        Completion([1, 2], "", [0.0])


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_log_probs_are_finite(broken):
    with pytest.raises(ValueError, match=f"logprobs must be finite, got {broken} for token 1"):
        Completion([1, 2, 3], "", [-0.5, broken, broken])


COMPLETIONS = [
    Completion([4, 5, 6], "a", [-0.5, -1.0, -2.0]),
    Completion([], "", []),
    Completion([7], "b", [-4.0]),
]


def test_padded_layout():
    padded = pad_completions(COMPLETIONS, pad_token_id=9)
    assert padded.ids.tolist() == [[4, 5, 6], [9, 9, 9], [7, 9, 9]]
    assert padded.mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]
    assert padded.logprobs.tolist() == [[-0.5, -1.0, -2.0], [0.0] * 3, [-4.0, 0.0, 0.0]]
    assert [t.dtype for t in padded] == [torch.int64, torch.bool, torch.float32]


def test_packed_layout_holds_what_the_padded_one_holds():
    packed, padded = pack_completions(COMPLETIONS), pad_completions(COMPLETIONS)
    assert packed.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert [t.dtype for t in packed] == [torch.int64, torch.int32, torch.float32]
    assert packed.ids.tolist() == padded.ids[padded.mask].tolist()
    assert packed.logprobs.tolist() == padded.logprobs[padded.mask].tolist()


def test_missing_log_probs_are_not_made_up():
    mixed = [*COMPLETIONS, Completion([1], "c")]
    assert pad_completions(mixed).logprobs is None
    assert pack_completions(mixed).logprobs is None


def test_samples_are_prompt_major():
    samples = Samples(["p", "q"], [COMPLETIONS[:2], COMPLETIONS[2:]], [[1], [2]])
    assert samples.flat == COMPLETIONS
    assert samples.owner.tolist() == [0, 0, 1]
    assert samples.texts == [["a", ""], ["b"]]
    assert samples.padded(pad_token_id=3).ids[2].tolist() == [7, 3, 3]
    assert samples.packed().ids.tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize("seed", [1.5, "a", True, ["a", "b"], {0, 1}])
def test_what_is_no_seed_is_named(seed):
    with pytest.raises(TypeError, match="seed must be an int or a list of them, got"):
        sample_group(["a", "b"], plain, 1, seed=seed)


def test_the_class_of_a_sampler_is_no_sampler():
    with pytest.raises(TypeError, match="sampler must be an instance, got the class Batch"):
        sample_group(["a"], Batch, 1)
