"""iGRPO in OpenRLHF 0.11: an agent file for `--train.agent_func_path`, and its loss.

OpenRLHF makes one executor call per sample, those of a prompt all at once and in one actor, so the
first of them runs Stage 1 for all. A file of three lines is named at launch:

    from igrpo_algo.rewards import math_reward
    from igrpo_algo.trainers.openrlhf import make_agent_executor
    AgentExecutor = make_agent_executor(math_reward, num_drafts=4)

OpenRLHF's own loss is equation 5 of the paper with `--actor.loss_agg_mode seq-mean-token-mean`, so
nothing has to be replaced; `PolicyLoss` is for other surrogates.
"""

import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from igrpo_kernels import Clip, SequenceMean, TokenMean
from igrpo_kernels.surrogates import Surrogate

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..prompts import Prompt, encode_prompt
from ..rollouts.completions import Completion
from ..rollouts.once_per_group import OncePerGroup, StageTwoPrompt, fit_to_tokenizer
from ..rollouts.scoring import Reward, Scorer
from .refusals import refuse_long, refuse_templated
from .versions import requires

with requires("openrlhf", "0.11", "0.11"):
    from openrlhf.utils.agent import AgentExecutorBase


def make_agent_executor(
    reward: Reward,
    *,
    rules: DraftRules = DraftRules(),  # frozen
    num_drafts: int = 4,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> type[AgentExecutorBase]:
    """Make the class that OpenRLHF looks for in an agent file, under the name `AgentExecutor`.

    The reward is called by TRL's convention, `reward(prompts=..., completions=..., answer=...,
    label=...)`, with OpenRLHF's label under both names; drafts and refinements get the same one.
    Give OpenRLHF chat messages and leave `--data.apply_chat_template` off: a string to which a
    template was applied has no place for a draft and is refused, and so are images. G is
    `--rollout.n_samples_per_prompt`. Two equal prompts that are in flight at once share a draft.

    Args:
        reward: The task's reward.
        rules: How a draft is chosen and spliced. A `TextSplice` without a budget gets the room that
            OpenRLHF leaves for prompts, so that the question is never cut.
        num_drafts: N.
        chat_template_kwargs: Passed to the chat template.
        seed: For random ties, random drafts and dropout.

    Returns:
        The class.

    Raises:
        ValueError: `num_drafts` is below 1, or the rules leave prompts out of Stage 2.
    """
    stage_one = OncePerGroup(rules=rules, num_drafts=num_drafts, seed=seed)

    class AgentExecutor(AgentExecutorBase):
        async def execute(
            self,
            prompt: Prompt,
            label: Any,
            sampling_params: Any,
            max_length: int,
            hf_tokenizer: Any,
            llm_engine: Any,
            images: Any = None,
        ) -> dict[str, Any]:
            """Draw one refinement of the prompt."""
            if images:
                raise ValueError("images can't be combined with drafts: leave --data.image_key out")
            refuse_templated(prompt, hf_tokenizer, "leave --data.apply_chat_template off")
            room = max_length - (sampling_params.max_tokens or 1)
            engine = _Engine(llm_engine, hf_tokenizer, sampling_params, room, max_length)
            columns = {"answer": label, "label": label}
            scorer = Scorer(reward, [prompt], {name: [value] for name, value in columns.items()})

            async def draw(_: int) -> Completion:
                ids = encode_prompt(prompt, hf_tokenizer, chat_template_kwargs)
                return await engine.draw(ids)

            stage_two = await stage_one.prompt(
                (repr(prompt), repr(label)),
                prompt,
                draw,
                partial(scorer, 0),
                columns=columns,
                rules=fit_to_tokenizer(rules, hf_tokenizer, room, chat_template_kwargs),
            )
            ids = encode_prompt(stage_two.prompt, hf_tokenizer, chat_template_kwargs)
            refinement = await engine.draw(ids)
            (score,) = await scorer(0, [refinement])
            if math.isnan(score):
                raise ValueError(
                    "reward must score every refinement: OpenRLHF has no place for one without a "
                    f"score, and {refinement.text[:60]!r} got None or NaN"
                )
            return _as_openrlhf(prompt, label, ids, refinement, score, stage_two)

    return AgentExecutor


@dataclass(frozen=True)
class _Engine:
    """OpenRLHF's engine as what draws a completion."""

    engine: Any
    tokenizer: Any
    sampling_params: Any
    room: int
    max_length: int

    async def draw(self, ids: list[int]) -> Completion:
        refuse_long(len(ids), self.room, "raise --data.max_len")
        params = deepcopy(self.sampling_params)
        if params.max_tokens is None:
            params.max_tokens = self.max_length - len(ids)
        request = await self.engine.generate(ids, params, multi_modal_data=None)
        drawn = request.outputs[0]
        tokens, logprobs = list(drawn.token_ids), None
        if params.logprobs is not None and drawn.logprobs is not None:
            pairs = zip(tokens, drawn.logprobs, strict=True)
            logprobs = [known[token].logprob for token, known in pairs]
        return Completion.decoded(
            tokens, self.tokenizer, logprobs=logprobs, finish_reason=drawn.finish_reason
        )


def _as_openrlhf(
    prompt: Prompt,
    label: Any,
    prompt_ids: list[int],
    refinement: Completion,
    score: float,
    stage_two: StageTwoPrompt,
) -> dict[str, Any]:
    """Lay a refinement out as OpenRLHF's own executors do."""
    tokens, logprobs = refinement.token_ids, refinement.logprobs
    return {
        "prompt": prompt,
        "label": label,
        "images": None,
        "mm_train_inputs": None,
        "observation_tokens": prompt_ids + tokens,
        "action_ranges": [(len(prompt_ids), len(prompt_ids) + len(tokens))],
        "rollout_log_probs": None if logprobs is None else [0.0] * len(prompt_ids) + logprobs,
        "truncated": refinement.finish_reason == "length",
        "reward": score,
        "scores": score,
        "extra_logs": stage_two.logs(),
    }


class PolicyLoss(nn.Module):
    """`igrpo_algo.policy_loss` in the form of OpenRLHF's `PolicyLoss`.

    Its loss is made in `ActorPPOTrainer.__init__`, in the actor's Ray worker; there is no registry.
    Replace it there, after construction: `trainer.actor_loss_fn = PolicyLoss(surrogate)`.

    Args:
        surrogate: Any surrogate of `igrpo_kernels`.
        token_level_loss: Average over tokens ("token-mean"), or over the tokens of a sequence and
            then over sequences, empty ones left out ("seq-mean-token-mean"; the paper's).
    """

    def __init__(self, surrogate: Surrogate = Clip(), *, token_level_loss: bool = False) -> None:
        super().__init__()
        self.surrogate = surrogate
        self.token_level_loss = token_level_loss

    def forward(
        self,
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        action_mask: Tensor | None = None,
        rollout_log_probs: Tensor | None = None,
        dp_size: int = 1,
        batch_num_tokens: float | Tensor | None = None,
        global_batch_size: float | Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """Compute the loss; tensors [B, T - 1] in OpenRLHF's shifted layout.

        Returns:
            Loss, clipped fraction, approximate KL, and two Nones where OpenRLHF has its correction.
        """
        mask = torch.ones_like(log_probs) if action_mask is None else action_mask
        tokens, sequences = mask.sum(), (mask.sum(-1) > 0).sum()
        whole = {True: batch_num_tokens, False: global_batch_size}[self.token_level_loss]
        if whole is None:
            denominator = tokens if self.token_level_loss else sequences
        else:
            denominator = torch.as_tensor(whole, device=mask.device) / dp_size
        aggregate = TokenMean if self.token_level_loss else SequenceMean
        result = policy_loss(
            log_probs,
            advantages,
            mask,
            surrogate=self.surrogate,
            aggregate=aggregate(denominator=denominator),
            old_logprobs=old_log_probs,
        )
        clipped = (result.metrics.get(f"clip_fraction_{side}", 0.0) for side in ("low", "high"))
        log_ratio = (log_probs - old_log_probs).detach().where(mask > 0, 0.0)
        approximate_kl = -log_ratio.sum() / tokens.clamp(min=1)
        return result.loss, torch.as_tensor(sum(clipped)), approximate_kl, None, None
