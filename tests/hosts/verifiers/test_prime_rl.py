"""Our loss in prime-rl's own call of it, beside its own losses.

prime-rl needs GPUs to be installed, so its loss stands here as a copy, word for word.
"""

import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

HOSTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOSTS), str(HOSTS / "verifiers"), str(HOSTS / "verifiers" / "prime_rl_0_8")]
from differences import COPY, note_tensors
from prime_rl.configs.trainer import CustomLossConfig, DefaultLossConfig
from prime_rl.trainer.rl.loss import LossInputs, LossOutputs, compute_loss, setup_rl_loss_fn

from igrpo_algo.trainers.prime_rl import surrogate_loss
from igrpo_kernels import K2
from igrpo_kernels.surrogates import DppoTv


def ppo_clip_loss(inputs: LossInputs, low: float, high: float) -> LossOutputs:
    """The custom loss of prime-rl's docs/algorithms.md, with two bounds."""
    ratio = torch.exp(inputs.trainer_logprobs - inputs.inference_logprobs)
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    losses = -torch.min(ratio * inputs.advantages, clipped * inputs.advantages)
    if inputs.loss_weights is not None:
        losses = losses * inputs.loss_weights
    return LossOutputs(losses[inputs.loss_mask].sum(), {"clipped": (ratio != clipped).float()[0]})


def dppo_with_kl(inputs: LossInputs, low: float, high: float, kl_tau: float) -> LossOutputs:
    """prime-rl's default loss, out of our parts: kl_tau * log(ratio)^2 is 2 * kl_tau * K2.

    Of the same gradient: prime-rl writes ratio * A, the paper and `DppoTv` sg(ratio) * A * log pi.
    """
    return surrogate_loss(
        inputs,
        DppoTv(low, high),
        ref_logprobs=inputs.inference_logprobs[None],
        kl_coef=2 * kl_tau,
        kl=K2(),
    )


def differ(
    name: str, seed: int, ours: Any, theirs: Any, *, weighted: bool = False, value: bool = True
) -> None:
    """Put one step of three sequences through prime-rl's `compute_loss` with each of the losses."""
    generator = torch.Generator().manual_seed(seed)
    lengths, count = (3, 7, 5), 15
    values = torch.randn(3, count, generator=generator, dtype=torch.float64)
    old, advantages = -values[0].abs(), values[1]
    mask = torch.rand(count, generator=generator) < 0.7
    mask[[0, 3, 10]] = True  # prime-rl calls a loss for sequences with tokens of their own
    weights = torch.rand(count, generator=generator, dtype=torch.float64) + 0.5
    results = []
    for loss_fn in (theirs, ours):
        logprobs = (old + 0.4 * values[2]).requires_grad_()
        loss, _ = compute_loss(
            list(logprobs.split(lengths)),
            list(old.split(lengths)),
            None,
            list(advantages.split(lengths)),
            list(mask.split(lengths)),
            list(weights.split(lengths)) if weighted else None,
            None,
            None,
            loss_fn,
            rl_scale=40,  # tokens of the step, over all micro-batches
            ce_scale=1,
            ref_kl_scale=1,
        )
        loss.backward()
        results.append((loss.detach(), logprobs.grad))
    compared = list(zip(("loss", "gradient"), *results, strict=True))
    for what, their, our in compared if value else compared[1:]:
        note_tensors("prime-rl", f"{what}; {name}", our, their, version="0.8.0", how=COPY)
        torch.testing.assert_close(our, their, atol=1e-12, rtol=1e-12)  # float64 on both sides


def custom(name: str, **kwargs: float) -> Any:
    """Have prime-rl import a loss by its path, as it does with `[trainer.loss]`."""
    return setup_rl_loss_fn(CustomLossConfig(import_path=name, kwargs=kwargs))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), high=st.sampled_from([0.2, 0.28]), weighted=st.booleans())
def test_loss_and_gradient_are_those_of_the_clipped_loss_in_its_docs(
    seed: int, high: float, weighted: bool
) -> None:
    ours = custom("igrpo_algo.trainers.prime_rl.igrpo_loss", low=0.2, high=high)
    theirs = partial(ppo_clip_loss, low=0.2, high=high)
    differ("clipped, weighted", seed, ours, theirs, weighted=weighted)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), kl_tau=st.sampled_from([0.0, 1e-3, 0.1]))
def test_the_gradient_is_that_of_its_default_loss(seed: int, kl_tau: float) -> None:
    config = DefaultLossConfig(dppo_mask_low=0.1, dppo_mask_high=0.15, kl_tau=kl_tau)
    theirs = setup_rl_loss_fn(config)
    ours = partial(dppo_with_kl, low=0.1, high=0.15, kl_tau=kl_tau)
    differ("DPPO with KL", seed, ours, theirs, value=False)


def test_a_sequence_without_a_counted_token_gives_zero() -> None:
    loss_fn = custom("igrpo_algo.trainers.prime_rl.igrpo_loss")
    logprobs = torch.full((4,), -1.0, requires_grad=True)
    nothing = torch.zeros(4, dtype=torch.bool)
    inputs = SimpleNamespace(
        trainer_logprobs=logprobs,
        inference_logprobs=torch.full((4,), torch.nan),  # no sampled token, no log-prob
        advantages=torch.ones(4),
        loss_mask=nothing,
        loss_weights=None,
    )
    loss = loss_fn(inputs).loss
    loss.backward()
    assert loss.item() == 0.0
    assert logprobs.grad.tolist() == [0.0] * 4
