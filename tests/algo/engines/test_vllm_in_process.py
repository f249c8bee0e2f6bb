"""The sampler in process on a made-up vLLM; a real engine draws in tests/vllm."""

import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from fake_vllm_server import Letters

from igrpo_algo.engines.vllm import VllmSampler


class FakeLLM:
    """Gives every request the tokens 10, 11, 2."""

    def __init__(self, mode="processed_logprobs", logprob=-0.5, eos=None):
        model = SimpleNamespace(
            logprobs_mode=mode,
            max_model_len=64,
            try_get_generation_config=lambda: {"eos_token_id": eos},
        )
        self.llm_engine = self
        self.vllm_config = SimpleNamespace(model_config=model)
        self.logprob, self.requests, self.queue = logprob, [], {}

    def get_tokenizer(self):
        return Letters()

    def add_request(self, name, prompt, params, *, priority=0):
        self.queue[name] = prompt["prompt_token_ids"]
        self.requests.append(params)

    def abort_request(self, names):
        for name in names:
            self.queue.pop(name, None)

    def step(self):
        queue, self.queue = self.queue, {}
        ids = [10, 11, 2]
        steps = [{token: SimpleNamespace(logprob=self.logprob)} for token in ids]
        drawn = SimpleNamespace(token_ids=ids, logprobs=steps, finish_reason="stop")
        return [
            SimpleNamespace(
                request_id=name,
                finished=True,
                outputs=[drawn],
                prompt_token_ids=prompt,
                num_cached_tokens=None,
            )
            for name, prompt in queue.items()
        ]


@pytest.fixture(autouse=True)
def _vllm(monkeypatch):
    contents = {
        "vllm": {"LLM": FakeLLM, "SamplingParams": SimpleNamespace},
        "vllm.platforms": {"current_platform": SimpleNamespace(is_cpu=lambda: True)},
        "vllm.sampling_params": {"RequestOutputKind": SimpleNamespace(FINAL_ONLY=1)},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


def test_a_request_says_all_that_shapes_the_distribution():
    llm = FakeLLM(mode="raw_logprobs", eos=[7, 9])
    sampler = VllmSampler(llm, max_new_tokens=8, top_p=0.9, top_k=7, min_p=0.1)
    (completion,) = sampler.sample(["a"], 1, seed=[1])[0]
    assert completion.logprobs == [-0.5] * 3
    assert completion.text == Letters().decode([10, 11])
    (asked,) = llm.requests
    shape = (asked.temperature, asked.top_p, asked.top_k, asked.min_p)
    assert shape == (1.0, 0.9, 7, 0.1)
    assert (asked.stop_token_ids, asked.ignore_eos, asked.max_tokens) == ([7, 9, 2], True, 8)
    assert (asked.logprobs, asked.detokenize) == (0, False)


RAW, PROCESSED = "raw_logprobs", "processed_logprobs"


@pytest.mark.parametrize(
    ("options", "usable"),
    [
        ({}, {RAW, PROCESSED}),
        ({"temperature": 0.7}, {PROCESSED}),
        ({"top_p": 0.9}, {RAW}),
        ({"top_k": 5}, {RAW}),
        ({"min_p": 0.1}, {RAW}),
        ({"temperature": 0}, {RAW, PROCESSED, "raw_logits"}),
        ({"temperature": 0.7, "top_k": 5, "logprobs": False}, {RAW, PROCESSED, "raw_logits"}),
    ],
)
@pytest.mark.parametrize("mode", [RAW, PROCESSED, "raw_logits"])
def test_an_engine_must_give_log_probs_that_the_loss_can_compare(options, usable, mode):
    llm = FakeLLM(mode=mode)
    if mode in usable:
        sampler = VllmSampler(llm, max_new_tokens=8, **options)
        (completion,) = sampler.sample(["a"], 1, seed=0)[0]
        wanted = None if len(usable) == 3 else [-0.5] * 3
        assert completion.logprobs == wanted
        assert llm.requests[0].logprobs == (None if wanted is None else 0)
    else:
        with pytest.raises(ValueError, match=f"llm gives {mode}, which no loss can use"):
            VllmSampler(llm, max_new_tokens=8, **options)


@pytest.mark.parametrize("cut", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}])
def test_a_cut_away_from_temperature_one_is_refused_by_name(cut):
    with pytest.raises(ValueError, match=r"temperature = 1\.3 with top_p, top_k or min_p: vLLM"):
        VllmSampler(FakeLLM(), max_new_tokens=8, temperature=1.3, **cut)


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_log_probs_that_are_not_finite_are_never_handed_on(broken):
    sampler = VllmSampler(FakeLLM(logprob=broken), max_new_tokens=8)
    with pytest.raises(ValueError, match=f"logprobs must be finite, got {broken} for token 0"):
        sampler.sample(["a"], 1, seed=0)


def test_without_vllm_the_sampler_in_process_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"VllmSampler needs vLLM.*pip install vllm"):
        VllmSampler("some/folder", max_new_tokens=4)
