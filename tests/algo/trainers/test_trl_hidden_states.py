"""Log-probs from the hidden states inside the model's forward, against TRL's and against logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from tiny_qwen import make_model, third_party
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from trl import GRPOTrainer

from igrpo_algo.trainers.trl.hidden_states import HeadInput, add_head_argument
from igrpo_kernels import linear_token_logprobs

pytestmark = third_party
MakeTrainer = Callable[..., Any]
SMALL = make_model().config.to_dict() | {"model_type": None}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
SIZE = {"vocab_size": 99, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}


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
    options = {"model_type": "qwen3_moe", "output_router_logits": False}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL | EXPERTS | options))


def gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(**SIZE, n_embd=16, n_layer=2, n_head=2, n_positions=64))


def opt() -> PreTrainedModel:
    sizes = {"hidden_size": 16, "ffn_dim": 32, "word_embed_proj_dim": 16, "num_hidden_layers": 2}
    return OPTForCausalLM(OPTConfig(**SIZE, **sizes, num_attention_heads=2))


MODELS = {
    "untied": qwen,
    "tied": lambda: qwen(tie_word_embeddings=True),
    "bias": with_bias,
    "softcap": gemma,
    "logit_scale": cohere,
    "experts": experts,
}


def scores(trainer: Any, *, by_trl: bool) -> list[Tensor]:
    """Log-probs, entropies, balancing loss, and gradients of a mixture of the three."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 99, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    kind = GRPOTrainer if by_trl else type(trainer)
    logprobs, entropy, aux_loss = kind._get_per_token_logps_and_entropies(
        trainer,
        trainer.model,
        ids,
        mask,
        5,
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
    )
    counted = mask[:, -5:].bool()
    logprobs, entropy = (x.masked_fill(~counted, 0) for x in (logprobs, entropy))
    upstream = torch.linspace(-1.0, 2.0, logprobs.numel()).view_as(logprobs)
    parts = [logprobs.detach(), entropy.detach()]
    value = ((logprobs + 0.3 * entropy) * upstream).sum()
    if aux_loss is not None:
        parts.append(aux_loss.detach())
        value = value + aux_loss
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    return [*parts, *torch.autograd.grad(value, trained)]


@pytest.mark.parametrize("name", MODELS)
def test_one_forward_equals_trl(make_trainer: MakeTrainer, name: str) -> None:
    torch.manual_seed(0)
    # TRL's entropy has a gradient only where an entropy bonus is on, in 1.14.
    trainer = make_trainer(model=MODELS[name](), temperature=0.7, entropy_coef=0.1)
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight.mul_(10)  # far enough from uniform
    theirs, ours = scores(trainer, by_trl=True), scores(trainer, by_trl=False)
    assert len(ours) == len(theirs)
    assert trainer.aux_loss_enabled is (name == "experts")
    assert max(float(gradient.abs().max()) for gradient in theirs[3:]) > 1e-2
    assert float(theirs[0].std()) > 0.1
    # Sums over 99 logits and 13 tokens run in another order: float32 rounding of the largest.
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5 * float(other.abs().max()))


def test_chunks_of_rows_are_put_together(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer()
    ids = torch.randint(4, 99, (5, 8), generator=torch.Generator().manual_seed(0))
    mask, whole = torch.ones_like(ids), None
    for batch_size in (None, 2):
        found = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, mask, 4, batch_size=batch_size, compute_entropy=True
        )
        whole = found if whole is None else whole
        assert found[2] is None
        for mine, other in zip(found[:2], whole[:2], strict=True):
            assert mine.shape == (5, 4)
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)  # other batch sizes


@pytest.mark.parametrize("cast_lm_head_to_fp32", [False, True])
def test_under_autocast_and_with_a_head_in_fp32(
    make_trainer: MakeTrainer, cast_lm_head_to_fp32: bool
) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(model=qwen(), cast_lm_head_to_fp32=cast_lm_head_to_fp32)
    exact = scores(trainer, by_trl=False)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scores(trainer, by_trl=False)
    assert rounded[0].dtype == torch.float32
    assert not torch.equal(rounded[0], exact[0])
    # bfloat16 has 2^-9 relative, through two layers and the head; logits are of order 0.1.
    for mine, other in zip(rounded[:2], exact[:2], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-2)


def test_a_head_of_another_dtype_than_the_trunk(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(model=qwen())
    trainer.model.lm_head.to(torch.bfloat16)
    found = scores(trainer, by_trl=False)
    assert [g.dtype for g in found[2:]] == [p.dtype for p in trainer.model.parameters()]


@pytest.mark.parametrize("make", [qwen, gpt2, opt], ids=["qwen3", "gpt2", "opt"])
def test_left_padding_shifts_no_position_trl_6800(
    make_trainer: MakeTrainer, make: Callable[[], PreTrainedModel]
) -> None:
    torch.manual_seed(0)
    trainer = make_trainer(model=make())
    trainer.model.eval()
    found = []
    for padding in (0, 4):
        ids = torch.tensor([[0] * padding + [10, 11, 12, 13, 20, 21, 22]])
        mask = (torch.arange(ids.shape[1]) >= padding).long()[None]
        with torch.no_grad():
            found.append(trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 3)[0])
            logits = trainer.model(ids[:, padding:]).logits[:, -4:-1]
    by_hand = logits.log_softmax(-1).gather(-1, torch.tensor([[[20], [21], [22]]]))[..., 0]
    for each in found:  # padded attention sums in another order: float32 rounding
        torch.testing.assert_close(each, by_hand, rtol=1e-5, atol=1e-5)


def test_the_forward_without_a_head_is_the_one_it_was() -> None:
    model, of_class = qwen().eval(), Qwen3ForCausalLM.forward
    ids = torch.tensor([[5, 6, 7]])
    before = model(ids).logits
    drawn = model.generate(ids, max_new_tokens=3, do_sample=False)
    add_head_argument(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=3, do_sample=False), drawn)
    assert Qwen3ForCausalLM.forward is of_class  # no other model has changed


def hidden_of(model: Any, ids: Tensor) -> HeadInput:
    seen: list[HeadInput] = []

    def keep(given: HeadInput) -> dict[str, Tensor]:
        seen.append(given)
        return {}

    model(input_ids=ids, attention_mask=torch.ones_like(ids), head=keep)
    return seen[0]


def test_tokens_that_a_prompt_learner_puts_in_front_shift_nothing() -> None:
    model = qwen().eval()
    add_head_argument(model)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    wrapped = get_peft_model(model, config).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    given = hidden_of(wrapped, ids)
    scored = linear_token_logprobs(given.hidden[:, -3:-1], given.weight, ids[:, -2:])
    logits = wrapped(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -3:-1]
    by_hand = logits.log_softmax(-1).gather(-1, ids[:, -2:, None])[..., 0]
    torch.testing.assert_close(scored, by_hand, rtol=1e-5, atol=1e-6)


def test_trainable_tokens_of_a_tied_head_are_trained(make_trainer: MakeTrainer) -> None:
    adapter = LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[*range(50)], task_type="CAUSAL_LM"
    )
    torch.manual_seed(0)
    trainer = make_trainer(
        model=qwen(tie_word_embeddings=True), peft_config=adapter, learning_rate=1e-1, beta=0.1
    )
    (tokens,) = (p for n, p in trainer.model.named_parameters() if n.endswith("delta.default"))
    before = tokens.detach().clone()
    trainer.train()
    assert not torch.equal(tokens, before)
    ids = torch.tensor([[5, 6, 7, 8]])
    mask = torch.ones_like(ids)
    trainer.model.eval()
    found = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 2)[0]
    logits = trainer.model(ids).logits[:, -3:-1]
    by_hand = logits.log_softmax(-1).gather(-1, ids[:, -2:, None])[..., 0]
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-6)  # two products in float32


@pytest.mark.parametrize("use_trl_loss", [True, False])
def test_an_adapter_on_the_head_is_refused_not_ignored_trl_4612(
    make_trainer: MakeTrainer, use_trl_loss: bool
) -> None:
    adapter = LoraConfig(r=2, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        make_trainer(peft_config=adapter, use_trl_loss=use_trl_loss)


def test_zero_3_scores_with_gradients_through_trl(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from igrpo_algo.trainers.trl import policy_loss

    trainer, asked = make_trainer(), []
    monkeypatch.setattr(policy_loss, "is_deepspeed_zero3_enabled", lambda: True)

    def trl(self: Any, *args: Any, **options: Any) -> tuple[str, None, None]:
        asked.append(options)
        return "trl's", None, None

    monkeypatch.setattr(GRPOTrainer, "_get_per_token_logps_and_entropies", trl)
    ids = torch.tensor([[5, 6, 7, 8]])
    score = trainer._get_per_token_logps_and_entropies
    assert score(trainer.model, ids, torch.ones_like(ids), 2)[0] == "trl's"
    with torch.no_grad():  # the weight is there for the whole forward
        assert score(trainer.model, ids, torch.ones_like(ids), 2)[0].shape == (1, 2)
    assert len(asked) == 1


def test_the_whole_step_takes_one_forward(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer, seen = make_trainer(max_steps=1), []
    forward = trainer.model.forward

    def counted(*args: Any, **options: Any) -> Any:
        if "head" in options:
            seen.append(torch.is_grad_enabled())
        return forward(*args, **options)

    trainer.model.forward = counted
    trainer.train()
    assert seen == [True]
