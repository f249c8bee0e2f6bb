"""iGRPO inside AReaL's grouped workflow and advantages, and its loss inside `grpo_loss_fn`.

In the place of a remote engine a tiny model answers with AReaL's `ModelResponse`.
"""

import asyncio
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import areal.trainer.ppo.actor as of_areal
import pytest
import torch
from areal import workflow_context
from areal.api import ModelRequest, ModelResponse
from areal.api.cli_args import GenerationHyperparameters, NormConfig, RejectionSamplingConfig
from areal.infra.remote_inf_engine import GroupedRolloutWorkflow
from areal.utils import stats_tracker
from areal.utils.data import Normalization
from areal.utils.functional import ppo_actor_loss_fn
from hypothesis import given, settings
from hypothesis import strategies as st

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from contract import Group
from differences import note_tensors
from letters_reward import letters
from tiny_qwen3 import make_model, make_tokenizer

from igrpo_algo import DraftRules, DraftTemplate, TextSplice
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.areal import IGRPOWorkflow, actor_loss, use_loss
from igrpo_kernels import Sapo

RULES = DraftRules(splice=TextSplice(DraftTemplate("[", "]")))
G = 3


class Engine:
    """AReaL's engine, with a tiny model behind it."""

    def __init__(self) -> None:
        self.sampler = TransformersSampler(make_model(), make_tokenizer(), max_new_tokens=8)
        self.answered: list[tuple[str, str]] = []
        self.clean: dict[str, str] = {}  # by the text with its special tokens, which AReaL scores

    async def agenerate(self, request: ModelRequest) -> ModelResponse:
        ids = list(request.input_ids)
        assert request.gconfig.n_samples == 1
        await asyncio.sleep(0)
        ((drawn,),) = self.sampler.sample([ids], 1, seed=len(self.answered))
        text = self.sampler.tokenizer.decode(drawn.token_ids)
        self.answered.append((self.sampler.tokenizer.decode(ids), text))
        self.clean[text] = drawn.text
        return ModelResponse(
            input_tokens=ids,
            output_tokens=list(drawn.token_ids),
            output_logprobs=list(drawn.logprobs),
            output_versions=[0] * len(drawn.token_ids),
        )


def make_workflow(max_tokens: int = 200, reward: Any = letters, **options: Any) -> IGRPOWorkflow:
    gconfig = GenerationHyperparameters(n_samples=G, max_new_tokens=8, max_tokens=max_tokens)
    return IGRPOWorkflow(reward, gconfig, make_tokenizer(), rules=RULES, **options)


def make_data(question: str, **columns: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"{question}?"}]
    return {"messages": messages, "answer": question, **columns}


def roll_out(workflow: IGRPOWorkflow, *data: dict[str, Any]) -> tuple[Engine, list[Any]]:
    """Run groups as AReaL's executor does: each prompt G times on one workflow."""
    engine = Engine()
    grouped = GroupedRolloutWorkflow(workflow, G, logging.getLogger())

    async def groups() -> list[Any]:
        return await asyncio.gather(*(grouped.arun_episode(engine, each) for each in data))

    return engine, asyncio.run(groups())


@pytest.mark.parametrize("reward", [letters, "letters_reward.letters"])
def test_a_group_shares_the_best_draft_of_its_own(reward: Any) -> None:
    workflow = make_workflow(num_drafts=4, reward=reward)
    engine, groups = roll_out(workflow, make_data("1+1"), make_data("2+2"))
    assert len(engine.answered) == 2 * (4 + G)
    normalize = Normalization(NormConfig(mean_level="group", std_level="group", group_size=G))
    tokenizer = engine.sampler.tokenizer
    for batch, question in zip(groups, ("1+1?", "2+2?"), strict=True):
        plain = f"<s>user:{question}</s><s>assistant:"
        drafts = [text for prompt, text in engine.answered if prompt == plain]
        best = max(drafts, key=lambda text: sum(map(ord, text)))
        rows = [
            ids[: int(mask.sum() - loss.sum())]
            for ids, mask, loss in zip(
                batch["input_ids"], batch["attention_mask"], batch["loss_mask"], strict=True
            )
        ]
        spliced = f"<s>user:{question}["
        Group(
            question,
            drafts,
            engine.clean[best],
            [prompt for prompt, _ in engine.answered if prompt.startswith(spliced)],
            [tokenizer.decode(ids) for ids in rows],
            batch["rewards"].tolist(),
            normalize(batch["rewards"]).tolist(),
        ).check(num_drafts=4, num_refinements=G)


def test_the_layout_is_that_of_areals_own_workflow() -> None:
    _, (ours,) = roll_out(make_workflow(num_drafts=2), make_data("1+1"))
    workflow_context.set(workflow_context.WorkflowContext(is_eval=True))
    try:
        single, (theirs,) = roll_out(make_workflow(num_drafts=2), make_data("1+1"))
    finally:
        workflow_context.set(workflow_context.WorkflowContext())
    assert len(single.answered) == G  # evaluation is single-shot
    assert {name: value.dtype for name, value in ours.items()} == {
        name: value.dtype for name, value in theirs.items()
    }
    assert {value.dim() for value in ours.values()} == {value.dim() for value in theirs.values()}
    model = make_model()
    for row in range(G):
        ids = ours["input_ids"][row][ours["attention_mask"][row]].long()
        drawn = ours["loss_mask"][row][ours["attention_mask"][row]].bool()
        with torch.no_grad():
            known = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(-1, ids[1:, None])[:, 0]
        sampled = ours["logprobs"][row][ours["attention_mask"][row]]
        torch.testing.assert_close(known[drawn[1:]], sampled[drawn], atol=5e-5, rtol=0)


def test_a_draft_is_cut_and_a_question_is_not() -> None:
    _, (batch,) = roll_out(make_workflow(max_tokens=38, num_drafts=2), make_data("1+1"))
    prompt = batch["attention_mask"].sum(-1) - batch["loss_mask"].sum(-1)
    assert prompt.max() <= 38 - 8
    text = make_tokenizer().decode(batch["input_ids"][0])
    assert text.startswith("<s>user:1+1?")


def test_what_can_not_work_is_refused_before_sampling() -> None:
    rules = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    gconfig = GenerationHyperparameters(max_new_tokens=8)
    with pytest.raises(ValueError, match=r"when_failed must not be Fallback\.SKIP"):
        IGRPOWorkflow(letters, gconfig, make_tokenizer(), rules=rules)
    with pytest.raises(ValueError, match="images, videos and audios"):
        roll_out(make_workflow(), make_data("1+1", images=["x.png"]))
    templated = {**make_data("1+1"), "messages": "<s>user:1+1?</s>"}
    with pytest.raises(ValueError, match="a chat template was applied"):
        roll_out(make_workflow(), templated)


@pytest.fixture
def patched() -> Any:
    """Give AReaL its own loss back."""
    yield use_loss
    of_areal.ppo_actor_loss_fn = ppo_actor_loss_fn


LENGTHS = [5, 1, 4]


def make_batch(seed: int, packed: bool) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = [sum(LENGTHS)] if packed else [3, 5]

    def draw(scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(shape, generator=generator)

    old = -draw().abs()
    batch = {
        "logprobs": old + draw(0.2),
        "prox_logp": old,
        "advantages": draw(),
        "loss_mask": (torch.rand(shape, generator=generator) < 0.7).float(),
        "attention_mask": torch.ones(shape, dtype=torch.bool),
        "now": old + draw(0.4),
    }
    if packed:
        batch["cu_seqlens"] = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return batch


def run_loss(batch: dict[str, Any], **options: Any) -> list[torch.Tensor]:
    leaf = batch["now"].clone().requires_grad_()
    given = {"eps_clip": 0.2, "eps_clip_higher": 0.28, "c_clip": None, **options}
    inputs = {name: value for name, value in batch.items() if name != "now"}
    loss = of_areal.grpo_loss_fn(leaf, torch.zeros_like(leaf), inputs, **given)
    loss.backward()
    stats_tracker.export()  # what is logged has to be of one shape in a step
    return [loss.detach(), leaf.grad]


REJECTION = st.sampled_from(
    [
        None,
        RejectionSamplingConfig(level="token", action="mask", metric="ratio", upper=1.2),
        RejectionSamplingConfig(level="token", action="clamp", metric="ratio", upper=1.1),
        RejectionSamplingConfig(
            level="sequence", action="mask", metric="ratio", agg="mean", upper=1.05
        ),
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    packed=st.booleans(),
    dual=st.sampled_from([None, 3.0]),
    high=st.sampled_from([None, 0.28]),
    rejection=REJECTION,
)
def test_loss_and_gradient_are_those_of_areal(
    seed: int, packed: bool, dual: float | None, high: float | None, rejection: Any
) -> None:
    batch = make_batch(seed, packed)
    options = {"c_clip": dual, "eps_clip_higher": high, "rejection_sampling": rejection}
    theirs = run_loss(batch, **options)
    use_loss()
    try:
        ours = run_loss(batch, **options)
    finally:
        of_areal.ppo_actor_loss_fn = ppo_actor_loss_fn
    for name, their, our in zip(("loss", "gradient"), theirs, ours, strict=True):
        what = f"{name} of its grpo_loss_fn; packed and padded, dual clip, rejection sampling"
        note_tensors("areal", what, our, their)
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("packed", [True, False])
def test_what_it_logs_is_what_areal_logs(packed: bool) -> None:
    batch = make_batch(7, packed)
    given = {
        "logprobs": batch["now"],
        "proximal_logprobs": batch["prox_logp"],
        "old_logprobs": batch["logprobs"],
        "advantages": batch["advantages"],
        "loss_mask": batch["loss_mask"].bool(),
        "eps_clip": 0.1,
        "c_clip": 1.3,
        "cu_seqlens": batch.get("cu_seqlens"),
    }
    counted = given["loss_mask"]
    _, theirs = ppo_actor_loss_fn(**given)
    _, ours = actor_loss(None, **given)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name][counted], theirs[name][counted], rtol=1e-5, atol=1e-6)


def test_another_surrogate_is_areals_where_it_has_it(patched: Any) -> None:
    batch = make_batch(3, packed=True)
    batch["prox_logp"] = batch["logprobs"]
    sapo = {"use_sapo_loss": True, "sapo_tau_pos": 1.0, "sapo_tau_neg": 1.05}
    theirs = run_loss(batch, **sapo)
    patched(Sapo(1.0, 1.05))
    ours = run_loss(batch)
    for their, our in zip(theirs, ours, strict=True):
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-6)


def test_options_of_its_own_loss_are_refused() -> None:
    batch = make_batch(0, packed=True)
    with pytest.raises(ValueError, match="importance_sampling_level must be 'token'"):
        actor_loss(
            None,
            batch["now"],
            batch["prox_logp"],
            batch["logprobs"],
            batch["advantages"],
            0.2,
            batch["loss_mask"],
            importance_sampling_level="sequence",
        )


def test_the_example_names_a_workflow_that_areal_can_build() -> None:
    import importlib.util

    path = HERE.parents[2] / "examples" / "areal_igrpo.py"
    spec = importlib.util.spec_from_file_location("areal_igrpo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = SimpleNamespace(
        gconfig=GenerationHyperparameters(n_samples=G, max_new_tokens=8, max_tokens=600),
        tokenizer_path=make_tokenizer(),
    )
    kwargs = {**module.workflow_kwargs(config), "reward_fn": letters}
    _, (batch,) = roll_out(IGRPOWorkflow(**kwargs), make_data("1+1"))
    assert batch["rewards"].shape == (G,)
