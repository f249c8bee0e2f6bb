# Copied word for word from src/prime_rl/orchestrator/algo/{base,routing,grpo}.py of prime-rl 0.8.0 at 559b44772e, Apache-2.0
# (github.com/PrimeIntellect-ai/prime-rl): what gives advantages,
# without its base class and its constructor.
from __future__ import annotations

import torch
import verifiers.v1 as vf


def iter_trainable_traces(episodes: list[vf.Episode]):
    """Yield clean trainable traces that contain sampled tokens."""
    for episode in episodes:
        for trace in episode.traces:
            if trace.has_error or not trace.agent.trainable:
                continue
            if any(any(node.mask) for node in trace.nodes):
                yield episode, trace


def assign_advantages(trace: vf.Trace, values: float | list[float]) -> None:
    """Assign credit in compact sampled-token order across the trace graph."""
    nodes = [node for node in trace.nodes if any(node.mask)]
    for node in nodes:
        if len(node.mask) != len(node.token_ids):
            raise ValueError(
                f"node masks must align with token ids in trace {trace.id!r}: "
                f"got {len(node.mask)}, expected {len(node.token_ids)}"
            )
    total = sum(sum(node.mask) for node in nodes)
    if isinstance(values, (int, float)):
        advantages = [float(values)] * total
    else:
        if len(values) != total:
            raise ValueError(
                f"advantages must align with trace {trace.id!r}'s sampled tokens: got {len(values)}, expected {total}"
            )
        advantages = [float(value) for value in values]

    offset = 0
    for node in nodes:
        end = offset + sum(node.mask)
        node.advantages = advantages[offset:end]
        offset = end


class GRPOAlgorithm:
    """Group Relative Policy Optimization: sample a group of rollouts from the
    policy per example; credit = reward minus the group mean (optionally
    length-shaped); action tokens feed the ``rl`` loss."""

    async def score_group(self, episodes: list[vf.Episode]) -> None:
        traces = [trace for _, trace in iter_trainable_traces(episodes)]
        rewards = torch.tensor([trace.reward for trace in traces], dtype=torch.float32)
        length_penalty = self.length_penalty
        if length_penalty is None:
            advantages = rewards - rewards.mean()
        else:
            output = torch.tensor([trace.num_output_tokens for trace in traces], dtype=rewards.dtype)
            total = torch.tensor([trace.num_total_tokens for trace in traces], dtype=rewards.dtype)
            turns = torch.tensor([trace.num_turns for trace in traces], dtype=rewards.dtype)
            input = total - output
            penalty_frac = (
                length_penalty.num_output_tokens_weight * (output / output.max().clamp(min=1))
                + length_penalty.num_input_tokens_weight * (input / input.max().clamp(min=1))
                + length_penalty.num_turns_weight * (turns / turns.max().clamp(min=1))
            )
            penalty = rewards.mean() * penalty_frac
            shaped_rewards = rewards - penalty
            advantages = shaped_rewards - shaped_rewards.mean()
        for trace, advantage in zip(traces, advantages.tolist(), strict=True):
            assign_advantages(trace, advantage)
