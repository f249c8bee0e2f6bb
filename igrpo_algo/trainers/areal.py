"""iGRPO in AReaL 1.0: a rollout workflow for `PPOTrainer.train`, and its loss.

    trainer.train(
        workflow="igrpo_algo.trainers.areal.IGRPOWorkflow",
        workflow_kwargs={"reward_fn": ..., "gconfig": ..., "tokenizer": ...,
                         "num_drafts": 8},
        eval_workflow="areal.workflow.rlvr.RLVRWorkflow", ...)

G is `gconfig.n_samples`: AReaL runs that many episodes of a prompt together, on one workflow, and
the first of them runs Stage 1 for all. AReaL averages its loss over tokens, not over sequences as
equation 5 of the paper does, and has no option for that; advantages by `actor.reward_norm` over
groups of G, without `actor.adv_norm`, are the paper's.
"""

import asyncio
import math
import uuid
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels import Clip, Sum
from igrpo_kernels.sequences import Sequences
from igrpo_kernels.surrogates import Surrogate
from igrpo_kernels.surrogates.base import Tokens

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..prompts import Prompt
from ..rollouts.once_per_group import HostDraft, OncePerGroup, fit_to_tokenizer
from .refusals import refuse_media, refuse_templated
from .versions import requires

with requires("areal", "1.0", "1.0"):
    import areal.trainer.ppo.actor
    from areal import workflow_context
    from areal.api import AsyncRewardWrapper, InferenceEngine, ModelRequest, ModelResponse
    from areal.utils import stats_tracker
    from areal.utils.dynamic_import import import_from_string
    from areal.utils.functional import apply_rejection_sampling
    from areal.workflow.rlvr import RLVRWorkflow


class IGRPOWorkflow(RLVRWorkflow):
    """Draws one refinement; in evaluation, one plain completion.

    Rewards see the original prompt in both stages. A draft is cut to what `gconfig.max_tokens` less
    `gconfig.max_new_tokens` leaves for prompts.

    Args:
        args: Of AReaL's `RLVRWorkflow`, which has the reward, the tokenizer and the columns.
        rules: How a draft is chosen and spliced.
        num_drafts: N.
        seed: For random ties, random drafts and dropout.
        kwargs: Of `RLVRWorkflow`, likewise.

    Raises:
        ValueError: `num_drafts` is below 1, or the rules leave prompts out of Stage 2.
    """

    reward_fn: Any

    def __init__(
        self,
        *args: Any,
        rules: DraftRules = DraftRules(),  # frozen
        num_drafts: int = 4,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.reward_fn, str):
            self.reward_fn = import_from_string(self.reward_fn)
            self.async_reward_fn = AsyncRewardWrapper(self.reward_fn)
        room = self.gconfig.max_tokens - self.gconfig.max_new_tokens
        kind = {"enable_thinking": self.enable_thinking}
        fitted = fit_to_tokenizer(rules, self.tokenizer, room, kind)
        self.stage_one = OncePerGroup(rules=fitted, num_drafts=num_drafts, seed=seed)

    async def arun_episode(
        self, engine: InferenceEngine, data: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Draw one refinement for the group that `data` belongs to.

        Raises:
            ValueError: The prompt is a string to which a chat template was applied, or has images.
        """
        if workflow_context.get().is_eval:
            return await super().arun_episode(engine, data)
        prompt = self.data_extract_prompt_fn(data)
        refuse_media(any(data.get(name) for name in ("images", "videos")))
        refuse_templated(prompt, self.tokenizer, "leave data_extract_prompt_fn as it is")
        question = self.tokenizer.decode(self._encode(prompt))

        async def draw(_: int) -> HostDraft:
            response = await engine.agenerate(self._request(prompt))
            return HostDraft.decoded(response.output_tokens, self.tokenizer, host=response)

        async def score(drafts: Sequence[HostDraft]) -> list[float]:
            rewards = await asyncio.gather(
                *(self._compute_rewards(draft.host, question, data) for draft in drafts)
            )
            return [math.nan if reward is None else float(reward) for reward in rewards]

        # AReaL starts the episodes of a group together and hands all of them the same dict.
        stage_two = await self.stage_one.prompt(id(data), prompt, draw, score, columns=data)
        stats_tracker.get(workflow_context.stat_scope()).scalar(**stage_two.logs())
        request = self._request(stage_two.prompt)
        response, reward = await self._collect_samples(engine, request, question, data)
        return _as_areal(response, reward)

    def _encode(self, prompt: Prompt) -> list[int]:
        return list(self.get_input_ids_fn(prompt, self.tokenizer, self.enable_thinking))

    def _request(self, prompt: Prompt) -> ModelRequest:
        return ModelRequest(
            rid=uuid.uuid4().hex,
            input_ids=self._encode(prompt),
            gconfig=self.gconfig.new(n_samples=1),
            tokenizer=self.tokenizer,
        )


def _as_areal(response: ModelResponse, reward: float) -> dict[str, Tensor]:
    """Lay a refinement out as AReaL's own workflow does: a batch of one."""
    prompt, drawn = response.input_len, response.output_len
    rows = {
        "input_ids": (response.input_tokens + response.output_tokens, torch.int32),
        "loss_mask": ([0] * prompt + [1] * drawn, torch.int32),
        "logprobs": ([0.0] * prompt + response.output_logprobs, torch.float32),
        "versions": ([-1] * prompt + response.output_versions, torch.int32),
        "attention_mask": ([1] * (prompt + drawn), torch.bool),
        "rewards": (reward, torch.float32),
    }
    return {name: torch.tensor([row], dtype=dtype) for name, (row, dtype) in rows.items()}


def use_loss(surrogate: Surrogate | None = None) -> None:
    """Make AReaL train with a surrogate of ours from here on, in this process.

    AReaL has no hook for its loss: this replaces `ppo_actor_loss_fn` where its `grpo_loss_fn` looks
    it up. It must be called in the process that trains: in a script started per rank, or in the
    module of an engine that AReaL's workers import.

    Args:
        surrogate: Any surrogate of `igrpo_kernels`; None: AReaL's clip, from `actor.eps_clip`,
            `eps_clip_higher` and `c_clip`.
    """
    areal.trainer.ppo.actor.ppo_actor_loss_fn = partial(actor_loss, surrogate)


def actor_loss(
    surrogate: Surrogate | None,
    logprobs: Tensor,
    proximal_logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    eps_clip: float,
    loss_mask: Tensor,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    rejection_sampling: Any = None,
    importance_sampling_level: str = "token",
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """Compute the loss in AReaL's signature, packed [L] or padded [B, T].

    Raises:
        ValueError: `importance_sampling_level` is not "token".
    """
    if importance_sampling_level != "token":
        raise ValueError(
            "importance_sampling_level must be 'token', got "
            f"{importance_sampling_level!r}: SequenceClip is a surrogate of its own"
        )
    count = loss_mask.count_nonzero().clamp(min=1)  # of all, as AReaL weights its micro-batches
    weights, stats = None, {}
    if rejection_sampling is not None:
        kept = apply_rejection_sampling(
            proximal_logprobs=proximal_logprobs,
            old_logprobs=old_logprobs,
            loss_mask=loss_mask,
            cu_seqlens=cu_seqlens,
            config=rejection_sampling,
        )
        loss_mask, weights = kept.loss_mask, kept.behave_imp_weight
        behave_mask = (weights > 0) & loss_mask.bool()
        approx_kl = (proximal_logprobs - old_logprobs).detach().where(behave_mask, 0.0)
        stats = {
            "behave_approx_kl": approx_kl,
            "behave_imp_weight": weights.detach(),
            "behave_mask": behave_mask,
            "filtered_fraction": kept.filtered_fraction,
        }
    upper = eps_clip if eps_clip_higher is None else eps_clip_higher
    surrogate = surrogate or Clip(eps_clip, upper, c_clip)
    loss = policy_loss(
        logprobs,
        advantages,
        loss_mask,
        surrogate=surrogate,
        aggregate=Sum(count),
        old_logprobs=proximal_logprobs,
        importance_weights=weights,
        cu_seqlens=cu_seqlens,
    ).loss
    with torch.no_grad():
        sequences = Sequences.of(logprobs, loss_mask, cu_seqlens)
        now, old = sequences.select(logprobs.detach()), sequences.select(proximal_logprobs)
        tokens = Tokens(now, old, sequences.select(advantages), sequences)
        terms = surrogate(tokens)
        never = torch.zeros_like(sequences.mask)
        clipped = [never if side is None else side for side in terms[1:]]
        capped = never if c_clip is None else (advantages < 0) & (tokens.ratio > c_clip)
    return loss, {
        "loss": terms.losses if weights is None else terms.losses * weights,
        "importance_weight": tokens.ratio,
        "approx_kl": tokens.log_ratio,
        "clip_mask": (clipped[0] | clipped[1]) & sequences.mask,
        "dual_clip_mask": capped & sequences.mask,
        **stats,
    }
