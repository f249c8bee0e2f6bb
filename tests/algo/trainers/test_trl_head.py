"""Our op in TRL's fused head against TRL's own: one forward, a whole run, and what is refused."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_qwen import make_model, make_tokenizer, third_party
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl.trainer import utils as trl_utils

from igrpo_algo.trainers.trl import head as trl_head
from igrpo_algo.trainers.trl.head import choose_head, igrpo_head

pytestmark = third_party
MakeTrainer = Callable[..., Any]
SMALL = make_model().config.to_dict() | {"model_type": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def qwen(**options: Any) -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SMALL | {"model_type": "qwen3"} | options))


def with_bias() -> PreTrainedModel:
    model = qwen()
    model.lm_head = nn.Linear(16, SMALL["vocab_size"])
    nn.init.normal_(model.lm_head.weight, std=0.02)
    return model


def gemma() -> PreTrainedModel:
    sizes = {"final_logit_softcapping": 0.3, "sliding_window": 16, "layer_types": None}
    return Gemma2ForCausalLM(Gemma2Config(**SMALL | {"model_type": "gemma2"} | sizes))


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(
        CohereConfig(**SMALL | {"model_type": "cohere", "logit_scale": 0.5, "eos_token_id": 2})
    )


def experts() -> PreTrainedModel:
    options = {"model_type": "qwen3_moe", "output_router_logits": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL | EXPERTS | options))


MODELS = {
    "untied": qwen,
    "tied": lambda: qwen(tie_word_embeddings=True),
    "bias": with_bias,
    "softcap": gemma,
    "logit_scale": cohere,
    "experts": experts,
}


class Refusing:
    """Stands where TRL's op is."""

    @staticmethod
    def apply(*args: Any) -> None:
        raise AssertionError("TRL's op was called")


@pytest.fixture
def refuse_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Refusing)


def fused(model: PreTrainedModel, temperature: float = 0.7, **options: Any) -> PreTrainedModel:
    trl_utils.add_fused_lm_head(model, temperature, outputs=("log_probs", "entropy"), **options)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Ids, and labels with prompts of two lengths and a padded end left out."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 99, (3, 9), generator=generator)
    labels = ids.clone()
    labels[:, :3] = labels[1, :5] = labels[2, 7:] = -100
    return ids, labels


def scores_and_gradients(model: PreTrainedModel, entropy_coef: float) -> list[Tensor]:
    ids, labels = batch()
    out = model(input_ids=ids, labels=labels, fused_lm_head=True)
    upstream = torch.linspace(-1.0, 2.0, out.log_probs.numel()).view_as(out.log_probs)
    value = out.loss + ((out.log_probs + entropy_coef * out.entropy) * upstream).sum()
    gradients = torch.autograd.grad(value, list(model.parameters()))
    return [out.log_probs.detach(), out.entropy.detach(), out.loss.detach(), *gradients]


@pytest.mark.parametrize("entropy_coef", [0.0, 0.3])
@pytest.mark.parametrize("name", MODELS)
def test_one_forward_equals_trl(
    name: str, entropy_coef: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = fused(MODELS[name]())
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight.mul_(10)  # far enough from uniform
    theirs = scores_and_gradients(model, entropy_coef)
    monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Refusing)
    with igrpo_head():
        ours = scores_and_gradients(model, entropy_coef)
    assert max(float(gradient.abs().max()) for gradient in theirs[3:]) > 1e-2
    assert float(theirs[0].std()) > 0.1
    # Sums over 99 logits and 13 tokens run in another order: float32 rounding of the largest.
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * float(other.abs().max()))


@pytest.mark.parametrize("fp32_head", [False, True])
def test_under_autocast_and_with_a_head_in_fp32(fp32_head: bool) -> None:
    model = fused(qwen(), cast_lm_head_to_fp32=fp32_head)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = scores_and_gradients(model, 0.3)
        with igrpo_head():
            ours = scores_and_gradients(model, 0.3)
    assert ours[0].dtype == torch.float32
    # TRL rounds logits to bfloat16 (2^-9 relative), ours does not; neither does in fp32.
    tolerance = 1e-5 if fp32_head else 1e-2
    for mine, other in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    for mine, other in zip(ours[3:], theirs[3:], strict=True):
        # The trunk's gradients are bfloat16 sums in both: one unit in 2^6 of the largest.
        torch.testing.assert_close(mine, other, rtol=0, atol=float(other.abs().max()) / 64)


def test_a_head_of_another_dtype_than_the_trunk(refuse_trl: None) -> None:
    model = fused(qwen())
    model.lm_head.to(torch.bfloat16)
    with igrpo_head():
        ours = scores_and_gradients(model, 0.0)
    assert [g.dtype for g in ours[3:]] == [p.dtype for p in model.parameters()]


def test_positions_without_a_label_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[int] = []
    ours = trl_head._LogProbs.apply

    def counted(hidden: Tensor, *args: Any) -> Any:
        scored.append(len(hidden))
        return ours(hidden, *args)

    monkeypatch.setattr(trl_head._LogProbs, "apply", counted)
    with igrpo_head():
        scores_and_gradients(fused(qwen()), 0.0)
    assert scored == [6 + 4 + 4]  # completions of the three rows in `batch`


def test_a_batch_without_labels_gives_a_differentiable_zero() -> None:
    model = fused(qwen())
    ids, labels = batch()
    with igrpo_head():
        out = model(input_ids=ids, labels=torch.full_like(labels, -100), fused_lm_head=True)
    gradients = torch.autograd.grad(out.log_probs.sum(), list(model.parameters()))
    assert all(not gradient.any() for gradient in gradients)


def test_trl_has_its_op_back_after_an_error() -> None:
    kept = trl_utils._ChunkedLogProbFunction, trl_utils._use_triton
    with pytest.raises(ZeroDivisionError), igrpo_head():
        trl_utils._ChunkedLogProbFunction.apply(*[1 / 0] * 9)
    assert (trl_utils._ChunkedLogProbFunction, trl_utils._use_triton) == kept


def test_outputs_that_ours_lacks_are_named() -> None:
    model = qwen()
    trl_utils.add_fused_lm_head(model, outputs=("log_probs", "mean_logits", "is_top1"))
    ids, labels = batch()
    with igrpo_head(), pytest.raises(ValueError, match="is_top1, mean_logits"):
        model(input_ids=ids, labels=labels, fused_lm_head=True)


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("choice", "device", "chosen"),
    [
        ("auto", "cpu", igrpo_head),
        ("auto", "cuda", nullcontext),  # level with TRL's in the record
        ("igrpo", "cuda", igrpo_head),
        ("trl", "cpu", nullcontext),
    ],
)
def test_auto_takes_ours_where_a_record_has_it_faster(
    choice: str, device: str, chosen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_head(choice, nn.Linear(2, 3), torch.device(device)) is chosen


def test_a_head_in_float8_is_left_to_trl() -> None:
    head = nn.Linear(2, 3).requires_grad_(requires_grad=False).to(torch.float8_e4m3fn)
    assert choose_head("auto", head, CPU) is nullcontext
    with pytest.raises(ValueError, match=r"fused_head='igrpo'.*float8_e4m3fn"):
        choose_head("igrpo", head, CPU)


def test_zero_3_is_left_to_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_head, "is_deepspeed_zero3_enabled", lambda: True)
    assert choose_head("auto", nn.Linear(2, 3), CPU) is nullcontext
    with pytest.raises(ValueError, match=r"fused_head='igrpo'.*ZeRO-3"):
        choose_head("igrpo", nn.Linear(2, 3), CPU)


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    """A folder to load the reference model from."""
    make_model(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.mark.parametrize("entropy_coef", [0.0, 0.1])
def test_a_run_ends_where_trl_head_ends(
    make_trainer: MakeTrainer,
    saved_model: str,
    entropy_coef: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Old log-probs (two epochs per batch), reference log-probs, accumulation, and two updates."""
    ended, logged = {}, {}
    before = make_model(seed=1).state_dict()
    for fused_head in ("trl", "igrpo"):
        trainer = make_trainer(
            model=saved_model,
            fused_head=fused_head,
            beta=0.1,
            num_iterations=2,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            entropy_coef=entropy_coef,
            optim="sgd",  # Adam would blow up the rounding of gradients that are almost zero
            learning_rate=10.0,
            max_grad_norm=0.0,
        )
        if fused_head == "igrpo":
            monkeypatch.setattr(trl_utils, "_ChunkedLogProbFunction", Refusing)
        trainer.train()
        ended[fused_head] = trainer.model.state_dict()
        logs = [log for log in trainer.state.log_history if "reward" in log]
        logged[fused_head] = [(log["reward"], log["kl"], log["entropy"]) for log in logs]
    moved = [float((ended["trl"][name] - before[name]).abs().max()) for name in before]
    assert max(moved) > 1e-2
    # Rounding of fp32 log-probs (1e-7), through two updates of a learning rate of 10.
    for name, parameter in ended["trl"].items():
        torch.testing.assert_close(ended["igrpo"][name], parameter, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.tensor(logged["igrpo"]), torch.tensor(logged["trl"]), rtol=1e-3, atol=1e-5
    )


def test_the_run_takes_the_head_it_was_told(make_trainer: MakeTrainer, refuse_trl: None) -> None:
    with pytest.raises(AssertionError, match="TRL's op was called"):
        make_trainer(fused_head="trl").train()
    trainer = make_trainer(max_steps=1)
    trainer.train()
    assert trainer._scoring_head is igrpo_head
