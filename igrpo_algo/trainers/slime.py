"""iGRPO in slime 0.3: a generate function for `--custom-generate-function-path`, and its loss.

slime names functions by their module, which must be on PYTHONPATH of its workers:

    # igrpo_slime.py
    from igrpo_algo.trainers.slime import make_generate
    generate = make_generate(num_drafts=8)

    python train.py --custom-generate-function-path igrpo_slime.generate ...

Drafts go through slime's own generation and its own reward model, `--group-rm` too; G is
`--n-samples-per-prompt`. slime's loss is equation 5 of the paper as it stands, so nothing has to be
replaced; `make_loss` is for other surrogates. Evaluation is single-shot.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Sequence
from copy import deepcopy
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels import K1, K2, K3, Clip, RatioWeighted
from igrpo_kernels.kl import KlEstimator
from igrpo_kernels.surrogates import Surrogate

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..losses.corrections import token_importance_weights, truncate_weights
from ..prompts import encode_prompt
from ..rollouts.once_per_group import HostDraft, OncePerGroup, fit_to_tokenizer
from .given_weights import GivenWeights
from .refusals import refuse_long, refuse_media, refuse_on, refuse_templated
from .versions import requires

with requires("slime", "0.3", "0.3", install="clone github.com/THUDM/slime, pip install -e ."):
    from slime.rollout import sglang_rollout
    from slime.rollout.rm_hub import async_rm, batched_async_rm
    from slime.utils.types import Sample

Generate = Callable[..., Awaitable[Sample]]
Loss = Callable[..., tuple[Tensor, dict[str, Tensor]]]

KEPT_GROUPS = 4096


class _Aborted(Exception):  # noqa: N818  # what a group does when slime stops its engines
    pass


def make_generate(
    *,
    rules: DraftRules = DraftRules(),  # frozen
    num_drafts: int = 4,
    seed: int = 0,
) -> Generate:
    """Make the function that slime calls once per sample; the first of a group runs Stage 1.

    Give slime chat messages and leave `--apply-chat-template` off: a string to which a template was
    applied has no place for a draft and is refused, and so are images. A draft is cut to what
    `--rollout-max-prompt-len` and `--rollout-max-context-len` leave for prompts. Each sample has
    its draft and the rewards of all drafts in `metadata["igrpo"]`.

    Args:
        rules: How a draft is chosen and spliced.
        num_drafts: N.
        seed: For random ties, random drafts and dropout.

    Returns:
        The function.

    Raises:
        ValueError: `num_drafts` is below 1, or the rules leave prompts out of Stage 2.
    """
    # slime lets a bounded number of samples in at once, so siblings may ask when Stage 1 is over,
    # and a group that was stopped half-way comes back in the next rollout. Its groups are numbered
    # through all epochs.
    stage_one = OncePerGroup(rules=rules, num_drafts=num_drafts, seed=seed, keep=KEPT_GROUPS)

    async def generate(
        args: Any, sample: Sample, sampling_params: dict[str, Any], evaluation: bool = False
    ) -> Sample:
        """Draw one refinement, or in evaluation one plain completion."""
        host = _Host(args, sample)
        if evaluation or "igrpo" in sample.metadata:  # a sample that was stopped half-way continues
            sample.tokens = sample.tokens or host.encode(sample.prompt)
            return await host.draw(sample, sampling_params)
        host.check()

        async def draw(number: int) -> HostDraft:
            draft = deepcopy(sample)
            draft.tokens = host.encode(sample.prompt)
            params = dict(sampling_params)
            if "sampling_seed" in params:  # the samples of a group have seeds of their own
                params["sampling_seed"] = args.rollout_seed + number
            draft = await host.draw(draft, params)
            ids = draft.tokens[len(draft.tokens) - draft.response_length :]
            return HostDraft.decoded(ids, host.tokenizer, host=draft)

        async def score(drafts: Sequence[HostDraft]) -> list[float]:
            return await _score(args, [draft.host for draft in drafts])

        try:
            stage_two = await stage_one.prompt(
                sample.group_index,
                sample.prompt,
                draw,
                score,
                columns={"label": sample.label, "metadata": sample.metadata},
                rules=fit_to_tokenizer(rules, host.tokenizer, host.room, host.template_kwargs),
            )
        except _Aborted:
            sample.status = Sample.Status.ABORTED
            return sample
        if host.state.aborted:
            sample.status = Sample.Status.ABORTED
            return sample
        sample.tokens = host.encode(stage_two.prompt)
        rewards = list(stage_two.draft_rewards)
        sample.metadata["igrpo"] = {"draft": stage_two.draft, "draft_rewards": rewards}
        return await host.draw(sample, sampling_params)

    return generate


class _Host:
    """slime's engine and tokenizer, as one sample sees them."""

    def __init__(self, args: Any, sample: Sample) -> None:
        self.args = args
        self.sample = sample
        self.state = sglang_rollout.GenerateState(args)
        self.tokenizer = self.state.tokenizer
        tools = sample.metadata.get("tools")
        self.template_kwargs = dict(args.apply_chat_template_kwargs or {})
        self.template_kwargs |= {"tools": tools} if tools else {}
        context = args.rollout_max_context_len
        limits = [
            args.rollout_max_prompt_len,
            None if context is None else context - args.rollout_max_response_len,
        ]
        self.room = min((limit for limit in limits if limit is not None), default=None)

    def encode(self, prompt: Any) -> list[int]:
        return encode_prompt(prompt, self.tokenizer, self.template_kwargs)

    async def draw(self, sample: Sample, params: dict[str, Any]) -> Sample:
        return await sglang_rollout.generate(self.args, sample, dict(params))

    def check(self) -> None:
        """Refuse what no draft can be given to, before anything is drawn."""
        sample = self.sample
        if sample.group_index is None:
            raise ValueError("group_index must be set: the samples of a group share a draft by it")
        media = (sample.multimodal_inputs or {}).values()
        refuse_media(any(value is not None for value in media))
        advice = "leave --apply-chat-template off"
        refuse_templated(sample.prompt, self.tokenizer, advice)
        length = len(self.encode(sample.prompt))
        refuse_long(length, self.room, "raise --rollout-max-prompt-len")


async def _score(args: Any, drafts: list[Sample]) -> list[float]:
    """Score drafts as slime scores samples; NaN where there is no score."""
    if any(draft.status is Sample.Status.ABORTED for draft in drafts):
        raise _Aborted
    if args.group_rm:
        rewards = await batched_async_rm(args, drafts)
    else:
        rewards = await asyncio.gather(*(async_rm(args, draft) for draft in drafts))
    for draft, reward in zip(drafts, rewards, strict=True):
        draft.reward = reward
    return [
        math.nan if draft.reward is None else float(draft.get_reward_value(args))
        for draft in drafts
    ]


def make_loss(surrogate: Surrogate | None = None) -> Loss:
    """Make a loss for `--loss-type custom_loss --custom-loss-function-path igrpo_slime.loss`.

    Log-probs (tensor and context parallel, temperature, top-p replay), the average over tokens and
    the scaling over micro-batches and ranks are slime's; KL, entropy and truncated importance
    weights follow slime's options.

    Args:
        surrogate: Any surrogate of `igrpo_kernels`; None: slime's clip, from `--eps-clip`,
            `--eps-clip-high` and `--eps-clip-c`.

    Returns:
        The loss in slime's signature, from args, batch, logits [1, T, V] and the reducer to the
        loss and what slime logs.

    Examples:
        In `igrpo_slime.py`: `loss = make_loss(Cispo(...))`.
    """

    def loss(
        args: Any, batch: dict[str, Any], logits: Tensor, reduce: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Imported here: only the training actors have Megatron.
        from slime.backends.megatron_utils import loss as of_slime

        _check_loss_options(args)
        _, drawn = of_slime.get_log_probs_and_entropy(
            logits,
            args=args,
            unconcat_tokens=batch["unconcat_tokens"],
            total_lengths=batch["total_lengths"],
            response_lengths=batch["response_lengths"],
            with_entropy=True,
            **of_slime.get_rollout_top_p_logprob_kwargs(args, batch),
        )
        logprobs, entropy = torch.cat(drawn["log_probs"]), torch.cat(drawn["entropy"])
        scope = "token" if surrogate is None else surrogate.scope
        if scope != "token" and of_slime.mpu.get_context_parallel_world_size() > 1:
            raise ValueError(
                f"surrogate must be of scope 'token' with context parallelism, got {scope!r}: a "
                "rank sees parts of sequences"
            )
        if not logprobs.numel():
            return 0 * logits.sum(), {}
        weights = _weights(reduce, logprobs)
        old = batch["rollout_log_probs"] if args.use_rollout_logprobs else batch.get("log_probs")
        old_logprobs = torch.cat(old) if old else logprobs.detach()
        offsets = [0, *accumulate(map(len, drawn["log_probs"]))]
        cu_seqlens = torch.tensor(offsets, device=logprobs.device)
        importance = None
        if args.use_tis:
            sampled = torch.cat(batch["rollout_log_probs"])
            mismatch = token_importance_weights(old_logprobs, sampled, cu_seqlens=cu_seqlens)
            importance = truncate_weights(mismatch, high=args.tis_clip, low=args.tis_clip_low)
        estimators: dict[str, KlEstimator] = {"k1": K1(), "k2": K2()}
        kl = estimators.get(args.kl_loss_type, K3())
        result = policy_loss(
            logprobs,
            torch.cat(batch["advantages"]),
            weights != 0,
            surrogate=surrogate or Clip(args.eps_clip, args.eps_clip_high, args.eps_clip_c),
            aggregate=GivenWeights(weights),
            old_logprobs=old_logprobs,
            ref_logprobs=torch.cat(batch["ref_log_probs"]) if args.use_kl_loss else None,
            kl_coef=args.kl_loss_coef if args.use_kl_loss else 0.0,
            kl=RatioWeighted(kl) if args.use_unbiased_kl else kl,
            importance_weights=importance,
            entropy=entropy,
            entropy_coef=args.entropy_coef,
            cu_seqlens=cu_seqlens,
        )
        # slime divides what is logged by the count of the whole step, as it does with the loss.
        counted = weights.sum()
        return result.loss, {
            "loss": result.loss.detach(),
            "ppo_kl": reduce((old_logprobs - logprobs).detach()),
            **{name: value * counted for name, value in result.metrics.items()},
        }

    return loss


def _weights(reduce: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
    """Find what slime's reducer multiplies each token by: it is linear, so its gradient says it."""
    with torch.enable_grad():
        probe = torch.zeros_like(like, requires_grad=True)
        (weights,) = torch.autograd.grad(reduce(probe), probe)
    return weights


def _check_loss_options(args: Any) -> None:
    for name in ("use_opsm", "get_mismatch_metrics", "custom_tis_function_path"):
        refuse_on(name, getattr(args, name), "it is part of slime's own loss")
    if args.use_kl_loss and args.kl_loss_type not in ("k1", "k2", "k3"):
        raise ValueError(
            f"kl_loss_type must be k1, k2 or k3, got {args.kl_loss_type!r}; low_var_kl is k3, "
            "clamped at 10"
        )
