"""What the sampler over static caches does besides: one prefill, rows that go, graphs."""

import contextlib
import math
import warnings
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import PROMPTS, make_model, teacher_forced
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from igrpo_algo.engines import static
from igrpo_algo.engines.decoding import cache_argument, draw, noise_of
from igrpo_algo.engines.static import StaticSampler

TINY = {
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}
WINDOWS = {"sliding_window": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**TINY)),
    "mistral, windows": lambda: MistralForCausalLM(MistralConfig(**TINY, **WINDOWS)),
    "gemma3, windows in one layer": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(**TINY, **WINDOWS, layer_types=["sliding_attention", "full_attention"])
    ),
    "qwen3, eager attention": lambda: make_model(attn_implementation="eager"),
}
SAME_LENGTH = [[9, 8, 7], [5, 6, 7]]


@pytest.mark.parametrize("prompts", [PROMPTS, SAME_LENGTH], ids=["padded", "not padded"])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS, indirect=False)
def test_log_probs_are_those_of_one_forward_pass(model, tokenizer, prompts):
    torch.manual_seed(0)
    model = model()
    sampler = StaticSampler(model, tokenizer, max_new_tokens=20, temperature=0.8)
    for prompt, group in zip(prompts, sampler.sample(prompts, 2, seed=0), strict=True):
        for completion in group:
            ids = completion.token_ids
            expected = teacher_forced(model, sampler.encode(prompt), ids, 0.8)
            # fp32: cached keys against one pass, added up in another order
            torch.testing.assert_close(
                torch.tensor(completion.logprobs), expected, rtol=0, atol=5e-5
            )


def calls_of(model):
    """Rows and columns of each forward pass from now on."""
    calls = []
    model.model.register_forward_pre_hook(
        lambda _, args, given: calls.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    return calls


def test_each_distinct_prompt_is_run_once(model, tokenizer):
    sampler = StaticSampler(model, tokenizer, max_new_tokens=2, stop_token_ids=[])
    calls = calls_of(model)
    groups = sampler.sample([*PROMPTS, PROMPTS[0], PROMPTS[1]], 3, seed=[1, 2, 3, 4, 1, 5])
    assert calls == [(4, 18), (18, 1)]
    assert groups[4] == groups[0]
    assert groups[5] != groups[1]


def test_rows_that_have_ended_are_dropped(model, tokenizer):
    sampler = StaticSampler(
        model, tokenizer, max_new_tokens=50, batch_size=64, stop_token_ids=range(1, 30)
    )
    calls = calls_of(model)
    (group,) = sampler.sample([[5]], 64, seed=0)
    lengths = [len(completion.token_ids) for completion in group]
    decoded = [rows for rows, _ in calls[1:]]
    assert len(decoded) == max(lengths) - 1
    alive = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    assert all(0.75 * rows < living <= rows for rows, living in zip(decoded, alive, strict=True))


@pytest.mark.parametrize(
    "model",
    [
        lambda: MambaForCausalLM(MambaConfig(vocab_size=260, hidden_size=32, num_hidden_layers=1)),
        lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**TINY, layer_types=["linear_attention"] * 2)),
    ],
)
def test_models_that_hold_something_else_than_keys_and_values_are_refused(model, tokenizer):
    with pytest.raises(ValueError, match=r"attention only, got (a state|linear_attention) in"):
        StaticSampler(model(), tokenizer, max_new_tokens=4)


def test_cuda_graph_is_a_flag(model, tokenizer):
    with pytest.raises(TypeError, match="cuda_graph must be True or False, got str 'no'"):
        StaticSampler(model, tokenizer, max_new_tokens=4, cuda_graph="no")


@given(
    weights=st.lists(st.integers(0, 9), min_size=1, max_size=12).filter(any),
    u=st.floats(0, 1, exclude_max=True),
)
def test_a_draw_inverts_the_cumulative_probabilities(weights, u):
    logprobs = torch.tensor([weights], dtype=torch.float64).log()
    token = int(draw(logprobs, torch.tensor([u], dtype=torch.float64)))
    below, total = sum(weights[:token]), sum(weights)
    # exp(log w) is off by parts in 1e15, so at a boundary either neighbor may come
    assert below - 1e-12 <= u * total <= below + weights[token] + 1e-12
    assert weights[token] > 0


def test_noise_is_each_seeds_own():
    both = noise_of([3, 4], 5)
    torch.testing.assert_close(
        both, torch.cat([noise_of([3], 5), noise_of([4], 5)]), rtol=0, atol=0
    )
    assert both.dtype == torch.float64
    assert len(both.unique()) == 10


# Graphs: captured on the GPU; on a CPU replayed by running the step again, with all the rest real.


class Replays:
    """Stands for a captured step; counts captures and replays."""

    def __init__(self):
        self.count = Counter()

    def capture(self, step, device):
        self.count["captured"] += 1
        step(), step()

        def replay():
            self.count["replayed"] += 1
            step()

        return replay


@pytest.fixture
def replays(monkeypatch):
    replays = Replays()
    monkeypatch.setattr(static, "capture", replays.capture)
    monkeypatch.setattr(static, "can_capture", lambda model: True)
    return replays


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request):
    """A CPU whose graphs are made up, or a GPU."""
    if request.param == "cpu":
        request.getfixturevalue("replays")
    return request.param


def pair(model, tokenizer, **options):
    """A sampler with graphs and one without, of the same model."""
    options = {"max_new_tokens": 20, "batch_size": 8, **options}
    with_graph = StaticSampler(model, tokenizer, **options)
    return with_graph, StaticSampler(model, tokenizer, cuda_graph=False, **options)


def assert_same(found, expected, atol):
    for group, other in zip(found, expected, strict=True):
        for one, two in zip(group, other, strict=True):
            assert (one.token_ids, one.text) == (two.token_ids, two.text)
            torch.testing.assert_close(
                torch.tensor(one.logprobs), torch.tensor(two.logprobs), rtol=0, atol=atol
            )


@pytest.mark.parametrize("cut", [{}, {"top_p": 0.8, "top_k": 20, "min_p": 0.05}], ids=str)
def test_a_graph_draws_what_the_step_without_it_draws(model, tokenizer, place, cut):
    captured, plain = pair(model.to(place), tokenizer, **cut)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompts in (PROMPTS, PROMPTS[:1], [[7] * 30], SAME_LENGTH):  # more room, and less
            drawn = captured.sample(prompts, 3, seed=4)
            assert_same(drawn, plain.sample(prompts, 3, seed=4), atol=5e-5)
    assert captured._captured is not None
    assert plain._captured is None


def test_a_graph_gives_the_log_probs_of_one_forward_pass(model, tokenizer, place):
    captured, _ = pair(model.to(place), tokenizer)
    for prompt, group in zip(PROMPTS, captured.sample(PROMPTS, 3, seed=0), strict=True):
        for completion in group:
            ids = torch.tensor([captured.encode(prompt) + completion.token_ids], device=place)
            logits = model.eval()(ids).logits[0, -len(completion.token_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(-1, ids[0, -len(logits) :, None]).squeeze(-1)
            drawn = torch.tensor(completion.logprobs, device=place)
            torch.testing.assert_close(drawn, expected.detach(), rtol=0, atol=5e-5)


def test_a_graph_sees_new_weights(model, tokenizer, place):
    captured, plain = pair(model.to(place), tokenizer)
    before = captured.sample(PROMPTS, 2, seed=0)
    graph = captured._captured
    captured.sync_weights(make_model(1).state_dict())
    after = captured.sample(PROMPTS, 2, seed=0)
    assert captured._captured is graph
    assert after != before
    assert_same(after, plain.sample(PROMPTS, 2, seed=0), atol=5e-5)


def test_weights_in_other_memory_are_captured_again(model, tokenizer, place):
    captured, plain = pair(model.to(place), tokenizer)
    captured.sample(PROMPTS, 2, seed=0)
    graph = captured._captured
    head = make_model(1).to(place).lm_head.weight
    model.lm_head.weight = head
    assert_same(captured.sample(PROMPTS, 2, seed=0), plain.sample(PROMPTS, 2, seed=0), atol=5e-5)
    assert captured._captured is not graph


def test_nan_of_a_broken_model_does_not_stay_in_the_cache(model, tokenizer, place):
    captured, plain = pair(model.to(place), tokenizer)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="logprobs must be finite, got nan for token 0"):
        captured.sample(PROMPTS, 2, seed=0)
    captured.sync_weights(make_model(1).state_dict())
    prompts = SAME_LENGTH  # shorter: slots that the broken model wrote are not written again
    assert_same(captured.sample(prompts, 2, seed=0), plain.sample(prompts, 2, seed=0), atol=5e-5)


def test_captures_are_few_and_every_token_but_the_first_is_a_replay(
    model, tokenizer, replays, monkeypatch
):
    monkeypatch.setattr(static, "SLOT_STEP", 8)
    sampler = StaticSampler(model, tokenizer, max_new_tokens=7, stop_token_ids=[])
    for rows in (3, 2, 3):
        sampler.sample([[9, 8, 7]], rows, seed=0)
    assert replays.count == {"captured": 1, "replayed": 3 * 6}
    sampler.sample([[9, 8, 7]], 4, seed=0)  # more rows
    sampler.sample([[9] * 9], 2, seed=0)  # as many slots as there are
    assert replays.count["captured"] == 2
    sampler.sample([[9] * 57], 2, seed=0)  # more slots
    assert replays.count["captured"] == 3
    assert sampler._captured.state.mask.shape == (4, 64)


def broken_capture(step, device):
    raise RuntimeError("operation not permitted when stream is capturing")


def test_a_capture_that_fails_is_said_once_and_decoding_goes_on(
    model, tokenizer, replays, monkeypatch
):
    monkeypatch.setattr(static, "capture", broken_capture)
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    sampler, plain = pair(model, tokenizer)
    with pytest.warns(UserWarning, match=r"could not be captured \(RuntimeError: operation not"):
        drawn = sampler.sample(PROMPTS, 2, seed=0)
    assert drawn == plain.sample(PROMPTS, 2, seed=0)
    assert waited == [model.device]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert sampler.sample(PROMPTS, 2, seed=0) == drawn


def test_without_cuda_nothing_is_captured(model, tokenizer, monkeypatch):
    monkeypatch.setattr(static, "capture", broken_capture)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert StaticSampler(model, tokenizer, max_new_tokens=3).sample([[5]], 1, seed=0)


def test_autocast_is_not_captured(monkeypatch):
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    steps = []
    with torch.autocast("cpu"), pytest.raises(RuntimeError, match="autocast is on"):
        static.capture(lambda: steps.append(1), torch.device("cpu"))
    assert not steps


@pytest.mark.gpu
def test_a_step_that_waits_for_the_gpu_falls_back(model, tokenizer):
    sampler, plain = pair(model.cuda(), tokenizer)
    model.model.norm.register_forward_hook(lambda *_: torch.ones(1, device="cuda").item() and None)
    with pytest.warns(UserWarning, match="StaticSampler decodes without a CUDA graph"):
        drawn = sampler.sample(PROMPTS, 2, seed=0)
    assert_same(drawn, plain.sample(PROMPTS, 2, seed=0), atol=5e-5)


@pytest.mark.gpu
def test_a_graph_in_bf16(model, tokenizer):
    captured, plain = pair(model.cuda().bfloat16(), tokenizer, batch_size=64)
    drawn, expected = (each.sample([[5]], 64, seed=0) for each in (captured, plain))
    first = [[row.token_ids[0] for row in group] for group in drawn]
    assert first == [[row.token_ids[0] for row in group] for group in expected]
    assert captured._captured is not None


def test_a_cache_is_given_under_the_name_that_the_model_has_for_it() -> None:
    """`cache` since transformers 5.24; a wrapper that takes anything hands the old name on."""

    class New:
        def forward(self, cache): ...

    class Old:
        def forward(self, past_key_values): ...

    class Wrapped:
        def forward(self, *args, **kwargs): ...

    names = [cache_argument(kind.forward) for kind in (New, Old, Wrapped)]
    assert names == ["cache", "past_key_values", "past_key_values"]
