"""Our loss inside the run against TRL's own, for each of its losses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from against_trl import compare_with_trl, loss_and_gradients, off_policy
from tiny_qwen import make_model, third_party
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl import GRPOTrainer

pytestmark = third_party
MakeTrainer = Callable[..., Any]

LOSSES: list[dict[str, Any]] = [
    {"loss_type": "grpo"},
    {"loss_type": "grpo", "epsilon": 0.01, "epsilon_high": 0.02, "delta": 1.03},
    {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "bnpo"},
    {"loss_type": "dr_grpo"},
    {"loss_type": "dapo", "epsilon_high": 0.28},
    {"loss_type": "dapo", "steps_per_generation": 4},
    {"loss_type": "dapo", "mask_truncated_completions": True, "max_completion_length": 24},
    {"loss_type": "cispo", "epsilon_high": 1.01},
    {"loss_type": "sapo"},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    {"loss_type": "vespo"},
    {"loss_type": "grpo", "entropy_coef": 0.1},
    {"loss_type": "grpo", "top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    {"loss_type": "dapo", "off_policy_mask_threshold": 0.001},
]

SIDES = ("low_mean", "high_mean", "region_mean", "low_min", "high_max")
CLIPS = {f"clip_ratio/{name}" for name in SIDES}
METRICS = {
    **dict.fromkeys(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"), {"entropy"} | CLIPS),
    "cispo": {"entropy", "cispo_clip_ratio"},
    "vespo": {"entropy", "vespo/phi_seq_mean"},
    "sapo": {"entropy"},
}


@pytest.mark.parametrize(
    "options", LOSSES, ids=lambda options: "-".join(map(str, options.values()))
)
def test_equals_trl_in_loss_and_gradient(
    make_trainer: MakeTrainer, options: dict[str, Any]
) -> None:
    compared = compare_with_trl(make_trainer(**off_policy(**options)))
    assert len(compared) == 4
    assert {name for each in compared for name in each} >= METRICS[options["loss_type"]]
    if "entropy_coef" in options:
        assert {"policy_loss", "entropy_coef"} <= {name for each in compared for name in each}


def test_what_is_clipped_is_logged_as_by_trl(make_trainer: MakeTrainer) -> None:
    options = off_policy(loss_type="dapo", epsilon=0.01, max_steps=4)
    compared = compare_with_trl(make_trainer(**options))
    for name in ("low_mean", "high_mean", "region_mean", "high_max"):
        assert any(each[f"clip_ratio/{name}"] > 0 for each in compared)


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "grpo"},
        {"loss_type": "dapo", "use_bias_correction_kl": True},
        {"loss_type": "sapo", "use_bias_correction_kl": True},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.01},
    ],
)
def test_equals_trl_with_a_kl_to_a_reference(
    make_trainer: MakeTrainer, saved_model: str, options: dict[str, Any]
) -> None:
    trainer = make_trainer(model=saved_model, beta=0.05, **off_policy(**options))
    assert len(compare_with_trl(trainer)) == 4
    steps = [log["kl"] for log in trainer.state.log_history if "kl" in log]
    assert steps[-1] > 1e-4


@pytest.mark.parametrize(
    ("loss_type", "by_token"), [("grpo", True), ("grpo", False), ("vespo", True)]
)
def test_weights_of_vllm_samples_are_those_of_trl(
    make_trainer: MakeTrainer, loss_type: str, by_token: bool
) -> None:
    """The correction that TRL computes where vLLM sampled, on a batch made up here."""
    trainer = make_trainer(loss_type=loss_type, max_steps=1)
    ours = trainer._compute_loss

    def both(model: Any, inputs: dict[str, Any]) -> Tensor:
        trainer.use_vllm = True
        shape = inputs["completion_ids"].shape if by_token else (8, 1)
        inputs["importance_sampling_ratio"] = torch.rand(shape) + 0.5
        inputs["importance_sampling_ratio"][0] = 0.0
        mine = loss_and_gradients(trainer, ours, inputs)
        theirs = loss_and_gradients(
            trainer, lambda *args: GRPOTrainer._compute_loss(trainer, *args), inputs
        )
        trainer.use_vllm = False
        for mine_each, theirs_each in zip(mine, theirs, strict=True):
            torch.testing.assert_close(mine_each, theirs_each, rtol=1e-5, atol=2e-7)
        seen.append(float(max(gradient.abs().max() for gradient in mine[1:])))
        return ours(model, inputs)

    seen: list[float] = []
    trainer._compute_loss = both
    trainer.train()
    assert seen[0] > 1e-3


def test_the_balancing_loss_of_experts_is_added(make_trainer: MakeTrainer) -> None:
    config = Qwen3MoeConfig(
        **make_model().config.to_dict()
        | {
            "model_type": "qwen3_moe",
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
            "router_aux_loss_coef": 0.5,
            "output_router_logits": False,
        }
    )
    trainer = make_trainer(model=Qwen3MoeForCausalLM(config), **off_policy(max_steps=1))
    compared = compare_with_trl(trainer)
    assert len(compared) == 2
    assert all(each["aux_loss"] > 0 for each in compared)
