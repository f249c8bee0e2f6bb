"""iGRPO under OpenRLHF's own executor base, its way of loading an agent file, and its own loss.

`generate_responses` and `_load_agent_executor` stand in a module that imports vLLM and ray; their
sources are taken from the installed file and run as they are.
"""

import ast
import asyncio
import importlib
import sys
import types
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openrlhf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openrlhf.utils.agent import AgentExecutorBase

sys.path.insert(0, str(Path(__file__).parents[1]))
from contract import Group
from differences import note_tensors
from tiny_qwen3 import make_model, make_tokenizer

from igrpo_algo import DraftRules, DraftTemplate, TextSplice, select_worst_draft
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.openrlhf import PolicyLoss, make_agent_executor

EXAMPLE = Path(__file__).parents[3] / "examples" / "openrlhf_agent.py"
ROOT = Path(openrlhf.__path__[0])
SHORT = TextSplice(DraftTemplate("[", "]"))


def borrow(file: str, *names: str, **namespace: Any) -> SimpleNamespace:
    """Run some functions of an installed file without importing what else stands in it."""
    tree = ast.parse((ROOT / file).read_text())
    found = {
        node.name: node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name in names
    }
    assert set(found) == set(names)
    module = ast.Module([found[name] for name in names], [])
    exec(compile(module, file, "exec"), namespace)
    return SimpleNamespace(**{name: namespace[name] for name in names})


ENGINE = borrow(
    "trainer/ray/vllm_engine.py",
    "_load_agent_executor",
    "generate_responses",
    asyncio=asyncio,
    AgentExecutorBase=AgentExecutorBase,
    Optional=object,
)


class Actor:
    """OpenRLHF's rollout actor with our transformers sampler in the place of vLLM."""

    generate_responses = ENGINE.generate_responses

    def __init__(self, executor: AgentExecutorBase) -> None:
        self.executor = executor
        self.sampler = TransformersSampler(make_model(), make_tokenizer(), max_new_tokens=8)
        self.asked: list[list[int]] = []
        self.answered: list[tuple[str, str]] = []

    async def generate(self, ids: list[int], params: Any, multi_modal_data: None) -> Any:
        self.asked.append(ids)
        seed = len(self.asked)
        await asyncio.sleep(0)
        ((drawn,),) = self.sampler.sample([ids], 1, seed=seed)
        self.answered.append((self.sampler.tokenizer.decode(ids), drawn.text))
        logprobs = [
            {token: SimpleNamespace(logprob=logprob)}
            for token, logprob in zip(drawn.token_ids, drawn.logprobs, strict=True)
        ]
        output = SimpleNamespace(
            token_ids=drawn.token_ids,
            text=drawn.text,
            logprobs=logprobs,
            finish_reason=drawn.finish_reason,
        )
        return SimpleNamespace(outputs=[output])


def length_reward(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    assert columns["label"] == answer
    return [float(sum(map(ord, c[0]["content"]))) for c in completions]


def rollout(
    executor: type[AgentExecutorBase], prompts: list[Any], samples: int, max_length: int = 120
) -> tuple[Actor, list[list[dict[str, Any]]]]:
    actor = Actor(executor())
    params = SimpleNamespace(max_tokens=8, logprobs=1)

    async def all_groups() -> list[Any]:
        groups = (
            actor.generate_responses(
                prompt=prompt,
                label="7",
                sampling_params=deepcopy(params),
                max_length=max_length,
                hf_tokenizer=make_tokenizer(),
                num_samples=samples,
            )
            for prompt in prompts
        )
        return await asyncio.gather(*groups)

    return actor, asyncio.run(all_groups())


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def shown(actor: Actor) -> list[str]:
    return [actor.sampler.tokenizer.decode(ids) for ids in actor.asked]


def test_a_group_shares_one_draft_and_each_group_has_its_own() -> None:
    executor = make_agent_executor(length_reward, rules=DraftRules(splice=SHORT), num_drafts=3)
    actor, groups = rollout(executor, [chat("1+1?"), chat("2+2?")], samples=4)
    assert len(actor.asked) == 2 * (3 + 4)
    assert len(set(shown(actor))) == 4  # two questions, two spliced ones
    tokenizer = actor.sampler.tokenizer
    for group, question in zip(groups, ("1+1?", "2+2?"), strict=True):
        plain = f"<s>user:{question}</s><s>assistant:"
        drafts = [text for prompt, text in actor.answered if prompt == plain]
        Group(
            question,
            drafts,
            max(drafts, key=lambda text: sum(map(ord, text))),
            [prompt for prompt in shown(actor) if prompt.startswith(f"<s>user:{question}[")],
            [tokenizer.decode(r["observation_tokens"][: r["action_ranges"][0][0]]) for r in group],
        ).check(num_drafts=3, num_refinements=4)


@pytest.mark.parametrize(("select", "pick"), [(None, max), (select_worst_draft, min)])
def test_the_draft_is_the_one_that_the_rules_choose(select: Any, pick: Any) -> None:
    rules = DraftRules(splice=SHORT) if select is None else DraftRules(select, splice=SHORT)
    seen: list[list[float]] = []

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.append([float(sum(map(ord, c[0]["content"]))) for c in completions])
        texts.append([c[0]["content"] for c in completions])
        return seen[-1]

    texts: list[list[str]] = []
    actor, _ = rollout(make_agent_executor(reward, rules=rules), [chat("1?")], samples=2)
    chosen = texts[0][seen[0].index(pick(seen[0]))]
    spliced = shown(actor)[-1]
    assert f"[{chosen}]" in spliced


def test_rewards_see_the_original_prompt_and_the_refinement() -> None:
    prompts_seen: list[Any] = []

    def reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        prompts_seen.extend(prompts)
        return [1.0] * len(completions)

    executor = make_agent_executor(reward, rules=DraftRules(splice=SHORT), num_drafts=2)
    _, ((response, *_),) = rollout(executor, [chat("1+1?")], samples=3)
    assert prompts_seen == [chat("1+1?")] * (2 + 3)
    assert response["prompt"] == chat("1+1?")
    assert (response["reward"], response["scores"]) == (1.0, 1.0)


def test_what_is_trained_on_is_what_was_sampled_from() -> None:
    executor = make_agent_executor(length_reward, rules=DraftRules(splice=SHORT), num_drafts=2)
    actor, ((*responses,),) = rollout(executor, [chat("1+1?")], samples=3)
    model = make_model()
    for response in responses:
        ((start, end),) = response["action_ranges"]
        tokens = response["observation_tokens"]
        assert tokens[:start] in actor.asked
        assert len(response["rollout_log_probs"]) == len(tokens) == end
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0, start - 1 : -1]
        known = logits.log_softmax(-1).gather(-1, torch.tensor(tokens[start:])[:, None])[:, 0]
        sampled = torch.tensor(response["rollout_log_probs"][start:])
        torch.testing.assert_close(known, sampled, atol=5e-5, rtol=0)  # the samplers' own bound


def test_the_question_is_never_cut() -> None:
    executor = make_agent_executor(length_reward, rules=DraftRules(splice=SHORT), num_drafts=2)
    actor, _ = rollout(executor, [chat("1+1?")], samples=2, max_length=38)
    assert all(text.startswith("<s>user:1+1?") for text in shown(actor))
    assert max(map(len, actor.asked)) <= 38 - 8
    with pytest.raises(ValueError, match="a question is never cut"):
        rollout(executor, [chat("a question that is far too long for it")], 1, max_length=38)


def test_the_next_epoch_draws_new_drafts() -> None:
    executor = make_agent_executor(length_reward, rules=DraftRules(splice=SHORT), num_drafts=2)
    actor = Actor(executor())
    params = SimpleNamespace(max_tokens=8, logprobs=1)

    async def twice() -> None:
        for _ in range(2):
            await actor.generate_responses(
                prompt=chat("1?"),
                label="7",
                sampling_params=params,
                max_length=120,
                hf_tokenizer=make_tokenizer(),
                num_samples=2,
            )

    asyncio.run(twice())
    assert len(actor.asked) == 2 * (2 + 2)


def test_the_agent_file_of_the_examples_is_loaded_as_openrlhf_loads_it(tmp_path: Path) -> None:
    file = tmp_path / "agent.py"
    lines = EXAMPLE.read_text().splitlines()
    reward = "def math_reward(completions, **columns): return [1.0] * len(completions)"
    file.write_text("\n".join(reward if "import math_reward" in line else line for line in lines))
    executor = ENGINE._load_agent_executor(str(file))
    _, ((response, *_),) = rollout(type(executor), [chat("1?")], samples=2, max_length=600)
    assert response["reward"] == 1.0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<s>user:1?</s><s>assistant:", "a chat template was applied"),
        ([{"role": "assistant", "content": "1"}], "user message"),
    ],
)
def test_prompts_without_a_place_for_a_draft_are_refused(prompt: Any, message: str) -> None:
    executor = make_agent_executor(length_reward, rules=DraftRules(splice=SHORT), num_drafts=1)
    with pytest.raises(ValueError, match=message):
        rollout(executor, [prompt], samples=1)


def test_what_can_not_work_is_refused_before_sampling() -> None:
    rules = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    with pytest.raises(ValueError, match=r"when_failed must not be Fallback\.SKIP"):
        make_agent_executor(length_reward, rules=rules)
    with pytest.raises(ValueError, match="num_drafts"):
        make_agent_executor(length_reward, num_drafts=0)
    unscored = make_agent_executor(lambda completions, **_: [None] * len(completions), num_drafts=1)
    with pytest.raises(ValueError, match="reward must score every refinement"):
        rollout(unscored, [chat("1?")], samples=1, max_length=600)


def load_losses() -> Any:
    """Import OpenRLHF's losses without the rest of its models, which want flash-attn."""
    package = types.ModuleType("openrlhf.models")
    package.__path__ = [str(ROOT / "models")]
    sys.modules.setdefault("openrlhf.models", package)
    return importlib.import_module("openrlhf.models.loss")


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    token_level=st.booleans(),
    dual=st.sampled_from([None, 3.0]),
    whole=st.booleans(),
)
def test_loss_and_gradient_are_those_of_openrlhf(
    seed: int, token_level: bool, dual: float | None, whole: bool
) -> None:
    from igrpo_kernels import Clip

    generator = torch.Generator().manual_seed(seed)
    shape = (4, 7)
    values = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    mask = (torch.rand(shape, generator=generator) < 0.7).double()
    mask[:, 0] = 1
    old, advantages = -values[0].abs(), values[1]
    batch = {"batch_num_tokens": 50.0, "global_batch_size": 9.0, "dp_size": 2} if whole else {}
    theirs = load_losses().PolicyLoss(0.2, 0.3, dual, token_level_loss=token_level)
    ours = PolicyLoss(Clip(0.2, 0.3, dual), token_level_loss=token_level)
    results = []
    for loss in (theirs, ours):
        logprobs = (old + 0.3 * values[2]).requires_grad_()
        value, clipped, kl, *_ = loss(logprobs, old, advantages, action_mask=mask, **batch)
        value.backward()
        results.append((value.detach(), logprobs.grad, clipped, kl))
    # OpenRLHF adds 1e-8 to a sequence's token count; the rest is float64.
    for name, (their, our) in zip(("loss", "gradient"), zip(*results, strict=True), strict=False):
        note_tensors("openrlhf", f"{name}; token and sequence means, clipped and dual", our, their)
    for their, our in zip(*results, strict=True):
        torch.testing.assert_close(our, their.double(), atol=1e-8, rtol=1e-7, check_dtype=False)
