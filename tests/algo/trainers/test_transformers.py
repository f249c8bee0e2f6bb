"""Transformers models over rows with shared prompts, against each sequence run by itself."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_qwen import third_party
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    DynamicCache,
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from igrpo_algo.engines.decoding import cache_argument
from igrpo_algo.shared_prompt.packing import pack_shared_prompt
from igrpo_algo.trainers.transformers import enable_shared_prompt, shared_prompt_hidden
from igrpo_kernels import Clip, SequenceMean, linear_policy_loss, token_logprobs
from igrpo_kernels.loss_from_logprobs import policy_loss

pytestmark = third_party

# Weights wide enough that attention decides the log-probs: at the usual 0.02 all positions of a
# tiny model say nearly the same, and a wrong mask moves a log-prob by less than the tolerance.
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
WINDOW = 5
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"head_dim": 8}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": WINDOW}),
    "qwen2": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
PROMPT_SIZES = (9, 3)
COMPLETION_SIZES = ((7, 1, 12, 0, 6), (5,))


def make_model(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model, config, options = MODELS[name]
    return model(config(**SIZES | options))


def draw(*sizes: int) -> list[list[int]]:
    return [torch.randint(1, 64, (size,)).tolist() for size in sizes]


@pytest.fixture
def prompts() -> list[list[int]]:
    return draw(*PROMPT_SIZES)


@pytest.fixture
def completions() -> list[list[list[int]]]:
    return [draw(*sizes) for sizes in COMPLETION_SIZES]


def apart(model: PreTrainedModel, prompts: Any, completions: Any) -> list[Tensor]:
    """Log-probs of each completion, every sequence run by itself."""
    result = []
    for prompt, tails in zip(prompts, completions, strict=True):
        for tail in tails:
            logits = model(torch.tensor([prompt + tail]), use_cache=False).logits[0]
            targets = torch.tensor(tail, dtype=torch.int64)
            result.append(token_logprobs(logits[len(prompt) - 1 : -1], targets))
    return result


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(actual: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """To 1e-5 of the largest element of each parameter's gradient: fp32 sums in another order."""
    assert actual.keys() == exact.keys()
    for name, wanted in exact.items():
        assert wanted.abs().max() > 0, name
        within = 1e-5 * wanted.abs().max().item()
        torch.testing.assert_close(actual[name], wanted, rtol=0, atol=within)


def shared_logprobs(model: PreTrainedModel, prompts: Any, completions: Any) -> Tensor:
    (row,) = pack_shared_prompt(prompts, completions)
    inputs = row.loss_inputs(shared_prompt_hidden(model, row))
    return token_logprobs(model.get_output_embeddings()(inputs["hidden"]), inputs["targets"])


@pytest.mark.parametrize("name", MODELS)
def test_log_probs_and_gradients_are_those_of_sequences_apart(name, prompts, completions) -> None:
    model = make_model(name)
    wanted = torch.cat(apart(model, prompts, completions))
    weights = torch.randn_like(wanted)
    exact = gradients(model, (wanted * weights).sum())
    enable_shared_prompt(model)
    actual = shared_logprobs(model, prompts, completions)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, (actual * weights).sum()), exact)


@pytest.mark.parametrize("sizes", [(6,), (1,), (1, 1, 1)])
def test_one_completion_and_completions_of_one_token(sizes: tuple[int, ...]) -> None:
    model = make_model("mistral")
    prompts, completions = draw(4), [draw(*sizes)]
    wanted = torch.cat(apart(model, prompts, completions))
    enable_shared_prompt(model)
    actual = shared_logprobs(model, prompts, completions)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


def test_a_whole_step_in_several_rows_is_the_loss_over_sequences(prompts, completions) -> None:
    model = make_model("qwen3")
    advantages = torch.tensor([1.0, -0.5, 0.25, 3.0, -1.0, 0.75])
    logprobs = torch.nn.utils.rnn.pad_sequence(apart(model, prompts, completions), True)
    lengths = torch.tensor([len(tail) for tails in completions for tail in tails])
    mask = torch.arange(logprobs.shape[1]) < lengths[:, None]
    old = logprobs.detach() + 0.3 * torch.randn_like(logprobs)
    terms = {"surrogate": Clip(), "old_logprobs": old}
    wanted = policy_loss(logprobs, advantages, mask, aggregate=SequenceMean(), **terms).loss
    exact = gradients(model, wanted)
    enable_shared_prompt(model)
    rows = pack_shared_prompt(prompts, completions, max_tokens=25)
    assert [row.lengths for row in rows] == [((9, 7, 1),), ((9, 12, 0),), ((9, 6), (3, 5))]
    losses = [
        linear_policy_loss(
            **row.loss_inputs(shared_prompt_hidden(model, row)),
            weight=model.lm_head.weight,
            advantages=advantages[row.index],
            surrogate=Clip(),
            aggregate=SequenceMean(denominator=len(advantages)),
            old_logprobs=old[row.index][mask[row.index]],
        ).loss
        for row in rows
    ]
    torch.testing.assert_close(sum(losses), wanted, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, sum(losses)), exact)


def test_the_model_itself_gives_the_logits_of_the_targets(prompts, completions) -> None:
    model = make_model("llama")
    wanted = torch.cat(apart(model, prompts, completions))
    enable_shared_prompt(model)
    (row,) = pack_shared_prompt(prompts, completions)
    logits = model(**row.model_inputs(), logits_to_keep=row.predictors).logits[0]
    actual = token_logprobs(logits, row.targets)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpoints_run_the_same_attention(use_reentrant, prompts, completions) -> None:
    model = make_model("gemma3").train()
    enable_shared_prompt(model)
    exact = gradients(model, shared_logprobs(model, prompts, completions).sum())
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    actual = gradients(model, shared_logprobs(model, prompts, completions).sum())
    assert_same_gradients(actual, exact)


def test_adapters_train_on_shared_prompts(prompts, completions) -> None:
    adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(make_model("qwen3"), adapters)
    wanted = torch.cat(apart(model, prompts, completions))
    exact = gradients(model, wanted.sum())
    enable_shared_prompt(model)
    actual = shared_logprobs(model, prompts, completions)
    torch.testing.assert_close(actual, wanted, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, actual.sum()), exact)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_other_inputs_run_as_before(name: str) -> None:
    model = make_model(name).eval()
    ids, mask = torch.randint(1, 64, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        before = model(ids, attention_mask=mask).logits, model.generate(ids, **options)
        enable_shared_prompt(model)
        after = model(ids, attention_mask=mask).logits, model.generate(ids, **options)
    assert torch.equal(after[0], before[0])
    assert torch.equal(after[1], before[1])


class Sizes(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an op returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.largest = max(self.largest, part.numel())
        return result


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_no_mask_over_the_row_is_made(name: str) -> None:
    model = make_model(name)
    enable_shared_prompt(model)
    (row,) = pack_shared_prompt(draw(20), [draw(*[40] * 16)])
    with Sizes() as sizes:
        shared_prompt_hidden(model, row).sum().backward()
    assert 660 * 48 <= sizes.largest < 660**2 / 5  # the widest states; a mask is 13 times that


def refused(model: Any, config: Any, **options: Any) -> PreTrainedModel:
    return model(config(**SIZES | options))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            lambda: refused(Gemma2ForCausalLM, Gemma2Config),
            "Gemma2ForCausalLM with attn_logit",
        ),
        (lambda: refused(Qwen3NextForCausalLM, Qwen3NextConfig), "linear_attention"),
        (lambda: refused(Llama4ForCausalLM, Llama4TextConfig), "chunked_attention"),
        (lambda: refused(FalconForCausalLM, FalconConfig), "AttentionInterface, got Falcon"),
        (lambda: refused(LlamaForCausalLM, LlamaConfig, is_causal=False), "causal and free of"),
    ],
    ids=["softcap", "recurrent", "chunked", "no interface", "both ways"],
)
def test_models_that_cannot_share_are_refused(model, message) -> None:
    with pytest.raises(ValueError, match=message):
        enable_shared_prompt(model())


def test_sinks_are_refused_in_the_forward(prompts, completions) -> None:
    model = refused(GptOssForCausalLM, GptOssConfig, num_local_experts=2, num_experts_per_tok=1)
    enable_shared_prompt(model)
    with pytest.raises(ValueError, match="cannot be attended to with s_aux"):
        shared_logprobs(model, prompts, completions)


def test_a_model_that_was_not_enabled_is_refused(prompts, completions) -> None:
    model = make_model("llama")
    with pytest.raises(ValueError, match="given to enable_shared_prompt, got 'sdpa'"):
        shared_logprobs(model, prompts, completions)
    (row,) = pack_shared_prompt(prompts, completions)
    with pytest.raises(RuntimeError, match="must match the size of tensor b"):
        model(**row.model_inputs())


def test_inputs_that_do_not_belong_to_the_row_are_refused(prompts, completions) -> None:
    model = make_model("llama")
    enable_shared_prompt(model)
    (row,) = pack_shared_prompt(prompts, completions)
    inputs = row.model_inputs()
    with pytest.raises(ValueError, match=r"attention_mask must be that of SharedPromptRow"):
        model(**inputs | {"attention_mask": (row.input_ids > 5).long()})
    with pytest.raises(ValueError, match=r"attention_mask must be that of SharedPromptRow"):
        model(**inputs | {"attention_mask": None})  # transformers then makes a mask over the row
    two = {name: inputs[name].repeat(2, 1) for name in ("input_ids", "position_ids")}
    with pytest.raises(ValueError, match=r"must run by itself .* shape \[2, 4, 43, 8\]"):
        model(**inputs | two)
    cached = {cache_argument(type(model).forward): DynamicCache()}
    model(torch.tensor(prompts[:1]), use_cache=True, **cached)
    with pytest.raises(ValueError, match=r"without a cache, .* keys of shape \[1, 2, 52, 8\]"):
        model(**inputs | cached)
    for layer in model.get_decoder().layers:
        layer.self_attn.is_causal = False
    with pytest.raises(ValueError, match="LlamaAttention is not"):
        model(**inputs)
