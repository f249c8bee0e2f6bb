"""Agent loop `igrpo` in two of verl's own workers under Ray: the V1 path and the older one."""

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import ray
import torch
import transfer_queue as tq
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from verl import DataProto
from verl.experimental.agent_loop import AgentLoopManager, AgentLoopWorker
from verl.experimental.reward_loop import RewardLoopWorker
from verl.trainer.ppo.core_algos import compute_grpo_outcome_advantage
from verl.trainer.ppo.v1 import AgentLoopManagerTQ
from verl.utils import tensordict_utils as tu

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from contract import Group
from on_cpu import Client, compute_score
from patient_ray import start_ray
from tiny_qwen3 import make_model, make_tokenizer

G, N, WORKERS = 4, 3, 2
QUESTIONS = ["1+1?", "2+2?", "3+3?"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folders = [str(HERE), str(HERE.parents[1] / "models"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(folders),
        "OMP_NUM_THREADS": "1",
        "VERL_LOGGING_LEVEL": "ERROR",
    }
    start_ray(16, environment)
    yield
    ray.shutdown()


def make_config(model: Path, *overrides: str) -> DictConfig:
    settings = {
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.rollout.name": "vllm",
        "actor_rollout_ref.rollout.prompt_length": 60,
        "actor_rollout_ref.rollout.response_length": 8,
        "actor_rollout_ref.rollout.n": G,
        "actor_rollout_ref.rollout.agent.num_workers": WORKERS,
        "actor_rollout_ref.rollout.agent.default_agent_loop": "igrpo",
        "+igrpo.num_drafts": N,
        "+igrpo.rules": "on_cpu.RULES",
        "reward.custom_reward_function.path": HERE / "on_cpu.py",
    }
    with initialize_config_module("verl.trainer.config", version_base=None):
        lines = [f"{name}={value}" for name, value in settings.items()]
        return compose("ppo_trainer", [*lines, *overrides])


def make_rows(questions: list[str], times: int) -> dict[str, np.ndarray]:
    """What verl's data set gives, each question `times` times with one uid."""
    rows = [
        {
            "raw_prompt": [{"role": "user", "content": question}],
            "data_source": "sums",
            "reward_model": {"ground_truth": "7"},
            "extra_info": {},
            "uid": uid,
            "index": index,
        }
        for index, question in enumerate(questions)
        for uid in [str(uuid4())]
        for _ in range(times)
    ]
    columns = {}
    for name in rows[0]:
        columns[name] = np.empty(len(rows), dtype=object)
        columns[name][:] = [row[name] for row in rows]
    return columns


@pytest.fixture(scope="module")
def workers(
    cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path]:
    """Two agent loop workers and one for rewards, and where they write down what was asked."""
    record = tmp_path_factory.mktemp("record")
    config = make_config(model)
    rewards = [ray.remote(RewardLoopWorker).options(num_cpus=0).remote(config)]
    client = Client(record, model)
    return AgentLoopManager.create(config, client, reward_loop_worker_handles=rewards), record


def run_here(config: DictConfig, record: Path, model: Path) -> None:
    """Run one of verl's workers in this process."""
    worker = AgentLoopWorker(config, Client(record, model))
    asyncio.run(worker.generate_sequences(DataProto(None, make_rows(QUESTIONS, 2))))


def asked(record: Path) -> list[tuple[str, str, list[int]]]:
    return [
        tuple(json.loads(line))
        for file in record.glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]


def check_groups(record: Path, trained: list[list[int]], scores: torch.Tensor | None) -> None:
    """Check each group against what the client was asked for; the rows come group by group."""
    calls = asked(record)
    assert len(calls) == len(QUESTIONS) * (N + G)
    tokenizer = make_tokenizer()
    advantages = scores
    if scores is not None:
        groups = np.repeat(QUESTIONS, G)
        advantages, _ = compute_grpo_outcome_advantage(
            scores[:, None], torch.ones_like(scores)[:, None], groups
        )
    for index, question in enumerate(QUESTIONS):
        rows = slice(G * index, G * (index + 1))
        plain = f"<s>user:{question}</s><s>assistant:"
        drafts = [text for prompt, text, _ in calls if prompt == plain]
        Group(
            question,
            drafts,
            max(drafts, key=lambda text: compute_score(text, "7")),
            [prompt for prompt, *_ in calls if prompt.startswith(f"<s>user:{question}[")],
            [tokenizer.decode(ids) for ids in trained[rows]],
            *([] if scores is None else [scores[rows].tolist(), advantages[rows, 0].tolist()]),
        ).check(N, G)


def test_the_question_is_never_cut(model: Path, tmp_path: Path) -> None:
    length = len("user:1+1?") + 2 + len("assistant:") + 1
    room = f"actor_rollout_ref.rollout.prompt_length={length + 4}"
    run_here(make_config(model, room), tmp_path, model)
    calls = asked(tmp_path)
    assert all(prompt[len("<s>user:") :][:4] in QUESTIONS for prompt, *_ in calls)
    assert max(len(ids) for *_, ids in calls) <= length + 4
    assert torch.tensor([len(ids) > length for *_, ids in calls]).any()
    tight = f"actor_rollout_ref.rollout.prompt_length={length - 1}"
    with pytest.raises(ValueError, match="a question is never cut"):
        run_here(make_config(model, tight), tmp_path, model)


def test_what_can_not_work_is_refused_before_sampling(model: Path, tmp_path: Path) -> None:
    wanted = {
        "actor_rollout_ref.rollout.full_determinism=true": "full_determinism must be off",
        "actor_rollout_ref.rollout.multi_turn.enable=true": "multi_turn.enable must be off",
        "igrpo.num_drafts=0": "num_drafts",
        "+igrpo.drafts=3": "unexpected keyword argument 'drafts'",
    }
    for override, message in wanted.items():
        with pytest.raises(Exception, match=message):
            run_here(make_config(model, override), tmp_path, model)
    assert not asked(tmp_path)


def test_a_group_dealt_to_two_workers_has_one_draft(workers: tuple[Any, Path]) -> None:
    """Three groups of four go to two workers as six and six: the second group is split."""
    manager, record = workers
    output = manager.generate_sequences(DataProto(None, make_rows(QUESTIONS, G)))
    assert len(list(record.glob("*.jsonl"))) == WORKERS
    masks = output.batch["attention_mask"][:, :60].bool()
    prompts = [ids[mask].tolist() for ids, mask in zip(output.batch["prompts"], masks, strict=True)]
    scores = output.batch["rm_scores"].sum(-1)
    check_groups(record, prompts, scores)
    tokenizer = make_tokenizer()
    for ids, mask, score in zip(
        output.batch["responses"], output.batch["response_mask"], scores, strict=True
    ):
        text = tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        assert score.item() == pytest.approx(compute_score(text, "7"), abs=1e-6)


def test_validation_is_single_shot(workers: tuple[Any, Path]) -> None:
    manager, record = workers
    for file in record.glob("*.jsonl"):
        file.unlink()
    manager.generate_sequences(DataProto(None, make_rows(QUESTIONS, G), {"validate": True}))
    calls = asked(record)
    assert len(calls) == len(QUESTIONS) * G
    assert all(prompt.endswith("?</s><s>assistant:") for prompt, *_ in calls)


def test_v1_trains_each_group_on_one_stage_two_prompt(
    cluster: None, model: Path, tmp_path: Path
) -> None:
    config = make_config(model, "transfer_queue.backend.SimpleStorage.num_data_storage_units=1")
    tq.init(config.transfer_queue)
    manager = AgentLoopManagerTQ.create(config, Client(tmp_path, model))
    batch = tu.get_tensordict(make_rows(QUESTIONS, 1))
    tu.assign_non_tensor_data(batch, "global_steps", 1)
    uids = list(batch["uid"])
    tags = [{"is_prompt": True, "status": "pending", "global_steps": 1}] * len(uids)
    tq.kv_batch_put(keys=uids, partition_id="train", tags=tags)
    manager.generate_sequences(batch)
    deadline = time.monotonic() + 900
    while True:
        known = tq.kv_list(partition_id="train")["train"]
        states = [known[uid]["status"] for uid in uids]
        if all(state in ("finished", "failure") for state in states):
            break
        if time.monotonic() > deadline:
            pytest.fail(f"not finished in time: {states}")
        time.sleep(0.2)
    assert states == ["finished"] * len(uids)
    keys = [f"{uid}_{session}_0" for uid in uids for session in range(G)]
    data = tq.kv_batch_get(keys=keys, partition_id="train")
    prompts = [ids.tolist() for ids in data["prompts"].unbind()]
    check_groups(tmp_path, prompts, None)
