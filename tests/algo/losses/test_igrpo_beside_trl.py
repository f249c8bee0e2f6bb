"""Our losses against TRL 1.16's own `_compute_loss`, in loss and gradient, on random batches.

TRL keeps its losses in a method of the trainer. It is called here on a trainer without a model: the
one thing it asks the model for, log-probs and entropies, is handed in.
"""

import os
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from igrpo_algo.losses.corrections import (
    entropy_threshold,
    high_entropy_mask,
    mask_weights,
    off_policy_sequence_mask,
    sequence_importance_weights,
    token_importance_weights,
    truncate_weights,
)
from igrpo_kernels import (
    K3,
    Cispo,
    Clip,
    FixedLength,
    RatioWeighted,
    Sapo,
    SequenceClip,
    SequenceMean,
    Sum,
    TokenMean,
)
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.surrogates import Gmpo, Vespo

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="the peer is an extra")
from trl.experimental.gmpo import GMPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

# The bound. Both sides compute in float64, so what remains is the order of additions.
CLOSE = {"rtol": 1e-9, "atol": 1e-10}

LENGTHS = [4, 1, 6, 3]
STEPS = 2  # gradient accumulation steps, and steps per generation batch


class OneProcess:
    """What `_compute_loss` asks of accelerate, for one process."""

    num_processes = 1
    sync_gradients = True

    def gather(self, x):
        return x

    gather_for_metrics = gather

    def reduce(self, x, reduction):
        return x

    def pad_across_processes(self, x, dim, pad_index):
        return x


def trl_trainer(cls=GRPOTrainer, **settings):
    """Make a trainer that can compute a loss and nothing else."""
    trainer = cls.__new__(cls)
    arguments = {
        "use_bias_correction_kl": False,
        "delta": None,
        "sapo_temperature_pos": 1.0,
        "sapo_temperature_neg": 1.05,
        "vespo_k_pos": 2.0,
        "vespo_lambda_pos": 3.0,
        "vespo_k_neg": 3.0,
        "vespo_lambda_neg": 2.0,
        "steps_per_generation": STEPS,
    }
    attributes = {
        "loss_type": "grpo",
        "importance_sampling_level": "token",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "beta": 0.0,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "use_adaptive_entropy": False,
        "entropy_coef": 0.0,
        "max_completion_length": 9,
    }
    arguments |= {k: settings.pop(k) for k in list(settings) if k in arguments}
    attributes |= settings
    attributes["_entropy_bonus_enabled"] = attributes["entropy_coef"] != 0.0
    for name, value in attributes.items():
        setattr(trainer, name, value)
    trainer.args = SimpleNamespace(**arguments)
    trainer.accelerator = OneProcess()
    trainer.current_gradient_accumulation_steps = STEPS
    trainer.model = SimpleNamespace(training=True)
    trainer._metrics = {"train": defaultdict(list)}
    return trainer


def make_batch(seed):
    g = torch.Generator().manual_seed(seed)
    size = (len(LENGTHS), max(LENGTHS))

    def normal():
        return torch.randn(size, generator=g, dtype=torch.float64)

    logprobs = -2.0 * torch.rand(size, generator=g, dtype=torch.float64) - 0.05
    return SimpleNamespace(
        mask=(torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double(),
        logprobs=logprobs,
        old=logprobs + 0.3 * normal(),
        ref=logprobs + 0.3 * normal(),
        sampler=logprobs + 0.4 * normal(),
        entropy=normal().abs(),
        advantages=torch.randn(len(LENGTHS), generator=g, dtype=torch.float64),
    )


def trl_loss(trainer, batch, importance_sampling_ratio=None):
    logprobs = batch.logprobs.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, entropy, None)
    inputs = {
        "prompt_ids": torch.zeros(len(LENGTHS), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(LENGTHS), 1, dtype=torch.long),
        "completion_ids": torch.zeros(batch.mask.shape, dtype=torch.long),
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old,
        "ref_per_token_logps": batch.ref,
        "sampling_per_token_logps": batch.sampler,
        "num_items_in_batch": batch.mask.sum() * STEPS,
        "importance_sampling_ratio": importance_sampling_ratio,
    }
    loss = trainer._compute_loss(None, inputs)
    grads = torch.autograd.grad(loss, (logprobs, entropy), allow_unused=True)
    return loss.detach(), *grads


def our_loss(batch, **options):
    logprobs = batch.logprobs.clone().requires_grad_()
    entropy = batch.entropy.clone().requires_grad_()
    if options.get("kl_coef"):
        options["ref_logprobs"] = batch.ref
    out = policy_loss(
        logprobs,
        batch.advantages,
        batch.mask,
        old_logprobs=batch.old,
        entropy=entropy,
        **options,
    )
    grads = torch.autograd.grad(out.loss, (logprobs, entropy), allow_unused=True)
    return out.loss.detach(), *grads


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], **CLOSE)
    torch.testing.assert_close(ours[1], theirs[1], **CLOSE)
    if theirs[2] is not None:
        torch.testing.assert_close(ours[2], theirs[2], **CLOSE)


ROWS = len(LENGTHS) * STEPS  # TRL divides by the accumulation steps as well
TOKENS = sum(LENGTHS) * STEPS

LOSS_TYPES = {
    "grpo": ({}, Clip(), SequenceMean(ROWS)),
    "bnpo": ({}, Clip(), TokenMean(TOKENS)),
    "dr_grpo": ({}, Clip(), FixedLength(9, ROWS)),
    "dapo": ({"epsilon_high": 0.28}, Clip(0.2, 0.28), TokenMean(TOKENS)),
    "cispo": ({"epsilon_high": 1.4}, Cispo(1.4), TokenMean(TOKENS)),
    # TRL rounds the temperatures to float32: 1.0625 is itself there, 1.05 is not.
    "sapo": ({"sapo_temperature_neg": 1.0625}, Sapo(1.0, 1.0625), SequenceMean(ROWS)),
    "vespo": ({}, Vespo(), TokenMean(TOKENS)),
    "luspo": (
        {"importance_sampling_level": "sequence", "epsilon_low": 0.02, "epsilon_high": 0.03},
        SequenceClip(0.02, 0.03),
        FixedLength(1, ROWS),
    ),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type(loss_type, beta, seed):
    settings, surrogate, aggregate = LOSS_TYPES[loss_type]
    batch = make_batch(seed)
    theirs = trl_loss(trl_trainer(loss_type=loss_type, beta=beta, **settings), batch)
    ours = our_loss(batch, surrogate=surrogate, aggregate=aggregate, kl_coef=beta)
    assert_same(ours, theirs)


@pytest.mark.parametrize("seed", range(4))
def test_gspo(seed):
    batch = make_batch(seed)
    trainer = trl_trainer(importance_sampling_level="sequence", epsilon_low=0.02, epsilon_high=0.03)
    ours = our_loss(batch, surrogate=SequenceClip(0.02, 0.03), aggregate=SequenceMean(ROWS))
    assert_same(ours, trl_loss(trainer, batch))


@pytest.mark.parametrize("seed", range(4))
def test_delta_is_the_dual_clip(seed):
    batch = make_batch(seed)
    ours = our_loss(batch, surrogate=Clip(0.2, 0.2, dual=1.3), aggregate=SequenceMean(ROWS))
    assert_same(ours, trl_loss(trl_trainer(delta=1.3), batch))


@pytest.mark.parametrize("seed", range(4))
def test_bias_corrected_kl(seed):
    batch = make_batch(seed)
    trainer = trl_trainer(beta=0.1, use_bias_correction_kl=True)
    ours = our_loss(
        batch,
        surrogate=Clip(),
        aggregate=SequenceMean(ROWS),
        kl_coef=0.1,
        kl=RatioWeighted(K3()),
    )
    assert_same(ours, trl_loss(trainer, batch))


@pytest.mark.parametrize("seed", range(4))
def test_gmpo(seed):
    batch = make_batch(seed)
    trainer = trl_trainer(GMPOTrainer, epsilon_low=0.3, epsilon_high=0.2, beta=0.1)
    ours = our_loss(
        batch, surrogate=Gmpo(low=0.3, high=0.2), aggregate=SequenceMean(ROWS), kl_coef=0.1
    )
    assert_same(ours, trl_loss(trainer, batch))


@pytest.mark.parametrize("seed", range(4))
def test_off_policy_sequence_mask(seed):
    batch = make_batch(seed)
    batch.sampler = batch.sampler + torch.tensor([[0.6], [0.0], [0.6], [0.0]]).double()
    keep = off_policy_sequence_mask(
        batch.logprobs, batch.sampler, batch.advantages, batch.mask, threshold=0.3
    )
    ours = our_loss(
        batch,
        surrogate=Clip(),
        aggregate=SequenceMean(ROWS),
        importance_weights=keep,
        kl_coef=0.1,
    )
    assert_same(ours, trl_loss(trl_trainer(off_policy_mask_threshold=0.3, beta=0.1), batch))


@pytest.mark.parametrize("seed", range(4))
def test_high_entropy_tokens(seed):
    batch = make_batch(seed)
    threshold = entropy_threshold(batch.entropy.float(), batch.mask, share=0.3)
    ours = our_loss(
        batch,
        surrogate=Clip(),
        aggregate=TokenMean(TOKENS),
        importance_weights=high_entropy_mask(batch.entropy, threshold),
        kl_coef=0.1,
    )
    trainer = trl_trainer(loss_type="dapo", top_entropy_quantile=0.3, beta=0.1)
    assert_same(ours, trl_loss(trainer, batch))


@pytest.mark.parametrize("seed", range(2))
def test_entropy_bonus(seed):
    """TRL averages the bonus over tokens whatever the loss type; so does a second term here."""
    batch = make_batch(seed)
    theirs = trl_loss(trl_trainer(loss_type="bnpo", entropy_coef=0.05), batch)
    ours = our_loss(batch, surrogate=Clip(), aggregate=TokenMean(TOKENS), entropy_coef=0.05)
    assert_same(ours, theirs)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["truncate", "mask"])
def test_sampler_corrections(level, kind):
    """TRL computes the ratio while sampling; its lines for the four modes are restated here."""
    batch = make_batch(7)
    batch.sampler[0, 0] = float("nan")
    difference = ((batch.old - batch.sampler) * batch.mask).nan_to_num(nan=0.0)
    if level == "sequence":
        difference = difference.sum(-1, keepdim=True)
    theirs = difference.exp()
    if kind == "truncate":
        theirs = theirs.clamp(0.8, 1.3)
    else:
        theirs = theirs.masked_fill((theirs < 0.8) | (theirs > 1.3), 0.0)
    weigh = token_importance_weights if level == "token" else sequence_importance_weights
    bound = truncate_weights if kind == "truncate" else mask_weights
    ours = bound(weigh(batch.old, batch.sampler, batch.mask), low=0.8, high=1.3)
    trainer = trl_trainer(use_vllm=True, beta=0.1)
    assert_same(
        our_loss(
            batch,
            surrogate=Clip(),
            aggregate=SequenceMean(ROWS),
            importance_weights=ours,
            kl_coef=0.1,
        ),
        trl_loss(trainer, batch, importance_sampling_ratio=theirs),
    )


def test_vespo_folds_the_sampler_correction():
    batch = make_batch(8)
    weights = truncate_weights(
        token_importance_weights(batch.old, batch.sampler, batch.mask), high=3.0
    )
    theirs = trl_loss(trl_trainer(loss_type="vespo", use_vllm=True), batch, weights)
    ours = our_loss(
        batch, surrogate=Vespo(), aggregate=TokenMean(TOKENS), importance_weights=weights
    )
    assert_same(ours, theirs)


def test_a_wrong_aggregate_is_noticed():
    """The comparison can fail: the same surrogate under another average differs."""
    batch = make_batch(0)
    theirs = trl_loss(trl_trainer(), batch)
    ours = our_loss(batch, surrogate=Clip(), aggregate=Sum(TOKENS))
    with pytest.raises(AssertionError, match="not close"):
        assert_same(ours, theirs)
