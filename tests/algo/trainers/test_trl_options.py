"""TRL's own options: honored, or refused by name before a model is loaded or sampled from."""

import re
from typing import Any

import pytest
from tiny_qwen import third_party

from igrpo_algo.trainers.trl import IGRPOConfig
from igrpo_algo.trainers.trl.trl_options import READ_WITH, UNREAD

pytestmark = third_party
NAN = float("nan")


def make(**options: Any) -> IGRPOConfig:
    return IGRPOConfig("out", bf16=False, report_to="none", use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": NAN}, "learning_rate must be >= 0, got nan"),
        ({"max_completion_length": 0}, "max_completion_length must be >= 1"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"top_p": 2.0}, "top_p must be <= 1"),
        ({"min_p": -0.1}, "min_p must be >= 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
        ({"beta": -0.1}, "beta must be >= 0"),
        ({"beta": NAN}, "beta must be >= 0, got nan"),
        ({"entropy_coef": NAN}, "entropy_coef must be finite"),
        ({"top_entropy_quantile": -1.0}, "top_entropy_quantile must be >= 0"),
        ({"top_entropy_quantile": 2.0}, "top_entropy_quantile must be <= 1"),
        ({"off_policy_mask_threshold": NAN}, "off_policy_mask_threshold must be finite"),
        ({"vllm_importance_sampling_clip_max": -1.0}, "clip_max must be > 0"),
        ({"vllm_importance_sampling_clip_min": -1.0}, "clip_min must be >= 0"),
        ({"data_seed": 1}, "data_seed would have no effect: seed gives"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length, got No"),
        ({"accelerator_config": {"dispatch_batches": True}}, "must leave dispatch_batches off"),
        ({"generation_kwargs": {"temperature": 0.1}}, "temperature = 0.1 where the loss takes arg"),
        ({"generation_kwargs": {"num_return_sequences": 2}}, "must not have num_return_sequences"),
        ({"generation_kwargs": {"n": 2}, "use_vllm": True}, "must not have n: num_refinements"),
        ({"generation_kwargs": {"stop_word": "."}}, "no effect with stop_word, which transformers"),
    ],
    ids=str,
)
def test_a_value_out_of_range_or_in_two_places_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.1),
        ("label_names", ["answer"]),
        ("train_sampling_strategy", "sequential"),
        ("length_column_name", "tokens"),
        ("batch_eval_metrics", True),
        ("log_multimodal", False),
        ("max_tool_calling_iterations", 1),
    ],
)
def test_what_no_group_of_text_reads_is_refused(name: str, value: Any) -> None:
    if name not in IGRPOConfig.__dataclass_fields__:
        pytest.skip(f"this TRL has no {name}")
    with pytest.raises(ValueError, match=f"{name} would have no effect: {re.escape(UNREAD[name])}"):
        make(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "switch"),
    [
        ("ref_model_mixup_alpha", 0.5, {"sync_ref_model": True}),
        ("ref_model_sync_steps", 8, {"sync_ref_model": True}),
        ("entropy_coef_min", 0.1, {"use_adaptive_entropy": True, "use_trl_loss": True}),
        ("entropy_coef_max", 0.5, {"use_adaptive_entropy": True, "use_trl_loss": True}),
        ("entropy_coef_delta", 0.1, {"use_adaptive_entropy": True, "use_trl_loss": True}),
        ("entropy_target", 0.5, {"use_adaptive_entropy": True, "use_trl_loss": True}),
        ("num_completions_to_print", 1, {"log_completions": True}),
        ("log_unique_prompts", True, {"log_completions": True}),
        (
            "transformers_continuous_batching_config",
            {"max_memory_percent": 0.4},
            {"use_transformers_continuous_batching": True},
        ),
    ],
)
def test_an_option_needs_the_one_that_reads_it(
    name: str, value: Any, switch: dict[str, bool]
) -> None:
    assert name in READ_WITH[next(iter(switch))]
    with pytest.raises(
        ValueError, match=f"{name} would have no effect with {next(iter(switch))}=False"
    ):
        make(**{name: value})
    assert getattr(make(**{name: value}, **switch), name) == value


def test_what_says_the_same_twice_is_taken() -> None:
    given = {"temperature": 0.7, "suppress_tokens": [3], "num_return_sequences": 1}
    args = make(temperature=0.7, data_seed=5, seed=5, generation_kwargs=given, entropy_coef=-0.1)
    assert (args.generation_kwargs, args.entropy_coef) == (given, -0.1)


def test_generation_kwargs_must_be_a_dict(tmp_path) -> None:
    with pytest.raises(TypeError, match="generation_kwargs must be a dict, got list"):
        IGRPOConfig(str(tmp_path), bf16=False, generation_kwargs=["temperature"])
