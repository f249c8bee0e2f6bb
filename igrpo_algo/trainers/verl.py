r"""iGRPO in verl 0.9: installing this package adds loss mode and agent loop `igrpo`.

verl loads this file through the entry point `verl.plugins`, in the driver and in Ray's workers:

    python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo \
        actor_rollout_ref.rollout.agent.default_agent_loop=igrpo +igrpo.num_drafts=8 \
        actor_rollout_ref.actor.policy_loss.loss_mode=igrpo \
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean

Settings, all optional, go under `igrpo`: `num_drafts`, `rules` (the dotted name of a
`DraftRules`) and `seed`. G is `rollout.n`. Drafts are scored by verl's own reward manager. verl
cuts prompts longer than `rollout.prompt_length` from the left, the question first, so a draft is
cut to fit into it. Validation is single-shot: there a choice of drafts would read the labels.
"""

import asyncio
import functools
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from igrpo_kernels import Clip, SequenceMean, Sum
from igrpo_kernels.aggregates import Aggregate

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..rollouts.once_per_group import HostDraft, OncePerGroup, StageTwoPrompt, fit_to_tokenizer
from .refusals import refuse_long, refuse_media, refuse_on
from .versions import requires

with requires("verl", "0.9", "0.9"):
    import ray
    from hydra.utils import get_object
    from tensordict import TensorDict
    from verl import DataProto
    from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, AgentLoopWorker, register
    from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop
    from verl.trainer.ppo.core_algos import register_policy_loss
    from verl.trainer.ppo.reward import load_reward_manager


@register_policy_loss("igrpo")
def igrpo_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Compute equation 5 of the paper in verl's signature; KL and entropy are added by verl.

    Args:
        old_log_prob: Log-probs when the batch was drawn. Shape [B, T].
        log_prob: Log-probs now. Shape [B, T].
        advantages: Shape [B, T].
        response_mask: True on the tokens drawn. Shape [B, T].
        loss_agg_mode: Any of verl's; "seq-mean-token-mean" is the paper's.
        config: verl's `ActorConfig`: its clip bounds, its dual clip, its counts of the whole batch.
        rollout_is_weights: verl's correction for another sampler. Shape [B, T].

    Returns:
        The loss, and verl's metrics of its own clipped loss.

    Raises:
        ValueError: The mode is none of verl's, or ranks lack the counts of the whole batch.
    """
    low, high = (
        config.clip_ratio if bound is None else bound
        for bound in (config.clip_ratio_low, config.clip_ratio_high)
    )
    dual = config.get("clip_ratio_c", 3.0)
    result = policy_loss(
        log_prob,
        advantages,
        response_mask,
        surrogate=Clip(low, high, dual),
        aggregate=_aggregate(loss_agg_mode, response_mask, **config.global_batch_info),
        old_logprobs=old_log_prob,
        importance_weights=rollout_is_weights,
    )
    counted = response_mask.bool()
    log_ratio = (log_prob - old_log_prob).detach()[counted].clamp(-20, 20)  # verl's own bounds
    too_high = (advantages[counted] < 0) & (log_ratio.exp() > dual)
    metrics = result.metrics
    return result.loss, {
        "actor/pg_clipfrac": (metrics["clip_fraction_low"] + metrics["clip_fraction_high"]).item(),
        "actor/ppo_kl": -log_ratio.mean().nan_to_num().item(),
        "actor/pg_clipfrac_lower": too_high.float().mean().nan_to_num().item(),
    }


def _aggregate(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | Tensor | None = None,
    global_batch_size: float | Tensor | None = None,
    loss_scale_factor: float | None = None,
) -> Aggregate:
    """Give verl's `agg_loss` as an aggregate. Sequences without a counted token are not counted."""

    def whole(name: str, count: float | Tensor | None, here: Tensor) -> Tensor:
        if count is None and dp_size > 1:
            raise ValueError(f"{name} must be given with dp_size = {dp_size}, got None")
        return torch.as_tensor(here if count is None else count, device=mask.device) / dp_size

    if mode == "token-mean":
        return Sum(whole("batch_num_tokens", batch_num_tokens, mask.sum()))
    if mode == "token-sum":
        return Sum(1 / dp_size)
    sequences = functools.partial(
        whole, "global_batch_size", global_batch_size, (mask.sum(-1) > 0).sum()
    )
    if mode == "seq-mean-token-mean":
        return SequenceMean(sequences())
    if mode == "seq-mean-token-sum":
        return Sum(sequences())
    if mode == "seq-mean-token-sum-norm":
        return Sum(sequences() * (loss_scale_factor or mask.shape[-1]))
    raise ValueError(f"loss_agg_mode must be one of verl's, got {mode!r}")


@register("igrpo")
class IGRPOAgentLoop(SingleTurnAgentLoop):
    """Draws one refinement; the first sample of a group runs Stage 1 for all of them.

    Samples of a group have their `uid` in common. In V1 they run in one worker; the older path may
    deal them to several, which then get the same Stage-2 prompt through a Ray actor.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        refuse_on(
            "rollout.full_determinism",
            getattr(self.rollout_config, "full_determinism", False),
            "verl numbers its requests by sample, and drafts belong to a whole group",
        )
        refuse_on(
            "rollout.multi_turn.enable",
            self.rollout_config.multi_turn.enable,
            "a draft is one answer, not a conversation",
        )
        self._worker = _Worker.of(self.config, self.tokenizer)

    async def run(
        self, sampling_params: dict[str, Any], priority: int = 0, **fields: Any
    ) -> AgentLoopOutput:
        """Draw one refinement of `raw_prompt`, or in validation one plain completion.

        Raises:
            ValueError: The prompt is longer than `rollout.prompt_length`, or has images.
        """
        messages = [dict(message) for message in fields["raw_prompt"]]
        if _validating.get():
            return await super().run(sampling_params, priority, **fields)
        refuse_media(await self.process_multi_modal_info(messages))
        length = len(self.continuous_token_builder.build_initial_tokens(messages))
        advice = "raise rollout.prompt_length, or set data.filter_overlong_prompts"
        refuse_long(length, self.prompt_length, advice)
        draw_plain = functools.partial(super().run, sampling_params, priority, raw_prompt=messages)
        stage_one = functools.partial(self._stage_one, messages, draw_plain, fields)
        uid = fields["uid"]
        in_one_worker = "session_id" in fields or not ray.is_initialized()  # V1 numbers sessions
        if in_one_worker:
            stage_two = await stage_one(uid)
        else:
            stage_two = await _share_between_workers(uid, stage_one)
        refinement = await super().run(
            sampling_params, priority, **{**fields, "raw_prompt": stage_two.prompt}
        )
        refinement.extra_fields["igrpo_draft_rewards"] = list(stage_two.draft_rewards)
        return refinement

    async def _stage_one(
        self,
        messages: list[dict[str, Any]],
        draw_plain: Callable[[], Awaitable[AgentLoopOutput]],
        fields: dict[str, Any],
        uid: str,
    ) -> StageTwoPrompt:
        async def draw(_: int) -> HostDraft:
            drawn = await draw_plain()
            return HostDraft.decoded(drawn.response_ids, self.tokenizer, host=drawn)

        async def score(drafts: Sequence[HostDraft]) -> list[float]:
            rewards = (self._worker.score(draft.host, fields) for draft in drafts)
            return await asyncio.gather(*rewards)

        rules = fit_to_tokenizer(
            self._worker.stage_one.rules,
            self.tokenizer,
            self.prompt_length,
            self.apply_chat_template_kwargs,
        )
        return await self._worker.stage_one.prompt(
            uid, messages, draw, score, columns=fields, rules=rules
        )


@dataclass(frozen=True)
class _Worker:
    """What the agent loops of a worker share: verl makes a loop for every sample."""

    config: Any
    stage_one: OncePerGroup
    rewards: Any

    @classmethod
    def of(cls, config: Any, tokenizer: Any) -> "_Worker":
        if id(config) not in _workers:
            settings = dict(config.get("igrpo") or {})
            rules = settings.pop("rules", None)
            chosen = DraftRules() if rules is None else get_object(rules)
            stage_one = OncePerGroup(rules=chosen, **settings)
            if config.reward.reward_model.enable and not config.reward.custom_reward_function.path:
                raise ValueError(
                    "reward.reward_model can't score drafts: its address does not reach agent "
                    "loops; give reward.custom_reward_function"
                )
            rewards = load_reward_manager(config, tokenizer)
            _workers[id(config)] = cls(config, stage_one, rewards)
        return _workers[id(config)]

    async def score(self, output: AgentLoopOutput, fields: dict[str, Any]) -> float:
        """Score a draft as verl scores a response: the same columns, copies of them."""
        prompt, response = torch.tensor(output.prompt_ids), torch.tensor(output.response_ids)
        ids = torch.cat([prompt, response])[None]
        tensors = {
            "prompts": prompt[None],
            "responses": response[None],
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        columns = {
            **deepcopy(fields),
            "__num_turns__": output.num_turns,
            "tool_extra_fields": deepcopy(output.extra_fields),
            "prompt_len": len(prompt),
            "response_len": len(response),
        }
        arrays = {name: np.array([value]) for name, value in columns.items()}
        data = DataProto(TensorDict(tensors, batch_size=1), arrays)
        return float((await self.rewards.run_single(data))["reward_score"])


_workers: dict[int, _Worker] = {}
"""By the id of verl's config, which lives as long as its worker."""


async def _share_between_workers(
    uid: str, stage_one: Callable[[str], Awaitable[StageTwoPrompt]]
) -> StageTwoPrompt:
    """Run Stage 1 in the worker that asks first; give its Stage-2 prompt to all that ask later."""
    groups = (
        ray.remote(_Groups)
        .options(name="igrpo_groups", get_if_exists=True, num_cpus=0, max_concurrency=100_000)
        .remote()
    )
    given = await groups.ask.remote(uid)
    if given is None:
        try:
            given = await stage_one(uid)
        except Exception as error:
            await groups.fail.remote(uid, repr(error))
            raise
        await groups.give.remote(uid, given)
    return given


class _Groups:
    """The Stage-2 prompts of groups that may be dealt to several workers, by uid."""

    KEPT = 4096

    def __init__(self) -> None:
        self._prompts: dict[str, asyncio.Future[StageTwoPrompt]] = {}
        self._finished: deque[str] = deque()

    async def ask(self, uid: str) -> StageTwoPrompt | None:
        """Wait for the group's prompt; None for the first, who has to make it."""
        if uid not in self._prompts:
            self._prompts[uid] = asyncio.get_running_loop().create_future()
            return None
        return await self._prompts[uid]

    async def give(self, uid: str, prompt: StageTwoPrompt) -> None:
        self._prompts[uid].set_result(prompt)
        self._finish(uid)

    async def fail(self, uid: str, reason: str) -> None:
        self._prompts[uid].set_exception(RuntimeError(f"Stage 1 failed in a sibling: {reason}"))
        self._prompts[uid].exception()  # nobody may be waiting
        self._finish(uid)

    def _finish(self, uid: str) -> None:
        self._finished.append(uid)
        if len(self._finished) > self.KEPT:
            del self._prompts[self._finished.popleft()]


_validating: ContextVar[bool] = ContextVar("validating", default=False)


def _tell_loops_of_validation() -> None:
    """Wrap what starts an agent loop: verl knows there whether it validates, and tells no loop."""
    start = AgentLoopWorker._run_agent_loop

    @functools.wraps(start)
    async def tell(
        self: Any, sampling_params: dict[str, Any], trajectory: dict[str, Any], **fields: Any
    ) -> Any:
        _validating.set(bool(trajectory["validate"]))  # each loop is a task of its own
        return await start(self, sampling_params, trajectory, **fields)

    AgentLoopWorker._run_agent_loop = tell


_tell_loops_of_validation()
