"""The samplers over transformers' models, on a tiny Qwen3: log-probs, seeds, stops, weights."""

import asyncio
import math

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import PROMPTS, make_model, teacher_forced

from igrpo_algo.drafts.rules import DraftRules
from igrpo_algo.drafts.splice import TextSplice, TokenBudget
from igrpo_algo.drafts.text import DraftTemplate
from igrpo_algo.engines.static import StaticSampler
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.sampling import sample_group
from igrpo_algo.rollouts.two_stage import stream_two_stage_rollout, two_stage_rollout


@pytest.fixture(params=[TransformersSampler, StaticSampler])
def kind(request):
    return request.param


def test_the_sampler_says_what_a_prompt_is_to_its_model(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=4)
    assert sampler.encode(PROMPTS[2]) == [2, *tokenizer("2+2")["input_ids"], 3]
    assert sampler.control_tokens == {"<pad>", "<eos>", "<u>", "<a>"}
    options = {"chat_template": "{{ word }}{{ messages[0]['content'] }}[/QA]", "word": "<a>"}
    told = kind(model, tokenizer, max_new_tokens=4, chat_template_kwargs=options)
    assert told.encode(PROMPTS[2]) == [3, *tokenizer("2+2[/QA]")["input_ids"]]
    assert told.control_tokens == {*sampler.control_tokens, "[/QA]"}
    wrong = {"tokenize": True}
    with pytest.raises(ValueError, match="chat_template_kwargs must not set tokenize"):
        kind(model, tokenizer, max_new_tokens=4, chat_template_kwargs=wrong)


CUTS = [{"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.2}, {"top_p": 0.8, "top_k": 20, "min_p": 0.05}]


@pytest.mark.parametrize("cut", [{}, *CUTS], ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_ratio_of_the_policy_to_itself_is_one(kind, model, tokenizer, temperature, cut):
    """Whatever is cut, log-probs are those of the whole vocabulary, as a loss computes them."""
    sampler = kind(
        model,
        tokenizer,
        max_new_tokens=12,
        temperature=temperature,
        batch_size=5,  # groups straddle the batches
        **cut,
    )
    for prompt, group in zip(PROMPTS, sampler.sample(PROMPTS, 3, seed=0), strict=True):
        for completion in group:
            prompt_ids, ids = sampler.encode(prompt), completion.token_ids
            assert len(ids) > 0
            logprobs = teacher_forced(model, prompt_ids, ids, temperature)
            ratio = (logprobs - torch.tensor(completion.logprobs)).exp()
            # fp32, cached keys against one pass
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)


def kept(chances, cut):
    """Which tokens may be drawn: min_p, then top_k, then top_p of what is left, one by one."""
    left = chances.clone()
    left[left < cut.get("min_p", 0) * left.max()] = 0
    order = left.argsort(descending=True)
    left[order[cut.get("top_k") or len(left) :]] = 0
    left /= left.sum()
    mass = 0.0
    for token in order:
        if mass >= cut.get("top_p", 2.0):
            left[token] = 0
        mass += float(left[token])
    return left / left.sum()


@pytest.mark.parametrize("cut", [{}, *CUTS], ids=str)
def test_tokens_come_as_often_as_the_cut_distribution_says(kind, model, tokenizer, cut):
    sampler = kind(model, tokenizer, max_new_tokens=1, temperature=0.5, batch_size=2000, **cut)
    (group,) = sampler.sample([[9, 8, 7]], 2000, seed=1)
    drawn = torch.tensor([completion.token_ids[0] for completion in group])
    with torch.no_grad():
        chances = (model(torch.tensor([[9, 8, 7]])).logits[0, -1] / 0.5).softmax(-1)
    expected = kept(chances, cut)
    counts = torch.bincount(drawn, minlength=260)
    assert (counts[expected == 0] == 0).all()
    assert (expected == 0).any() == bool(cut)
    # Bernoulli deviation of each frequency; 260 tokens, so 5 of them is one chance in ten thousand
    deviation = (2000 * expected * (1 - expected)).sqrt().clamp(min=1)
    assert ((counts - 2000 * expected).abs() / deviation).max() < 5


def test_a_broken_model_gives_no_completion(kind, model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight[7] = math.nan
    sampler = kind(model, tokenizer, max_new_tokens=4)
    with pytest.raises(ValueError, match="logprobs must be finite, got nan for token 0"):
        sampler.sample(["q"], 1, seed=0)
    greedy = kind(model, tokenizer, max_new_tokens=4, temperature=0)
    with pytest.raises(ValueError, match="logits must be numbers, got nan"):
        greedy.sample(["q"], 1)


def test_seeds_fix_the_samples_whatever_the_batch(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=8, batch_size=16)
    apart = kind(model, tokenizer, max_new_tokens=8, batch_size=1)
    first = sampler.sample(PROMPTS, 3, seed=[1, 2, 3, 4])
    ids = [[c.token_ids for c in group] for group in first]
    assert [[c.token_ids for c in g] for g in apart.sample(PROMPTS, 3, seed=[1, 2, 3, 4])] == ids
    assert [c.token_ids for c in apart.sample(PROMPTS[2:3], 3, seed=[3])[0]] == ids[2]
    assert [[c.token_ids for c in g] for g in sampler.sample(PROMPTS, 3, seed=[1, 2, 3, 5])][
        :3
    ] == (ids[:3])
    assert (
        sampler.sample(PROMPTS, 3, seed=7) == sample_group(PROMPTS, sampler, 3, seed=7).completions
    )
    assert sampler.sample(PROMPTS, 3) != sampler.sample(PROMPTS, 3)
    assert len({tuple(c.token_ids) for c in first[0]}) == 3


def test_the_global_generator_is_neither_read_nor_moved(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=4)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = sampler.sample(PROMPTS, 2, seed=0)
    assert torch.get_rng_state().tolist() == before.tolist()
    torch.manual_seed(6)
    assert sampler.sample(PROMPTS, 2, seed=0) == first


def test_a_stop_token_ends_the_completion_and_is_its_last(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=40, batch_size=64)
    stops = kind(model, tokenizer, max_new_tokens=40, batch_size=64, stop_token_ids=range(1, 60))
    (free,), (stopped,) = sampler.sample(["q"], 64, seed=3), stops.sample(["q"], 64, seed=3)
    assert {c.finish_reason for c in stopped} == {"stop"}
    for whole, part in zip(free, stopped, strict=True):
        end = next(i for i, token in enumerate(whole.token_ids) if 0 < token < 60)
        assert part.token_ids == whole.token_ids[: end + 1]
        assert len(part.logprobs) == end + 1


def test_the_end_of_sequence_is_a_stop_and_not_in_the_text(kind, model, tokenizer):
    with torch.no_grad():
        model.lm_head.weight.zero_()
    sampler = kind(model, tokenizer, max_new_tokens=60, batch_size=64)
    assert sampler.stop_token_ids == [1]
    (group,) = sampler.sample([[5]], 64, seed=0)
    reasons = {c.finish_reason for c in group}
    assert reasons == {"stop", "length"}
    for completion in group:
        ended = completion.token_ids[-1] == 1
        assert completion.finish_reason == ("stop" if ended else "length")
        assert ended or len(completion.token_ids) == 60
        assert 1 not in completion.token_ids[:-1]
        assert "<eos>" not in completion.text
        assert completion.text == tokenizer.decode(
            [token for token in completion.token_ids if token > 3]
        )


@pytest.mark.parametrize(
    ("own", "stops"), [(7, [7, 1]), ([7, 9], [7, 9, 1]), ([1, 7], [1, 7]), ([], [1]), (None, [1])]
)
def test_the_end_of_sequence_is_the_generation_configs_and_the_tokenizers(
    kind, model, tokenizer, own, stops
):
    model.generation_config.eos_token_id = own
    sampler = kind(model, tokenizer, max_new_tokens=40, batch_size=64)
    assert sampler.stop_token_ids == stops
    with torch.no_grad():
        model.lm_head.weight.zero_()
    (group,) = sampler.sample([[5]], 64, seed=0)
    ended = {c.token_ids[-1] for c in group if c.finish_reason == "stop"}
    assert ended
    assert ended <= set(stops)
    assert not any(token in stops for c in group for token in c.token_ids[:-1])


def test_without_any_stop_token_every_completion_is_full(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=5, stop_token_ids=[])
    assert {c.finish_reason for c in sampler.sample(["q"], 9, seed=0)[0]} == {"length"}


def test_temperature_zero_is_greedy_and_has_no_log_probs(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=6, temperature=0)
    (group,) = sampler.sample([[9, 8, 7]], 2)
    ids = [9, 8, 7]
    for _ in group[0].token_ids:
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert [c.token_ids for c in group] == [ids[3:]] * 2
    assert [c.logprobs for c in group] == [None] * 2


def test_the_models_own_generation_config_is_not_applied_and_not_changed(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=8)
    plain = sampler.sample(PROMPTS, 2, seed=0)
    own = model.generation_config
    own.update(repetition_penalty=5.0, top_k=1, temperature=0.1, do_sample=True, min_new_tokens=7)
    before = own.to_dict()
    assert sampler.sample(PROMPTS, 2, seed=0) == plain
    assert model.generation_config is own
    assert own.to_dict() == before


def test_every_modules_mode_is_restored(kind, tokenizer):
    model = make_model(attention_dropout=0.9)
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    sampler = kind(model, tokenizer, max_new_tokens=4)
    first = sampler.sample(PROMPTS, 2, seed=0)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert sampler.sample(PROMPTS, 2, seed=0) == first
    model.train()
    model.lm_head = None
    with pytest.raises(TypeError, match="not callable"):
        sampler.sample(PROMPTS, 2, seed=0)
    assert all(module.training for module in model.modules())


def test_prompts_are_encoded_as_the_model_expects(kind, model, tokenizer):
    sampler = kind(model, tokenizer, max_new_tokens=4)
    assert sampler.encode([9, 8, 7]) == [9, 8, 7]
    assert tokenizer.decode(sampler.encode("1+1=")) == "1+1="
    assert tokenizer.decode(sampler.encode(PROMPTS[2])) == "<u>2+2<a>"


def test_two_stages_in_step_and_streamed_agree_and_cut_the_draft_not_the_question(
    kind, model, tokenizer
):
    sampler = kind(model, tokenizer, max_new_tokens=32, stop_token_ids=[])
    budget = TokenBudget(tokenizer, max_prompt_tokens=sampler.max_prompt_tokens)
    splice = TextSplice(DraftTemplate(" [", "]"), budget=budget)
    options = {"rules": DraftRules(splice=splice), "seed": 0}

    def reward(prompts, completions):
        return [float(len(completion)) for completion in completions]

    async def stream():
        groups = stream_two_stage_rollout(PROMPTS[:2], sampler, reward, **options)
        return Rollouts.of([group async for group in groups])

    in_step, streamed = (
        two_stage_rollout(PROMPTS[:2], sampler, reward, **options),
        asyncio.run(stream()),
    )
    for rollouts in (in_step, streamed):
        assert (rollouts.tokens_cut > 0).all()
        for question, prompt in zip(PROMPTS, rollouts.refinements.prompts, strict=False):
            assert prompt.startswith(question + " [")
            assert len(sampler.encode(prompt)) <= sampler.max_prompt_tokens
    assert streamed.refinements.prompts == in_step.refinements.prompts
    assert streamed.refinements.packed().ids.tolist() == in_step.refinements.packed().ids.tolist()


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        (["a", "b" * 61], r"prompts\[1\] has 61 tokens, wanted 1 to 60 .* max_new_tokens = 4"),
        (["a", ""], r"prompts\[1\] has 0 tokens"),
    ],
)
def test_prompts_that_do_not_fit(kind, model, tokenizer, prompts, match):
    with pytest.raises(ValueError, match=match):
        kind(model, tokenizer, max_new_tokens=4).sample(prompts, 1)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1.0}, ValueError, "temperature must be >= 0, got -1.0"),
        ({"top_p": 0.0}, ValueError, "top_p must be > 0, got 0.0"),
        ({"top_p": 1.1}, ValueError, "top_p must be <= 1, got 1.1"),
        ({"batch_size": 0}, ValueError, "batch_size must be >= 1, got 0"),
        ({"temperature": 0, "top_p": 0.9}, ValueError, "top_p has no effect at temperature 0"),
        ({"model": "gpt2"}, TypeError, "model must be one of transformers, got str 'gpt2'"),
        ({"tokenizer": None}, TypeError, "tokenizer must be one of transformers, got NoneType"),
        ({"stop_token_ids": ["x"]}, TypeError, r"stop_token_ids\[0\] must be an int, got str 'x'"),
    ],
)
def test_wrong_options(kind, model, tokenizer, options, error, match):
    with pytest.raises(error, match=match):
        kind(**{"model": model, "tokenizer": tokenizer, "max_new_tokens": 4, **options})


def test_n_is_at_least_one(kind, model, tokenizer):
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        kind(model, tokenizer, max_new_tokens=4).sample(["a"], 0)


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("form", ["state dict", "folder", "sharded folder"])
def test_weights_are_taken_over(kind, tokenizer, tmp_path, tie, form):
    sampler = kind(make_model(0, tie), tokenizer, max_new_tokens=6)
    trained = make_model(1, tie)
    expected = kind(trained, tokenizer, max_new_tokens=6).sample(PROMPTS, 2, seed=0)
    assert sampler.sample(PROMPTS, 2, seed=0) != expected
    if form == "state dict":
        sampler.sync_weights(trained.state_dict())
    else:
        size = "20KB" if form == "sharded folder" else "5GB"
        trained.save_pretrained(tmp_path, max_shard_size=size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (form == "sharded folder")
        sampler.sync_weights(tmp_path)
    assert sampler.sample(PROMPTS, 2, seed=0) == expected


def broken(weights, **changes):
    return {name: tensor for name, tensor in {**weights, **changes}.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lm_head.weight": None}, r"lacks 1 names: \['lm_head.weight'\]"),
        ({"adapter.weight": torch.zeros(2)}, r"1 unknown names: \['adapter.weight'\]"),
        (
            {"model.norm.weight": torch.zeros(3)},
            r"norm.weight'\] must have shape \[32\], got \[3\]",
        ),
    ],
)
@pytest.mark.parametrize("form", ["state dict", "folder"])
def test_a_failed_sync_leaves_the_old_weights_whole(
    kind, tokenizer, tmp_path, changes, match, form
):
    sampler = kind(make_model(0), tokenizer, max_new_tokens=6)
    before = sampler.sample(PROMPTS, 2, seed=0)
    weights = broken(make_model(1).state_dict(), **changes)
    if form == "folder":
        save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        sampler.sync_weights(weights if form == "state dict" else tmp_path)
    assert sampler.sample(PROMPTS, 2, seed=0) == before


def test_tied_weights_that_differ_are_refused(kind, tokenizer):
    sampler = kind(make_model(0, tie=True), tokenizer, max_new_tokens=6)
    weights = broken(
        make_model(1, tie=True).state_dict(), **{"lm_head.weight": torch.ones(260, 32)}
    )
    with pytest.raises(ValueError, match="are tied but differ"):
        sampler.sync_weights(weights)


def test_a_folder_without_weights(kind, model, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors file in"):
        kind(model, tokenizer, max_new_tokens=6).sync_weights(tmp_path)
