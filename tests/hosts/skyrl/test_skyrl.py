"""iGRPO inside SkyRL's own generator, environments and advantages, its loss in the registry.

In the place of vLLM a tiny model answers in the form of SkyRL's `InferenceEngineOutput`.
"""

import asyncio
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skyrl_gym
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from skyrl.backends.skyrl_train.utils.ppo_utils import (
    PolicyLossRegistry,
    apply_loss_reduction_to_advantages_minibatch,
    compute_advantages_and_returns,
)
from skyrl.train.config import SkyRLTrainConfig
from skyrl.train.config.config import AlgorithmConfig, GeneratorConfig, SkyRLGymConfig
from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
from skyrl.train.generators.utils import prepare_generator_input
from skyrl.train.utils.trainer_utils import validate_generator_output

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from contract import Group
from differences import note_tensors
from letters_env import SCORED
from tiny_qwen3 import make_model, make_tokenizer

from igrpo_algo import DraftRules, DraftTemplate, TextSplice
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.skyrl import IGRPOGenerator, make_policy_loss
from igrpo_kernels import Cispo

RULES = DraftRules(splice=TextSplice(DraftTemplate("[", "]")))
G = 3
skyrl_gym.register(id="letters", entry_point="letters_env:LettersEnv")


class Engine:
    """SkyRL's inference client, with a tiny model behind it."""

    model_name = "tiny"

    def __init__(self) -> None:
        self.sampler = TransformersSampler(make_model(), make_tokenizer(), max_new_tokens=8)
        self.answered: list[tuple[str, str]] = []

    async def finish_session(self, session: str) -> None:
        pass

    async def generate(self, batch: Any, model: str | None = None) -> dict[str, Any]:
        await asyncio.sleep(0)
        drawn = []
        for ids in batch["prompt_token_ids"]:
            ((completion,),) = self.sampler.sample([list(ids)], 1, seed=len(self.answered))
            self.answered.append((self.sampler.tokenizer.decode(ids), completion.text))
            drawn.append(completion)
        return {
            "responses": [completion.text for completion in drawn],
            "response_ids": [list(completion.token_ids) for completion in drawn],
            "stop_reasons": [completion.finish_reason for completion in drawn],
            "response_logprobs": [completion.logprobs for completion in drawn],
        }


def make_generator(**options: Any) -> SkyRLGymGenerator:
    config = GeneratorConfig(**{"max_input_length": 200, **options})
    config.sampling_params.max_generate_length = 8
    return SkyRLGymGenerator(config, SkyRLGymConfig(max_env_workers=0), Engine(), make_tokenizer())


def make_input(phase: str = "train", samples: int = G) -> tuple[Any, list[str]]:
    prompts = [
        {
            "prompt": [{"role": "user", "content": f"{n}+{n}?"}],
            "env_class": "letters",
            "env_extras": {"answer": str(2 * n)},
            "uid": str(n),
        }
        for n in (1, 2)
    ]
    return prepare_generator_input(prompts, samples, None, "letters", phase, 3)


def roll_out(ours: IGRPOGenerator, **options: Any) -> tuple[dict[str, Any], list[str]]:
    batch, uids = make_input(**options)
    output = asyncio.run(ours.generate(batch))
    validate_generator_output(len(batch["prompts"]), output)
    output["rewards"] = [sum(r) if isinstance(r, list) else r for r in output["rewards"]]
    return output, uids


def advantages_of(output: dict[str, Any], uids: list[str]) -> list[float]:
    mask = torch.ones(len(uids), 1)
    rewards = torch.tensor(output["rewards"])[:, None]
    config = AlgorithmConfig()
    advantages, _ = compute_advantages_and_returns(rewards, mask, np.array(uids), "grpo", config)
    return advantages[:, 0].tolist()


def test_a_group_shares_the_best_draft_of_its_own() -> None:
    theirs = make_generator()
    SCORED.clear()
    output, uids = roll_out(IGRPOGenerator(theirs, rules=RULES, num_drafts=4))
    engine, tokenizer = theirs.inference_engine_client, theirs.tokenizer
    assert len(engine.answered) == 2 * (4 + G)
    advantages = advantages_of(output, uids)
    for number, question in enumerate(("1+1?", "2+2?")):
        rows = slice(number * G, (number + 1) * G)
        plain = f"<s>user:{question}</s><s>assistant:"
        drafts = [text for prompt, text in engine.answered if prompt == plain]
        spliced = f"<s>user:{question}["
        Group(
            question,
            drafts,
            max(drafts, key=lambda text: sum(map(ord, text))),
            [prompt for prompt, _ in engine.answered if prompt.startswith(spliced)],
            [tokenizer.decode(ids) for ids in output["prompt_token_ids"][rows]],
            output["rewards"][rows],
            advantages[rows],
        ).check(num_drafts=4, num_refinements=G)
        answers = {answer for text, answer in SCORED if text in drafts}
        assert answers == {str(2 * (number + 1))}
    assert output["rollout_metrics"]["igrpo/mean_conditioned"] == 1.0
    assert output["rollout_metrics"]["igrpo/mean_draft_reward"] > 0


def test_a_fully_asynchronous_trainer_asks_for_one_group() -> None:
    batch, _ = make_input()
    one = {name: value[:G] if isinstance(value, list) else value for name, value in batch.items()}
    theirs = make_generator()
    output = asyncio.run(IGRPOGenerator(theirs, rules=RULES, num_drafts=2).generate(one))
    assert len(output["response_ids"]) == G
    assert len(theirs.inference_engine_client.answered) == 2 + G


def test_no_group_waits_for_the_drafts_of_another() -> None:
    theirs = make_generator()
    engine = theirs.inference_engine_client
    plain, fast = engine.generate, asyncio.Event()

    async def generate(batch: Any, model: str | None = None) -> dict[str, Any]:
        prompt = engine.sampler.tokenizer.decode(batch["prompt_token_ids"][0])
        if prompt.startswith("<s>user:2+2?["):
            fast.set()
        if prompt == "<s>user:1+1?</s><s>assistant:":
            await asyncio.wait_for(fast.wait(), 60)
        return await plain(batch, model)

    engine.generate = generate
    output, _ = roll_out(IGRPOGenerator(theirs, rules=RULES, num_drafts=2))
    assert len(output["response_ids"]) == 2 * G


def test_a_draft_is_cut_and_a_question_is_not() -> None:
    theirs = make_generator(max_input_length=30)
    output, _ = roll_out(IGRPOGenerator(theirs, rules=RULES, num_drafts=2))
    assert max(map(len, output["prompt_token_ids"])) <= 30
    texts = map(theirs.tokenizer.decode, output["prompt_token_ids"])
    assert all(text.startswith(("<s>user:1+1?", "<s>user:2+2?")) for text in texts)


def test_evaluation_is_single_shot() -> None:
    theirs = make_generator()
    roll_out(IGRPOGenerator(theirs, rules=RULES), phase="eval", samples=1)
    prompts = [prompt for prompt, _ in theirs.inference_engine_client.answered]
    assert sorted(prompts) == [f"<s>user:{n}+{n}?</s><s>assistant:" for n in (1, 2)]


def test_what_can_not_work_is_refused_before_sampling() -> None:
    with pytest.raises(ValueError, match=r"generator\.max_turns must be 1"):
        IGRPOGenerator(make_generator(max_turns=2))
    with pytest.raises(ValueError, match="vision_language_generator"):
        IGRPOGenerator(make_generator(vision_language_generator=True))
    rules = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    with pytest.raises(ValueError, match=r"when_failed must not be Fallback\.SKIP"):
        IGRPOGenerator(make_generator(), rules=rules)
    batch, _ = make_input()
    batch["trajectory_ids"] = batch["trajectory_ids"][::G] * G
    with pytest.raises(ValueError, match="must stand next to each other"):
        asyncio.run(IGRPOGenerator(make_generator()).generate(batch))


def make_batch(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 7)
    values = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    mask = (torch.rand(shape, generator=generator) < 0.7).double()
    mask[0] = 0
    return {
        "log_probs": -values[0].abs() + 0.4 * values[1],
        "old_log_probs": -values[0].abs(),
        "advantages": values[2],
        "loss_mask": mask,
        "rollout_logprobs": -values[0].abs() + 0.2 * values[3],
    }


def run_loss(loss: Any, batch: dict[str, torch.Tensor], config: AlgorithmConfig) -> list[Any]:
    leaf = batch["log_probs"].clone().requires_grad_()
    value, metrics = loss(**{**batch, "log_probs": leaf}, config=config)
    value.backward()
    return [value.detach(), leaf.grad, metrics["clip_ratio"]]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    reduction=st.sampled_from(["token_mean", "sequence_mean", "seq_mean_token_sum_norm"]),
    correction=st.sampled_from(
        [
            {},
            {"tis_ratio_type": "token", "token_tis_ratio_clip_high": 1.2},
            {"tis_ratio_type": "sequence"},
            {"sequence_mask_metric": "product", "product_mask_high": 1.1},
        ]
    ),
)
def test_loss_and_gradient_are_those_of_skyrl(
    seed: int, reduction: str, correction: dict[str, Any]
) -> None:
    batch = make_batch(seed)
    batch["advantages"] = apply_loss_reduction_to_advantages_minibatch(
        batch["advantages"], batch["loss_mask"], reduction, 2, 100
    )
    config = AlgorithmConfig(eps_clip_low=0.2, eps_clip_high=0.28)
    for name, value in correction.items():
        setattr(config.off_policy_correction, name, value)
    theirs = run_loss(PolicyLossRegistry.get("regular"), batch, config)
    ours = run_loss(PolicyLossRegistry.get("igrpo"), batch, config)
    for name, their, our in zip(("loss", "gradient"), theirs, ours, strict=False):
        what = f"{name}; three reductions, off-policy correction"
        note_tensors("skyrl", what, our, their)
        # SkyRL takes its correction in float32; the rest is float64.
        torch.testing.assert_close(our, their, atol=1e-7, rtol=1e-6)


def test_another_surrogate_is_skyrls_where_it_has_it() -> None:
    batch, config = make_batch(3), AlgorithmConfig(policy_loss_type="cispo")
    low, high = config.cispo.cispo_eps_clip_low, config.cispo.cispo_eps_clip_high
    theirs = run_loss(PolicyLossRegistry.get("cispo"), batch, config)
    ours = run_loss(make_policy_loss(Cispo.relative(low, high)), batch, config)
    for their, our in zip(theirs[:2], ours[:2], strict=True):
        torch.testing.assert_close(our, their, atol=1e-9, rtol=1e-7)


def test_what_stands_in_masked_slots_has_no_effect() -> None:
    batch = make_batch(3)
    del batch["rollout_logprobs"]
    clean = run_loss(PolicyLossRegistry.get("igrpo"), batch, AlgorithmConfig())
    for name in ("log_probs", "old_log_probs", "advantages"):
        batch[name] = batch[name].masked_fill(batch["loss_mask"] == 0, torch.nan)
    dirty = run_loss(PolicyLossRegistry.get("igrpo"), batch, AlgorithmConfig())
    assert clean[0] == dirty[0]
    assert torch.equal(clean[1], dirty[1])


def test_the_experiment_of_the_example_draws_through_our_generator() -> None:
    path = HERE.parents[2] / "examples" / "skyrl_igrpo.py"
    spec = importlib.util.spec_from_file_location("skyrl_igrpo", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    experiment = object.__new__(module.IGRPOExp)
    ours = experiment.get_generator(SkyRLTrainConfig(), make_tokenizer(), Engine())
    assert isinstance(ours, IGRPOGenerator)
    assert ours.num_drafts == 8
