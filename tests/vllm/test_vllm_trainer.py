"""`IGRPOTrainer` on a real engine: both stages streamed, weights synced after each update."""

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from servers import VllmServer
from tiny_models import engine, make_model, make_tokenizer

from igrpo_algo.engines.vllm import VllmSampler, VllmServerSampler

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL names the versions of vLLM that its own generation takes
    from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer

KIND = "qwen3 tied"
# The engine's float32 against the trainer's, on weights that no longer are the first ones: a sync
# that did not come shows as differences of 0.1 and more.
TOLERANCE = 2e-4


def early_letters(completions: list[Any], **columns: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    return [sum(letter < "K" for letter in text) / (len(text) + 1) for text in texts]


class Watched:
    """A sampler that tells when it is synced, and may lose a server before that."""

    def __init__(self, sampler: Any, killed: dict[int, VllmServer] | None = None) -> None:
        self.sampler = sampler
        self.killed = killed or {}
        self.synced: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)

    def sync_weights(self, weights: dict[str, torch.Tensor]) -> None:
        if server := self.killed.get(len(self.synced)):
            server.kill()
        self.synced.append(torch.cat([value.flatten() for value in weights.values()]))
        self.sampler.sync_weights(weights)


def train(sampler: Any, folder: Any, steps: int = 4) -> list[dict[str, Any]]:
    prompts = [[{"role": "user", "content": f"{n}+{n}?"}] for n in range(8)]
    args = IGRPOConfig(
        str(folder),
        num_drafts=2,
        num_refinements=4,
        per_device_train_batch_size=8,
        max_completion_length=12,
        max_steps=steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = IGRPOTrainer(
        make_model(KIND, 1),  # not the weights that the engine was made with
        early_letters,
        args,
        Dataset.from_dict({"prompt": prompts}),
        processing_class=make_tokenizer(),
        sampler=sampler,
    )
    trainer.train()
    return [log for log in trainer.state.log_history if "reward" in log]


def check(logs: list[dict[str, Any]], watched: Watched, steps: int = 4) -> None:
    assert len(logs) == len(watched.synced) == steps
    for before, after in pairwise(watched.synced):
        assert float((before - after).abs().max()) > 1e-3
    for log in logs:
        assert log["sampling/sampling_logp_difference/max"] < TOLERANCE
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=5e-3)
        assert log["igrpo/plain_prompts"] == 0.0


def test_the_engine_in_this_process_follows_the_trainer(folders, tmp_path) -> None:
    watched = Watched(VllmSampler(engine(folders[KIND]), max_new_tokens=12))
    check(train(watched, tmp_path), watched)


def test_servers_follow_the_trainer_and_one_may_die(folders, tmp_path) -> None:
    servers = [
        VllmServer(folders[KIND], tmp_path / f"{number}.log", "processed_logprobs")
        for number in range(2)
    ]
    try:
        for server in servers:
            server.wait()
        urls = [server.url for server in servers]
        sampler = VllmServerSampler(urls, make_tokenizer(), max_new_tokens=12)
        watched = Watched(sampler, killed={2: servers[1]})
        with pytest.warns(UserWarning, match="left out until a later sync_weights"):
            logs = train(watched, tmp_path / "run")
        check(logs, watched)
        assert servers[0].drawn() > 0
    finally:
        for server in servers:
            server.stop()
