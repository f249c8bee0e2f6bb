"""iGRPO in SkyRL 0.4: a generator around SkyRL's own, and a registered loss.

    class IGRPOExp(BasePPOExp):
        def get_generator(self, cfg, tokenizer, inference_engine_client):
            theirs = super().get_generator(cfg, tokenizer, inference_engine_client)
            return IGRPOGenerator(theirs, num_drafts=8)

Environments, rewards, engine and advantages stay SkyRL's. Importing this file registers policy loss
`igrpo`; `trainer.algorithm.loss_reduction=sequence_mean` is the paper's average. Groups run on
their own: no group waits for the drafts of another. Evaluation is single-shot.
"""

import asyncio
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from igrpo_kernels import Clip, Sum
from igrpo_kernels.checks import check_count
from igrpo_kernels.surrogates import Surrogate

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..rollouts.once_per_group import HostDraft, check_rules, fit_to_tokenizer, stage_one
from ..seeds import derive_seed
from .refusals import refuse_on
from .versions import requires

with requires("skyrl", "0.4", "0.4", install="pip install 'skyrl[fsdp]==0.4.*' (Python 3.12)"):
    from skyrl.backends.skyrl_train.utils.off_policy_correction_utils import (
        apply_off_policy_correction,
    )
    from skyrl.backends.skyrl_train.utils.ppo_utils import PolicyLossRegistry
    from skyrl.train.generators.base import (
        TRAINING_PHASE_EVAL,
        GeneratorInput,
        GeneratorInterface,
        GeneratorOutput,
        TrajectoryID,
    )
    from skyrl.train.generators.skyrl_gym_generator import SkyRLGymGenerator
    from skyrl.train.generators.utils import concatenate_generator_outputs


class IGRPOGenerator(GeneratorInterface):
    """Draws drafts and refinements through a generator of SkyRL, for each group of a batch.

    Drafts are trajectories like any other, scored by their environment. G is
    `generator.n_samples_per_prompt`. A draft is cut to what `generator.max_input_length` leaves.

    Args:
        generator: SkyRL's generator, single-turn.
        rules: How a draft is chosen and spliced.
        num_drafts: N.
        seed: For random ties, random drafts and dropout.

    Raises:
        ValueError: The generator takes turns or images, `num_drafts` is below 1, or the rules leave
            prompts out of Stage 2.
    """

    def __init__(
        self,
        generator: SkyRLGymGenerator,
        *,
        rules: DraftRules = DraftRules(),  # frozen
        num_drafts: int = 4,
        seed: int = 0,
    ) -> None:
        config = generator.generator_cfg
        if config.max_turns != 1 or config.step_wise_trajectories:
            raise ValueError(
                "generator.max_turns must be 1, without step_wise_trajectories: a draft is one "
                f"answer, not a conversation, got max_turns={config.max_turns}"
            )
        images = config.vision_language_generator
        refuse_on("generator.vision_language_generator", images, "a draft is text, without images")
        self.generator = generator
        self.rules = fit_to_tokenizer(
            check_rules(rules),
            generator.tokenizer,
            config.max_input_length,
            config.chat_template_kwargs,
        )
        self.num_drafts = check_count("num_drafts", num_drafts)
        self.seed = check_count("seed", seed, at_least=0)

    async def generate(
        self, input_batch: GeneratorInput, disable_tqdm: bool = False
    ) -> GeneratorOutput:
        """Draw one refinement for each row; in evaluation, one plain completion."""
        metadata = input_batch.get("batch_metadata")
        if metadata is not None and metadata.training_phase == TRAINING_PHASE_EVAL:
            return await self.generator.generate(input_batch, disable_tqdm)
        trajectories = input_batch.get("trajectory_ids")
        if trajectories is None:
            raise ValueError("trajectory_ids must be given: they say which rows are a group")
        step = 0 if metadata is None else metadata.global_step
        runs = groupby(range(len(trajectories)), lambda row: trajectories[row].instance_id)
        groups = [(name, list(rows)) for name, rows in runs]
        if len({name for name, _ in groups}) < len(groups):
            raise ValueError("the rows of a group must stand next to each other")
        outputs = await asyncio.gather(
            *(self._group(step, name, _rows(input_batch, rows)) for name, rows in groups)
        )
        return outputs[0] if len(outputs) == 1 else concatenate_generator_outputs(outputs)

    async def _group(self, step: int, name: str, group: GeneratorInput) -> GeneratorOutput:
        extras = deepcopy((group["env_extras"] or [{}])[0])

        async def draw(number: int) -> HostDraft:
            row = _rows(deepcopy(group), [0])
            row["trajectory_ids"] = [TrajectoryID(f"{name}-draft", number)]
            drawn = await self.generator.generate(row, disable_tqdm=True)
            (ids,) = drawn["response_ids"]
            return HostDraft.decoded(ids, self.generator.tokenizer, host=drawn)

        async def score(drafts: Sequence[HostDraft]) -> list[float]:
            rewards = [draft.host["rewards"][0] for draft in drafts]
            return [float(sum(each) if isinstance(each, list) else each) for each in rewards]

        stage_two = await stage_one(
            group["prompts"][0],
            draw,
            score,
            rules=self.rules,
            num_drafts=self.num_drafts,
            seed=derive_seed(self.seed, step, name),
            columns=extras,
        )
        prompts = [stage_two.prompt] * len(group["prompts"])
        output = await self.generator.generate({**group, "prompts": prompts}, disable_tqdm=True)
        output["rollout_metrics"] = {  # SkyRL averages over groups what is called a mean
            **(output["rollout_metrics"] or {}),
            **stage_two.logs("igrpo/mean_"),
        }
        return output


def _rows(batch: GeneratorInput, rows: list[int]) -> GeneratorInput:
    """Take some rows of a batch."""
    whole = ("sampling_params", "batch_metadata")
    return {
        name: value if name in whole or value is None else [value[row] for row in rows]
        for name, value in batch.items()
    }


def make_policy_loss(surrogate: Surrogate | None = None) -> Callable[..., Any]:
    """Make a policy loss in SkyRL's signature.

    SkyRL scales advantages by its loss reduction beforehand, so this is a plain sum; KL and entropy
    are added by SkyRL, and its off-policy correction applies.

    Args:
        surrogate: Any surrogate of `igrpo_kernels`; None: SkyRL's clip, `eps_clip_low` and
            `eps_clip_high`.

    Returns:
        A function for `PolicyLossRegistry.register`.
    """

    def loss(
        log_probs: Tensor,
        old_log_probs: Tensor,
        advantages: Tensor,
        config: Any,
        loss_mask: Tensor | None = None,
        rollout_logprobs: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        weights, mask, metrics = apply_off_policy_correction(
            torch.ones_like(log_probs),
            old_log_probs,
            rollout_logprobs,
            loss_mask,
            config.off_policy_correction,
        )
        result = policy_loss(
            log_probs,
            advantages,
            mask,
            surrogate=surrogate or Clip(config.eps_clip_low, config.eps_clip_high),
            aggregate=Sum(),
            old_logprobs=old_log_probs,
            importance_weights=weights,
        )
        clipped = (result.metrics.get(f"clip_fraction_{side}", 0.0) for side in ("low", "high"))
        return result.loss, {"clip_ratio": float(sum(clipped)), **metrics}

    return loss


if "igrpo" not in PolicyLossRegistry.list_available():
    PolicyLossRegistry.register("igrpo", make_policy_loss())
