"""A micro-batch as the loss sees it: one completion per row, drafts and refinements among them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels.sequences import Sequences


@dataclass(frozen=True)
class LossRows:
    """B completions with all that their loss depends on.

    Attributes:
        prompt_ids: Padded on the left. Shape [B, S].
        prompt_mask: 1 where a prompt token stands. Shape [B, S].
        completion_ids: Padded on the right. Shape [B, T].
        mask: 1 where a completion token counts. Shape [B, T].
        advantages: Shape [B].
        is_draft: Whether the row belongs to Stage 1. Shape [B].
        weights: Each token's weight in the loss of the step. Shape [B, T].
        old_logprobs: Log-probs at sampling time; None: the policy is the one that sampled. [B, T].
        ref_logprobs: Log-probs under the reference, or None. Shape [B, T].
        sampler_logprobs: Log-probs that the engine reported, or None. Shape [B, T].
        importance_weights: Correction for the engine, or None. Shape [B, T].
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    mask: Tensor
    advantages: Tensor
    is_draft: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    sampler_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Any], weights: Tensor) -> "LossRows":
        """Read them off a batch of TRL's."""
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        correction = inputs.get("importance_sampling_ratio")
        return cls(
            inputs["prompt_ids"],
            inputs["prompt_mask"],
            inputs["completion_ids"],
            mask,
            advantages,
            inputs.get("is_draft", torch.zeros_like(advantages, dtype=torch.bool)),
            weights.expand(mask.shape),
            inputs.get("old_per_token_logps"),
            inputs.get("ref_per_token_logps"),
            inputs.get("sampling_per_token_logps"),
            None if correction is None else correction.expand(mask.shape),
        )

    def take(self, which: Tensor) -> "LossRows":
        """Keep some rows: an index or a mask over B."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        kept: dict[str, Any] = {k: None if v is None else v[which] for k, v in values.items()}
        return LossRows(**kept)

    def that_teach(self) -> "LossRows":
        """Keep the rows whose advantage is not zero; one of the others if there is none.

        A forward there must be: ranks wait for each other in it, and the loss hangs on its graph.
        """
        teaches = self.advantages != 0
        teaches[0] |= ~teaches.any()
        return self.take(teaches)

    @property
    def input_ids(self) -> Tensor:
        """Prompts and completions. Shape [B, S + T]."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def attention_mask(self) -> Tensor:
        """1 where a token stands that counts. Shape [B, S + T]."""
        return torch.cat([self.prompt_mask, self.mask], dim=1)

    @property
    def sequences(self) -> Sequences:
        """The completions' layout."""
        return Sequences.of(self.mask, self.mask)


def join_stages(
    rounds: Sequence[Mapping[str, Any]], drafts: Mapping[str, Any] | None, *, pad_token_id: int
) -> dict[str, Any]:
    """Put the rows of all rounds of refinement below each other, and those of the drafts last.

    Prompts are padded on the left, what belongs to completions on the right. The rounds' token
    counts add up. `is_draft` [B] tells the drafts' rows apart, and their token count becomes
    `num_draft_items_in_batch`.

    Args:
        rounds: TRL's batches of Stage 2, one or more.
        drafts: TRL's batch of Stage 1 where it is trained, or None.
        pad_token_id: What stands in masked slots of ids.

    Returns:
        One batch with the rows of all.
    """
    stages = [*rounds] if drafts is None else [*rounds, drafts]
    batch: dict[str, Any] = {}
    for name in rounds[0]:
        fill = pad_token_id if name.endswith("_ids") else 0
        batch[name] = _stack([s[name] for s in stages], fill, left=name.startswith("prompt_"))
    batch["num_items_in_batch"] = sum(each["num_items_in_batch"] for each in rounds)
    if drafts is not None:
        rows = torch.arange(len(batch["advantages"]), device=batch["advantages"].device)
        batch["is_draft"] = rows >= len(rows) - len(drafts["advantages"])
        batch["num_draft_items_in_batch"] = drafts["num_items_in_batch"]
    return batch


def _stack(parts: Sequence[Tensor], fill: float, *, left: bool) -> Tensor:
    if parts[0].dim() == 0:
        return parts[0]
    if parts[0].dim() == 1:
        return torch.cat([*parts])
    width = max(rows.shape[1] for rows in parts)

    def widen(rows: Tensor) -> Tensor:
        missing = width - rows.shape[1]
        return torch.nn.functional.pad(rows, (missing, 0) if left else (0, missing), value=fill)

    return torch.cat([widen(rows) for rows in parts])
