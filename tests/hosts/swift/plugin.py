"""The plugin that the test gives ms-swift: a reward, a record of what each rank saw, and iGRPO.

iGRPO stays as the plugin before this one set it up where IGRPO_DRAFTS is empty.
"""

import json
import os
from pathlib import Path
from typing import Any

import swift.rlhf_trainers
import torch
from swift.rewards import ORM, orms

from igrpo_algo import DraftRules, DraftTemplate, TextSplice, policy_loss
from igrpo_algo.trainers.swift import use_igrpo
from igrpo_kernels import Clip, SequenceMean

RECORD = Path(os.environ["IGRPO_RECORD"])
RANK = os.environ.get("RANK", "0")


def record(**entry: Any) -> None:
    with (RECORD / f"rank{RANK}.jsonl").open("a") as file:
        print(json.dumps(entry), file=file)


class Letters(ORM):
    """Graded and deterministic: the share of characters before K."""

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        rewards = [sum(c < "K" for c in text) / (len(text) + 1) for text in completions]
        record(scored=completions, rewards=rewards, solution=columns["solution"])
        return rewards


orms["letters"] = Letters
if drafts := os.environ["IGRPO_DRAFTS"]:
    rules = DraftRules(splice=TextSplice(DraftTemplate("[", "]")))
    use_igrpo(rules=rules, num_drafts=int(drafts))
Trainer = swift.rlhf_trainers.GRPOTrainer
theirs = {
    "encode": Trainer._prepare_batch_inputs,
    "logps": Trainer._get_per_token_logps_and_entropies,
    "loss": Trainer._compute_loss_and_metrics,
}


def encode(self: Any, samples: list[Any]) -> Any:
    record(trained=[s.messages[-2]["content"] for s in samples])
    return theirs["encode"](self, samples)


def logps(self: Any, *args: Any, **kwargs: Any) -> Any:
    self.last_logps, entropies = theirs["logps"](self, *args, **kwargs)
    return self.last_logps, entropies


def loss(self: Any, model: Any, model_inputs: Any, batch: Any) -> Any:
    result = theirs["loss"](self, model, model_inputs, batch)
    ours = policy_loss(
        self.last_logps,
        batch.advantages,
        batch.completion_mask,
        surrogate=Clip(self.epsilon_low, self.epsilon_high),
        aggregate=SequenceMean(),
        old_logprobs=batch.old_per_token_logps,
    ).loss
    value = result[0] if isinstance(result, tuple) else result
    (their_gradient,) = torch.autograd.grad(value, self.last_logps, retain_graph=True)
    (our_gradient,) = torch.autograd.grad(ours, self.last_logps, retain_graph=True)
    gap = (their_gradient - our_gradient).abs().max()
    record(loss=[value.item(), ours.item()], gradient_gap=gap.item())
    return result


Trainer._prepare_batch_inputs = encode
Trainer._get_per_token_logps_and_entropies = logps
Trainer._compute_loss_and_metrics = loss
