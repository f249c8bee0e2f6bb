"""The batch of a step: what it holds, and that no layout, split or mask changes loss and gradient.

The layouts are run through a Qwen3 of random weights in float64, whose sequences by themselves are
the oracle.
"""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from igrpo_algo.advantages.baselines import rloo
from igrpo_algo.advantages.of_groups import center_by_group, standardize_by_group
from igrpo_algo.batch import DRAFTS, REFINEMENTS, MicroBatch, training_batch
from igrpo_algo.layouts import pack_sequences, pad_sequences
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.records import DraftChoice, Rollout, Rollouts, Stage
from igrpo_algo.trainers.transformers import enable_shared_prompt
from igrpo_kernels import (
    Clip,
    FixedLength,
    SequenceMean,
    TokenMean,
    linear_policy_loss,
    token_logprobs,
)
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.surrogates import Cispo

NAN = math.nan
VOCABULARY = 20
LAYOUTS = ["padded", "packed", "shared_prompt"]


def completion(*ids, reason="stop"):
    return Completion(list(ids), str(ids), [-2.0 - 0.1 * i for i in range(len(ids))], reason)


def rollout(index, *stages):
    """Make one of (prompt ids, completions, rewards) for each stage."""
    drafts, *refinements = (Stage("q", drawn, rewards, ids) for ids, drawn, rewards in stages)
    return Rollout(index, drafts, [DraftChoice(0, 0.0)] * len(refinements), refinements)


ROLLOUTS = Rollouts(
    [
        rollout(
            0,
            ([5, 6], [completion(7, 8), completion(9)], [1.0, 0.0]),
            (
                [5, 6, 7],
                [completion(8), completion(9, 10, 11), completion(12, 13)],
                [0, 1, 0.5],
            ),
        ),
        rollout(
            1,
            ([4], [completion(3, 2, 1), completion(6)], [NAN, 0.5]),
            ([4, 3], [completion(2), completion(5, 5), completion(1)], [1.0, 1.0, 1.0]),
        ),
        rollout(
            2,
            ([8, 8, 8], [completion(), completion(2)], [NAN, 1.0]),
            ([8, 8, 8], [completion(reason="skipped")] * 3, [NAN] * 3),
        ),
    ]
)
BOTH = (DRAFTS, REFINEMENTS)
CLIP = Clip()


def test_the_refinements_are_trained_under_the_prompt_that_drew_them():
    batch = training_batch(ROLLOUTS)
    assert batch.prompt_ids == [[5, 6, 7]] * 3 + [[4, 3]] * 3
    assert [c.token_ids for c in batch.completions] == [
        [8], [9, 10, 11], [12, 13], [2], [5, 5], [1]
    ]  # fmt: skip
    wanted = standardize_by_group(ROLLOUTS.refinement_rewards).flatten()[:6]
    torch.testing.assert_close(batch.advantages, wanted, rtol=0, atol=0)
    assert batch.groups.tolist() == [0, 0, 0, 1, 1, 1]
    assert batch.index.tolist() == [0, 1, 2, 3, 4, 5]
    assert (batch.step_sequences, batch.step_tokens, len(batch)) == (9, 10, 6)


def test_both_stages_are_groups_of_one_step():
    batch = training_batch(ROLLOUTS, stages=BOTH, advantages=center_by_group)
    assert batch.prompt_ids[:5] == [[5, 6]] * 2 + [[4]] * 2 + [[8, 8, 8]]
    assert batch.groups.tolist() == [0, 0, 1, 1, 2, 3, 3, 3, 4, 4, 4]
    assert batch.index.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
    drafts = center_by_group(ROLLOUTS.draft_rewards).flatten()
    refinements = center_by_group(ROLLOUTS.refinement_rewards).flatten()
    wanted = torch.cat([drafts, refinements])[batch.index]
    torch.testing.assert_close(batch.advantages, wanted, rtol=0, atol=0)
    assert (batch.step_sequences, batch.step_tokens) == (15, 18)


def test_under_the_question_all_completions_of_a_prompt_are_one_group():
    batch = training_batch(ROLLOUTS, stages=BOTH, advantages=center_by_group, under_question=True)
    assert batch.prompt_ids == [[5, 6]] * 5 + [[4]] * 5 + [[8, 8, 8]]
    assert [len(c.token_ids) for c in batch.completions] == [2, 1, 1, 3, 2, 3, 1, 1, 2, 1, 1]
    assert batch.groups.tolist() == [0] * 5 + [1] * 5 + [2]
    assert batch.index.tolist() == [*range(10), 11]  # the one without tokens is 10
    rewards = torch.cat([ROLLOUTS.draft_rewards, ROLLOUTS.refinement_rewards], 1)
    wanted = center_by_group(rewards).flatten()[batch.index]
    torch.testing.assert_close(batch.advantages, wanted, rtol=0, atol=0)
    assert (batch.step_sequences, batch.step_tokens) == (15, 18)
    alone = training_batch(ROLLOUTS, under_question=True)
    assert alone.prompt_ids == [[5, 6]] * 3 + [[4]] * 3
    assert torch.equal(alone.advantages, training_batch(ROLLOUTS).advantages)


def test_any_advantage_function_is_called_once_per_stage():
    seen = []

    def advantages(rewards):
        seen.append(rewards.shape)
        return rloo(rewards)

    batch = training_batch(ROLLOUTS, stages=BOTH, advantages=advantages)
    assert seen == [(3, 2), (3, 3)]
    wanted = rloo(ROLLOUTS.draft_rewards).flatten()[:4]
    torch.testing.assert_close(batch.advantages[:4], wanted, rtol=0, atol=0)


def test_a_round_is_named_by_its_number():
    first, second = ROLLOUTS[0], ROLLOUTS[1]
    two_rounds = replace(
        first,
        choices=first.choices * 2,
        refinements=[*first.refinements, *second.refinements],
    )
    for stage, prompt in ((1, [5, 6, 7]), (2, [4, 3]), (REFINEMENTS, [4, 3]), (DRAFTS, [5, 6])):
        batch = training_batch(Rollouts([two_rounds]), stages=[stage])
        assert batch.prompt_ids[0] == prompt
    with pytest.raises(ValueError, match=r"0 \(drafts\) to 2 at most once, got \[2, -1\]"):
        training_batch(Rollouts([two_rounds]), stages=[2, REFINEMENTS])


def test_without_prompt_ids_encode_gives_them():
    (stage,) = ROLLOUTS[0].refinements
    bare = Rollouts([replace(ROLLOUTS[0], refinements=[replace(stage, prompt_ids=None)])])
    batch = training_batch(bare, encode=lambda prompt: [ord(letter) for letter in prompt])
    assert batch.prompt_ids == [[ord("q")]] * 3
    with pytest.raises(ValueError, match="encode must be given"):
        training_batch(bare)


def test_advantages_are_plain_float32_whatever_the_function_returns():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    for advantages in (
        lambda rewards: center_by_group(rewards) * scale,
        lambda rewards: center_by_group(rewards).mul(2).half(),
        lambda rewards: center_by_group(rewards).long(),
    ):
        found = training_batch(ROLLOUTS, advantages=advantages).advantages
        assert (found.dtype, found.requires_grad) == (torch.float32, False)


# The layouts, worked by hand.


def micros(batch, layout, **options) -> list[MicroBatch]:
    options |= {"pad_token_id": 0} if layout == "padded" else {}
    return getattr(batch, layout)(**options)


def test_padded_by_hand():
    (micro,) = training_batch(ROLLOUTS).padded(0)
    rows, mask = micro.layout.input_ids, micro.layout.mask.int()
    assert rows.tolist() == [
        [5, 6, 7, 8, 0, 0],
        [5, 6, 7, 9, 10, 11],
        [5, 6, 7, 12, 13, 0],
        [4, 3, 2, 0, 0, 0],
        [4, 3, 5, 5, 0, 0],
        [4, 3, 1, 0, 0, 0],
    ]
    assert mask.tolist() == [
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 1],
        [0, 0, 1, 1, 0],
        [0, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 1, 0, 0, 0],
    ]
    assert micro.model_inputs()["attention_mask"].sum(1).tolist() == [4, 6, 5, 3, 4, 3]
    old = micro.old_logprobs
    assert old.dtype == torch.float32
    wanted = torch.tensor([0.0, 0.0, -2.0, -2.1, -2.2])
    torch.testing.assert_close(old[1], wanted, rtol=0, atol=0)


def test_packed_by_hand():
    (micro,) = training_batch(ROLLOUTS).keep(torch.tensor([1, 1, 0, 1, 0, 0]).bool()).packed()
    row = micro.layout
    assert row.input_ids.tolist() == [[5, 6, 7, 8, 5, 6, 7, 9, 10, 11, 4, 3, 2]]
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1, 2]]
    assert row.targets.tolist() == [8, 9, 10, 11, 2]
    assert row.predictors.tolist() == [2, 6, 7, 8, 11]
    assert row.cu_seqlens.tolist() == [0, 1, 4, 5]
    torch.testing.assert_close(
        micro.old_logprobs, torch.tensor([-2.0, -2.0, -2.1, -2.2, -2.0]), rtol=0, atol=0
    )


def test_shared_prompt_by_hand():
    (micro,) = training_batch(ROLLOUTS).shared_prompt()
    ids = [5, 6, 7, 8, 9, 10, 11, 12, 13, 4, 3, 2, 5, 5, 1]
    assert micro.layout.input_ids.tolist() == [ids]
    assert micro.layout.lengths == ((3, 1, 3, 2), (2, 1, 2, 1))


@pytest.mark.parametrize(
    ("layout", "limit", "wanted"),
    [
        ("padded", 12, [[0, 1], [2, 3], [4, 5]]),
        ("packed", 12, [[0, 1], [2, 3, 4], [5]]),
        ("shared_prompt", 9, [[0, 1, 2], [3, 4, 5]]),
        ("shared_prompt", 7, [[0, 1], [2], [3, 4, 5]]),
    ],
)
def test_micro_batches_keep_within_their_tokens_and_know_their_place(layout, limit, wanted):
    batch = training_batch(ROLLOUTS)
    parts = micros(batch, layout, max_tokens=limit)
    assert [part.index.tolist() for part in parts] == wanted
    for part in parts:
        assert part.model_inputs()["input_ids"].numel() <= limit
        assert part.advantages.tolist() == batch.advantages[part.index].tolist()
        assert part.groups.tolist() == batch.groups[part.index].tolist()
        assert (part.step_sequences, part.step_tokens) == (9, 10)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_log_probs_of_one_completion_there_are_none(layout):
    drafts = replace(ROLLOUTS[0].drafts, completions=[completion(1), Completion([1], "")])
    batch = training_batch(Rollouts([replace(ROLLOUTS[0], drafts=drafts)]), stages=[DRAFTS])
    assert [micro.old_logprobs for micro in micros(batch, layout)] == [None]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_left_gives_no_micro_batch(layout):
    batch = training_batch(ROLLOUTS).keep(torch.zeros(6, dtype=torch.bool))
    assert micros(batch, layout) == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_takes_every_tensor_along(layout):
    (micro,) = micros(training_batch(ROLLOUTS), layout)
    moved = micro.to("meta")
    inputs = [*moved.model_inputs().values(), *vars(moved.layout).values(), *vars(moved).values()]
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    assert {tensor.device.type for tensor in (*tensors, moved.groups, moved.index)} == {"meta"}


# The loss and its gradient.


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.5,
    )
    model = Qwen3ForCausalLM(config).double()
    for module in model.modules():
        if isinstance(module, Qwen3RMSNorm):  # whose own goes by float32, backward too
            module.forward = partial(
                F.rms_norm,
                normalized_shape=module.weight.shape,
                weight=module.weight,
                eps=module.variance_epsilon,
            )
    enable_shared_prompt(model)
    return model


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def run(model, parts, aggregate, surrogate=CLIP):
    """Give the sum of the losses of micro-batches, and the gradients that they add up to."""
    total = 0.0
    for micro in parts:
        hidden = model.model(**micro.model_inputs()).last_hidden_state
        loss = linear_policy_loss(
            **micro.loss_inputs(hidden),
            weight=model.lm_head.weight,
            surrogate=surrogate,
            aggregate=aggregate(micro),
        ).loss
        loss.backward()
        total += loss.item()
    return total, gradients(model)


def by_sequence(model, batch, aggregate, surrogate=CLIP):
    """The same from each sequence by itself, with whole logits."""
    total = 0.0
    for ids, drawn, advantage in zip(
        batch.prompt_ids, batch.completions, batch.advantages, strict=True
    ):
        logits = model(torch.tensor([ids + drawn.token_ids])).logits[:, len(ids) - 1 : -1]
        loss = policy_loss(
            token_logprobs(logits, torch.tensor([drawn.token_ids])),
            advantage[None],
            surrogate=surrogate,
            aggregate=aggregate(batch),
            old_logprobs=torch.tensor([drawn.logprobs]),
        ).loss
        loss.backward()
        total += loss.item()
    return total, gradients(model)


AGGREGATES = {
    "sequence mean": lambda batch: SequenceMean(batch.step_sequences),
    "token mean": lambda batch: TokenMean(batch.step_tokens),
    "fixed length": lambda batch: FixedLength(4, batch.step_sequences),
}
every_aggregate = pytest.mark.parametrize("aggregate", AGGREGATES.values(), ids=AGGREGATES)


def assert_same(found, wanted):
    """Float64 through two layers: 1e-10 of the largest gradient is far above its rounding."""
    (loss, grads), (wanted_loss, wanted_grads) = found, wanted
    assert loss == pytest.approx(wanted_loss, rel=1e-9, abs=1e-12)
    scale = max(grad.abs().max() for grad in wanted_grads.values())
    assert scale > 1e-3
    for name, grad in wanted_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-9, atol=float(1e-10 * scale))


@every_aggregate
@pytest.mark.parametrize("limit", [None, 12])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_split_gives_the_loss_and_gradient_of_the_sequences(
    model, layout, limit, aggregate
):
    batch = training_batch(ROLLOUTS, stages=BOTH)
    parts = micros(batch, layout, max_tokens=limit)
    assert (len(parts) > 1) == (limit is not None)
    assert_same(run(model, parts, aggregate), by_sequence(model, batch, aggregate))


@every_aggregate
@pytest.mark.parametrize("layout", LAYOUTS)
def test_under_the_question_too(model, layout, aggregate):
    batch = training_batch(ROLLOUTS, stages=BOTH, under_question=True)
    parts = micros(batch, layout, max_tokens=16)
    assert len(parts) > 1
    found = run(model, parts, aggregate, Cispo(1.0))
    assert_same(found, by_sequence(model, batch, aggregate, Cispo(1.0)))


@every_aggregate
@pytest.mark.parametrize("layout", LAYOUTS)
def test_leaving_out_what_has_no_advantage_changes_nothing(model, layout, aggregate):
    batch = training_batch(ROLLOUTS, stages=BOTH)
    kept = batch.keep(batch.advantages != 0)
    assert 0 < len(kept) < len(batch)
    assert_same(run(model, micros(kept, layout), aggregate), by_sequence(model, batch, aggregate))


# What is refused.


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rollouts": [ROLLOUTS[0]]}, TypeError, "rollouts must be Rollouts, got list"),
        ({"rollouts": Rollouts([])}, ValueError, "rollouts must hold at least one prompt"),
        ({"stages": ()}, TypeError, r"stages must be a list of stage numbers, got tuple \(\)"),
        ({"stages": "drafts"}, TypeError, "stages must be a list of stage numbers, got str"),
        ({"stages": ["drafts"]}, TypeError, "each of stages must be an int, got str 'drafts'"),
        ({"stages": [2]}, ValueError, r"stages 0 \(drafts\) to 1 at most once, got \[2\]"),
        ({"stages": [-2]}, ValueError, "each of stages must be >= -1, got -2"),
        ({"under_question": 1}, TypeError, "under_question must be True or False, got int 1"),
        ({"stages": [0, 0]}, ValueError, r"at most once, got \[0, 0\]"),
        (
            {"advantages": lambda rewards: rewards[0]},
            ValueError,
            "of the rewards = ",
        ),
        ({"advantages": lambda rewards: 0.0}, TypeError, "result of advantages must be a torch"),
        (
            {"advantages": lambda rewards: rewards},
            ValueError,
            "must be finite, got .*nan",
        ),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        training_batch(**{"rollouts": ROLLOUTS, **arguments})


def test_prompts_without_tokens_are_refused():
    """No position predicts the first token of the completion."""
    stage = replace(ROLLOUTS[0].drafts, prompt_ids=[])
    empty = Rollouts([replace(ROLLOUTS[0], drafts=stage)])
    with pytest.raises(ValueError, match="prompt_ids must have at least one token, got none of 'q"):
        training_batch(empty, stages=[DRAFTS])
    for lay in (pack_sequences, partial(pad_sequences, pad_token_id=0)):
        with pytest.raises(ValueError, match=r"prompts\[1\] must have at least one token"):
            lay([[5], []], [[7], [8]])
        with pytest.raises(ValueError, match="completions must hold one per prompt = 2, got 1"):
            lay([[5], [6]], [[7]])


@pytest.mark.parametrize("ids", [torch.tensor([5]), [5.0], "5", None])
def test_encode_must_give_token_ids(ids):
    bare = Rollouts([replace(ROLLOUTS[0], drafts=Stage("q", [completion(7)], [1.0]))])
    with pytest.raises(TypeError, match="the result of encode"):
        training_batch(bare, stages=[DRAFTS], encode=lambda prompt: ids)


def test_a_stage_that_drew_nothing_is_refused():
    empty = replace(ROLLOUTS[0], drafts=Stage("q", [], [], [5]))
    with pytest.raises(ValueError, match="stages must have completions"):
        training_batch(Rollouts([empty]), stages=[DRAFTS])
    with pytest.raises(ValueError, match="stages must have completions"):
        training_batch(Rollouts([empty]), stages=BOTH, under_question=True)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        ([True] * 6, TypeError, "mask must be a torch.Tensor, got list"),
        (torch.ones(6), TypeError, "mask must be a bool tensor, got a float32 tensor"),
        (torch.ones(5, dtype=torch.bool), ValueError, r"mask must have shape \[B\] = \[6\]"),
    ],
)
def test_bad_masks(mask, error, match):
    with pytest.raises(error, match=match):
        training_batch(ROLLOUTS).keep(mask)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_longer_than_a_micro_batch_is_refused(layout):
    with pytest.raises(ValueError, match="max_tokens must hold"):
        micros(training_batch(ROLLOUTS), layout, max_tokens=5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hidden_states_of_another_shape_are_refused(layout):
    (micro,) = micros(training_batch(ROLLOUTS), layout)
    with pytest.raises(ValueError, match="hidden must have shape"):
        micro.loss_inputs(torch.zeros(2, 7, 3))
    with pytest.raises(TypeError, match=r"hidden must be a torch\.Tensor"):
        micro.loss_inputs([1.0])
