"""Loss mode `igrpo` beside verl's own clipped loss, alone and inside verl's `ppo_loss`."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import verl
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from igrpo_algo import policy_loss
from igrpo_algo.trainers.verl import igrpo_loss
from igrpo_kernels import K2, Reinforce, TokenMean

sys.path.insert(0, str(Path(__file__).parents[1]))
from differences import note_tensors

assert verl.__version__ == "0.9.1"

MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
WHOLE = {"dp_size": 2, "batch_num_tokens": 57, "global_batch_size": 11}


def make_config(mode: str = "token-mean", **settings: Any) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp2",
        rollout_n=4,
        use_dynamic_bsz=True,
        loss_agg_mode=mode,
        clip_ratio_high=0.28,
        **settings,
    )


def make_batch(seed: int, spread: float = 0.5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = 4, 9
    values = torch.randn(4, rows, tokens, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    old = -values[0].abs()
    return {
        "old_log_prob": old,
        "log_prob": old + spread * values[1],
        "advantages": values[2],
        "response_mask": torch.arange(tokens) < lengths,
        "rollout_is_weights": values[3].abs(),
    }


def run(mode: str, batch: dict[str, torch.Tensor], config: ActorConfig) -> tuple[Any, ...]:
    leaf = batch["log_prob"].clone().requires_grad_()
    loss, metrics = get_policy_loss_fn(mode)(
        **{**batch, "log_prob": leaf}, loss_agg_mode=config.loss_agg_mode, config=config
    )
    loss.backward()
    return loss.detach(), leaf.grad, metrics


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.sampled_from([0.3, 2.0]),
    mode=st.sampled_from(MODES),
    whole=st.booleans(),
    scale=st.sampled_from([None, 7]),
    weighted=st.booleans(),
)
def test_loss_gradient_and_metrics_are_those_of_verl(
    seed: int, spread: float, mode: str, whole: bool, scale: int | None, weighted: bool
) -> None:
    batch = make_batch(seed, spread)
    if not weighted:
        del batch["rollout_is_weights"]
    config = make_config(mode)
    config.global_batch_info.update(WHOLE if whole else {}, loss_scale_factor=scale)
    theirs = run("vanilla", batch, config)
    ours = run("igrpo", batch, config)
    # verl adds 1e-8 to each count of tokens; the rest is float64.
    for name, their, our in zip(("loss", "gradient"), theirs, ours, strict=False):
        note_tensors("verl", f"{name}; five aggregations, dual clip, weights", our, their)
        torch.testing.assert_close(our, their, atol=1e-7, rtol=1e-7)
    assert ours[2] == pytest.approx(theirs[2], abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_its_dro_is_reinforce_with_k2_against_the_policy_that_sampled(beta: float) -> None:
    """-(A log pi - beta / 2 log(r)^2): two parts that are there already."""
    batch = make_batch(1)
    del batch["rollout_is_weights"]  # verl weighs the penalty by them too
    config = make_config(policy_loss=PolicyLossConfig(loss_mode="dro", dro_beta=beta))
    theirs = run("dro", batch, config)
    leaf = batch["log_prob"].clone().requires_grad_()
    result = policy_loss(
        leaf,
        batch["advantages"],
        batch["response_mask"],
        surrogate=Reinforce(),
        aggregate=TokenMean(),
        ref_logprobs=batch["old_log_prob"],
        kl_coef=beta,
        kl=K2(),
    )
    result.loss.backward()
    # verl adds 1e-8 to its count of tokens.
    ours = (result.loss, leaf.grad)
    for name, their, our in zip(("loss", "gradient"), theirs, ours, strict=False):
        note_tensors("verl", f"{name} of its dro, as Reinforce with K2", our, their)
        torch.testing.assert_close(our.detach(), their, atol=1e-7, rtol=1e-7)


def test_what_stands_in_masked_slots_has_no_effect() -> None:
    batch = make_batch(3)
    clean = run("igrpo", batch, make_config())
    for name in ("log_prob", "old_log_prob", "advantages", "rollout_is_weights"):
        batch[name] = batch[name].masked_fill(~batch["response_mask"], torch.nan)
    loss, gradient, metrics = run("igrpo", batch, make_config())
    assert loss == clean[0]
    assert torch.equal(gradient, clean[1])
    assert metrics == clean[2]


@pytest.mark.parametrize(("mode", "count"), [("token-mean", "tokens"), (MODES[-1], "batch_size")])
def test_ranks_without_the_counts_of_the_whole_batch_are_refused(mode: str, count: str) -> None:
    config = make_config(mode)
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match=rf"{count} must be given with dp_size = 2"):
        run("igrpo", make_batch(0), config)
    with pytest.raises(ValueError, match="loss_agg_mode must be one of verl's, got 'mean'"):
        igrpo_loss(**make_batch(0), loss_agg_mode="mean", config=make_config())


@pytest.mark.parametrize("mode", MODES)
def test_ppo_loss_on_nested_tensors_is_the_same_with_either_mode(mode: str) -> None:
    """The engine hands over sequences of prompt and response; KL and entropy are verl's."""
    generator = torch.Generator().manual_seed(5)
    prompts, responses = [3, 5, 2], [4, 1, 6]

    def nested(lengths: list[int], scale: float = 1.0) -> torch.Tensor:
        rows = [scale * torch.randn(n, generator=generator) for n in lengths]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    def ones(lengths: list[int]) -> torch.Tensor:
        rows = [torch.ones(n, dtype=torch.int64) for n in lengths]
        return torch.nested.as_nested_tensor(rows, layout=torch.jagged)

    whole = [p + r for p, r in zip(prompts, responses, strict=True)]
    data = {
        "prompts": ones(prompts),
        "responses": ones(responses),
        "input_ids": ones(whole),
        "attention_mask": ones(whole),
        "response_mask": ones(responses),
        "old_log_probs": nested(responses),
        "advantages": nested(responses),
        "ref_log_prob": nested(responses),
    }
    values = torch.randn(sum(whole), generator=generator)
    results = []
    for loss_mode in ("vanilla", "igrpo"):
        policy_loss = PolicyLossConfig(loss_mode=loss_mode)
        config = make_config(mode, policy_loss=policy_loss, use_kl_loss=True, kl_loss_coef=0.1)
        leaf = values.clone().requires_grad_()
        offsets = torch.tensor([0, *whole]).cumsum(0)
        log_probs = torch.nested.nested_tensor_from_jagged(leaf, offsets)
        batch = tu.get_tensordict(dict(data), {**WHOLE, "max_response_len": 6})
        loss, _ = ppo_loss(config, {"log_probs": log_probs}, batch)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    for name, their, our in zip(("loss", "gradient"), *results, strict=True):
        note_tensors("verl", f"{name} of its ppo_loss on nested tensors, with KL", our, their)
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-6)
    assert (results[1][1] == 0).sum() >= sum(prompts) - len(prompts)  # of prompts alone
