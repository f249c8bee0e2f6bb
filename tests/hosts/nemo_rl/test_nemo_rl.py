"""iGRPO in NeMo-RL's rollout, its groups and its loss.

NeMo-RL needs GPUs to be installed, so these stand here as copies of its source.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

HOSTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOSTS), str(HOSTS / "nemo_rl" / "nemo_rl_0_6")]
from contract import Group
from differences import COPY, note_tensors
from nemo_rl.algorithms import grpo
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossConfig, ClippedPGLossFn
from nemo_rl.algorithms.utils import calculate_baseline_and_std_per_prompt
from nemo_rl.data.llm_message_utils import batched_message_log_to_flat_message
from nemo_rl.distributed.batched_data_dict import BatchedDataDict, EnvironmentReturn
from patient_ray import start_ray
from tiny_qwen3 import make_model, make_tokenizer

from igrpo_algo import DraftRules, DraftTemplate, TextSplice, select_worst_draft
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.nemo_rl import IGRPOLossFn, use_igrpo
from igrpo_kernels import Clip

SHORT = TextSplice(DraftTemplate("[", "]"))
RULES = DraftRules(splice=SHORT)
TOKENIZER = make_tokenizer()
ROLLOUT = grpo.run_multi_turn_rollout
VERSION = "0.6.0"


def letters(text: str) -> float:
    return float(sum(map(ord, text)))


@ray.remote
class Letters:
    """An environment for a random model: the reward is the sum of the letters, after one turn."""

    def step(self, message_logs: list[Any], metadata: list[Any]) -> EnvironmentReturn:
        assert all(info == {"ground_truth": "7"} for info in metadata)
        texts = [log[-1]["content"] for log in message_logs]
        count = len(texts)
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": "Environment: done"}] * count,
            metadata=metadata,
            next_stop_strings=[None] * count,
            rewards=torch.tensor([letters(text) for text in texts]),
            terminateds=torch.ones(count),
            answers=None,
        )


class Generation:
    """Our sampler as NeMo-RL's generation interface."""

    def __init__(self) -> None:
        self.sampler = TransformersSampler(make_model(), TOKENIZER, max_new_tokens=8)
        self.asked: list[list[int]] = []
        self.answered: list[tuple[str, str]] = []

    def generate(self, data: Any, greedy: bool) -> Any:
        lengths = data["input_lengths"].tolist()
        rows = [row[:n].tolist() for row, n in zip(data["input_ids"], lengths, strict=True)]
        seeds = range(len(self.asked), len(self.asked) + len(rows))
        drawn = [
            self.sampler.sample([ids], 1, seed=seed)[0][0]
            for ids, seed in zip(rows, seeds, strict=True)
        ]
        self.asked += rows
        texts = [TOKENIZER.decode(each.token_ids, skip_special_tokens=True) for each in drawn]
        self.answered += zip(map(TOKENIZER.decode, rows), texts, strict=True)
        full = [ids + each.token_ids for ids, each in zip(rows, drawn, strict=True)]
        known = [[0.0] * len(ids) + each.logprobs for ids, each in zip(rows, drawn, strict=True)]
        width = max(map(len, full))
        sizes = torch.tensor([len(each.token_ids) for each in drawn])
        return BatchedDataDict(
            {
                "output_ids": torch.tensor([ids + [0] * (width - len(ids)) for ids in full]),
                "logprobs": torch.tensor([row + [0.0] * (width - len(row)) for row in known]),
                "generation_lengths": sizes,
                "unpadded_sequence_lengths": torch.tensor(lengths) + sizes,
            }
        )


@pytest.fixture(scope="module")
def environment() -> Iterator[Any]:
    folders = [*sys.path[:2], str(HOSTS.parent / "models"), str(HOSTS.parents[1])]
    paths = {"PYTHONPATH": os.pathsep.join(folders)}
    start_ray(1, paths)
    yield Letters.remote()
    ray.shutdown()


@pytest.fixture(autouse=True)
def _own_rollouts_afterwards() -> Iterator[None]:
    yield
    grpo.run_multi_turn_rollout = grpo.run_async_multi_turn_rollout = ROLLOUT


def datum(question: str, number: int) -> dict[str, Any]:
    """What NeMo-RL's math_hf_data_processor makes of a problem."""
    chat = [{"role": "user", "content": question}]
    text = TOKENIZER.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = TOKENIZER(text, return_tensors="pt", add_special_tokens=False)["input_ids"][0]
    return {
        "message_log": [{"role": "user", "content": text, "token_ids": ids}],
        "length": len(ids),
        "extra_env_info": {"ground_truth": "7"},
        "loss_multiplier": 1.0,
        "idx": number,
        "task_name": "letters",
    }


def batch_of(questions: list[str], repeats: int) -> Any:
    rows = [datum(question, number) for number, question in enumerate(questions)]
    batch = BatchedDataDict({name: [row[name] for row in rows] for name in rows[0]})
    for name in ("length", "loss_multiplier"):
        batch[name] = torch.tensor(batch[name])
    return batch.repeat_interleave(repeats)


def roll_out(environment: Any, batch: Any) -> tuple[Generation, Any, dict[str, Any]]:
    generation = Generation()
    done, metrics = grpo.run_multi_turn_rollout(
        policy_generation=generation,
        input_batch=batch,
        tokenizer=TOKENIZER,
        task_to_env={"letters": environment},
        max_seq_len=200,
        max_rollout_turns=1,
        greedy=False,
    )
    return generation, done, metrics


def test_a_group_shares_one_draft_and_its_refinements_are_trained_on(environment: Any) -> None:
    use_igrpo(num_drafts=3, rules=RULES, max_prompt_tokens=100)
    questions = ["1+1?", "Count: 2+2?"]
    batch = batch_of(questions, 4)
    flat, _ = batched_message_log_to_flat_message(batch["message_log"], {"token_ids": 0})
    originals = flat["token_ids"]  # as grpo_train keeps them, to group by
    generation, done, metrics = roll_out(environment, batch)
    baseline, _ = calculate_baseline_and_std_per_prompt(
        originals,
        done["total_reward"],
        torch.ones(8),
        leave_one_out_baseline=False,
    )
    logs = done["message_log"]
    grpo.add_grpo_token_loss_masks_and_generation_logprobs(logs)
    prompts = grpo.extract_initial_prompt_messages(logs, done["length"])
    for group, question in enumerate(questions):
        rows = range(4 * group, 4 * group + 4)
        trained = []
        for row in rows:
            assert [m["token_loss_mask"].bool().any().item() for m in logs[row]] == [0, 1, 0]
            (message,) = prompts[row]
            assert message is logs[row][0]
            trained.append(TOKENIZER.decode(message["token_ids"]))
            assert trained[-1] == message["content"]
        drafts = [text for prompt, text in generation.answered if f"{question}<" in prompt]
        Group(
            question,
            drafts,
            max(drafts, key=letters),
            [prompt for prompt, _ in generation.answered if f"{question}[" in prompt],
            trained,
            done["total_reward"][rows].tolist(),
            (done["total_reward"] - baseline)[rows].tolist(),
        ).check(num_drafts=3, num_refinements=4)
    assert metrics["igrpo_conditioned"] == 1.0
    assert batch["message_log"][0][0]["content"].startswith("<s>user:1+1?</s>")  # not touched


def test_what_is_trained_on_is_what_was_sampled_from(environment: Any) -> None:
    use_igrpo(num_drafts=2, rules=RULES, max_prompt_tokens=100)
    generation, done, _ = roll_out(environment, batch_of(["1+1?"], 2))
    model = make_model()
    for prompt, answer, _ in done["message_log"]:
        ids, drawn = prompt["token_ids"].tolist(), answer["token_ids"]
        assert ids in generation.asked
        with torch.no_grad():
            logits = model(torch.tensor([ids + drawn.tolist()])).logits[0, len(ids) - 1 : -1]
        known = logits.log_softmax(-1).gather(-1, drawn[:, None])[:, 0]
        # the samplers' own bound
        torch.testing.assert_close(known, answer["generation_logprobs"], atol=5e-5, rtol=0)


@pytest.mark.parametrize(("rules", "pick"), [(DraftRules(select_worst_draft), min), (RULES, max)])
def test_the_draft_is_the_one_that_the_rules_choose(
    environment: Any, rules: DraftRules, pick: Any
) -> None:
    rules = DraftRules(rules.select, splice=SHORT)
    use_igrpo(num_drafts=3, rules=rules, max_prompt_tokens=100)
    generation, done, _ = roll_out(environment, batch_of(["1+1?"], 2))
    drafts = [text for _, text in generation.answered[:3]]
    assert f"1+1?[{pick(drafts, key=letters)}]" in done["message_log"][0][0]["content"]


def test_the_draft_is_cut_to_fit_and_the_question_never(environment: Any) -> None:
    plain = datum("1+1?", 0)["length"]
    use_igrpo(num_drafts=2, rules=RULES, max_prompt_tokens=plain + 5)
    _, done, _ = roll_out(environment, batch_of(["1+1?"], 2))
    assert done["length"].tolist() == [plain + 5] * 2
    assert done["message_log"][0][0]["content"].startswith("<s>user:1+1?[")
    use_igrpo(num_drafts=2, rules=RULES, max_prompt_tokens=plain)
    _, done, metrics = roll_out(environment, batch_of(["1+1?"], 2))
    assert done["length"].tolist() == [plain] * 2
    assert metrics["igrpo_conditioned"] == 0.0


def test_validation_is_single_shot(environment: Any) -> None:
    use_igrpo(num_drafts=2, rules=RULES, max_prompt_tokens=100)
    generation, _, metrics = roll_out(environment, batch_of(["1+1?", "2+2?"], 1))
    assert len(generation.asked) == 2
    assert "igrpo_draft_reward" not in metrics


def test_what_can_not_work_is_refused_before_sampling(environment: Any) -> None:
    skipping = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    with pytest.raises(ValueError, match=r"when_failed must not be Fallback\.SKIP"):
        use_igrpo(rules=skipping, max_prompt_tokens=100)
    with pytest.raises(ValueError, match="num_drafts"):
        use_igrpo(num_drafts=0, max_prompt_tokens=100)
    with pytest.raises(ValueError, match="selection_score must be None"):
        use_igrpo(rules=DraftRules(selection_score=len), max_prompt_tokens=100)
    use_igrpo(num_drafts=2, rules=RULES, max_prompt_tokens=100)
    batch = batch_of(["1+1?"], 2)
    batch["message_log"][0][0]["content"] = "1+1?"  # no template was applied
    with pytest.raises(ValueError, match="there is no other place for a draft"):
        roll_out(environment, batch)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("async_grpo.enabled", {"grpo": SimpleNamespace(async_grpo=SimpleNamespace(enabled=True))}),
        ("data_plane.enabled", {"data_plane": {"enabled": True}}),
        ("should_use_nemo_gym", {"env": {"should_use_nemo_gym": True}}),
    ],
)
def test_rollouts_without_drafts_are_refused_before_anything_is_set_up(
    name: str, changed: dict[str, Any]
) -> None:
    use_igrpo(num_drafts=2, rules=RULES, max_prompt_tokens=100)
    plain = {"grpo": SimpleNamespace(async_grpo=None), "data_plane": None, "env": {}}
    grpo.setup(SimpleNamespace(**plain), None, None, None)
    with pytest.raises(ValueError, match=f"{name} must be off"):
        grpo.setup(SimpleNamespace(**plain | changed), None, None, None)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    token_level=st.booleans(),
    dual=st.sampled_from([None, 3.0]),
    kl_coef=st.sampled_from([0.0, 0.1]),
    cap=st.sampled_from([None, 1.5]),
)
def test_loss_and_gradient_are_those_of_nemo_rl(
    seed: int, token_level: bool, dual: float | None, kl_coef: float, cap: float | None
) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (4, 8)
    values = torch.randn(6, *shape, generator=generator, dtype=torch.float64)
    mask = (torch.rand(shape, generator=generator) < 0.7).double()
    mask[:, 1] = 1
    old = -values[0].abs()
    data = {
        "token_mask": mask,
        "sample_mask": torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=torch.float64),
        "advantages": values[1],
        "prev_logprobs": old,
        "generation_logprobs": old + 0.2 * values[3],
        "reference_policy_logprobs": old + 0.3 * values[4],
    }
    seqs, toks = torch.tensor(9.0).double(), torch.tensor(50.0).double()  # of the step
    truncated = (
        {}
        if cap is None
        else {
            "use_importance_sampling_correction": True,
            "truncated_importance_sampling_type": "tis",
            "truncated_importance_sampling_ratio": cap,
        }
    )
    config = ClippedPGLossConfig(
        token_level_loss=token_level,
        ratio_clip_min=0.2,
        ratio_clip_max=0.28,
        ratio_clip_c=dual,
        reference_policy_kl_penalty=kl_coef,
        **truncated,
    )
    ours = IGRPOLossFn(
        Clip(0.2, 0.28, dual),
        token_level=token_level,
        kl_coef=kl_coef,
        max_importance_weight=cap,
    )
    results = []
    for loss_fn in (ClippedPGLossFn(config), ours):
        logprobs = (old + 0.3 * values[2])[:, 1:].requires_grad_()
        loss, metrics = loss_fn(logprobs, data, seqs, toks)
        loss.backward()
        results.append((loss.detach(), logprobs.grad, metrics["num_valid_samples"]))
    assert results[0][2] == results[1][2]
    names = ("loss", "gradient")
    for name, their, our in zip(names, *(each[:2] for each in results), strict=True):
        what = f"{name}; both means, dual clip, KL, weights"
        note_tensors("nemo-rl", what, our, their, version=VERSION, how=COPY)
        # NeMo-RL adds 1e-8 to its denominators; the rest is float64.
        torch.testing.assert_close(our, their, atol=1e-7, rtol=1e-7)
