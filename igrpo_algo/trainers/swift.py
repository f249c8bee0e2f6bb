"""iGRPO in ms-swift 4.6: a plugin for `swift rlhf --rlhf_type grpo --external_plugins FILE`.

    from igrpo_algo.trainers.swift import use_igrpo
    use_igrpo(num_drafts=4)

Its reward functions, template, data and losses stay as they are; `--num_generations` is G. Both
stages go through ms-swift's own generation, vLLM included. Evaluation is single-shot.
"""

from copy import deepcopy
from typing import Any

import torch

from igrpo_kernels.checks import check_count

from ..advantages.of_groups import sum_rewards
from ..drafts.rules import DraftRules
from ..rollouts.completions import Completion
from ..rollouts.once_per_group import check_rules, fit_to_tokenizer
from .draft_layout import DraftLayout
from .gathered import log_stages, share_drafts
from .refusals import refuse_media, refuse_on
from .rendering import AsTokenizer
from .versions import requires

with requires("ms-swift", "4.6", "4.6"):
    import swift.rlhf_trainers
    from swift.rlhf_trainers.grpo_trainer import GRPOTrainer


def use_igrpo(
    *,
    rules: DraftRules = DraftRules(),  # frozen
    num_drafts: int = 4,
) -> type[GRPOTrainer]:
    """Make ms-swift train with iGRPO from here on, in this process.

    ms-swift looks its trainer up by name when training starts; this puts ours there. A prompt whose
    drafts all failed can't be skipped here: ms-swift trains on every row that it sampled.

    Args:
        rules: How a draft is chosen and spliced. `TextSplice` gets the tokenizer's control tokens,
            and `--max_length` as its budget unless it has one.
        num_drafts: N. `num_drafts` times the rows on a rank must be divisible by G.

    Returns:
        The trainer.

    Raises:
        TypeError: `rules` is not `DraftRules`, or `num_drafts` not an int.
        ValueError: `num_drafts` is below 1, the rules leave prompts out of Stage 2 or have a
            `selection_score`. From the trainer: options that contradict drafts.
    """
    check_rules(rules, by_reward_alone=True)
    count = check_count("num_drafts", num_drafts)
    trainer = type("IGRPOTrainer", (_IGRPOTrainer,), {"rules": rules, "num_drafts": count})
    swift.rlhf_trainers.GRPOTrainer = trainer
    return trainer


class _IGRPOTrainer(GRPOTrainer):
    rules: DraftRules
    num_drafts: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_options(self)

    def _generate_completions(self, samples: list[Any]) -> list[Any]:
        if not self.model.training:
            return super()._generate_completions(samples)
        refuse_media(any(sample.images or sample.videos or sample.audios for sample in samples))
        rank = self.accelerator.process_index
        layout = DraftLayout(len(samples), rank, self.num_drafts, self.num_generations)
        drawn = super()._generate_completions([deepcopy(samples[row]) for row in layout.draft_rows])
        rewards = self._draft_rewards(drawn)
        drafts = [_as_completion(sample, self.tokenizer) for sample in drawn]
        step = (self.state.global_step, self._step)
        chosen = share_drafts(self.rules, rewards, drafts, layout, self.args.seed, *step)
        tokenizer = AsTokenizer(self.tokenizer, self._render)
        rules = fit_to_tokenizer(self.rules, tokenizer, self.template.max_length)
        for sample, prompt in zip(samples, layout.row_prompts, strict=True):
            if prompt in chosen:
                question = [m for m in sample.messages if m["role"] != "assistant" or m["content"]]
                sample.messages = rules.condition(question, chosen[prompt]).prompt
        self._draft_rewards_of_step = rewards
        return super()._generate_completions(samples)

    def _draft_rewards(self, drawn: list[Any]) -> torch.Tensor:
        """Score the drafts of all ranks. Shape [P, N]."""
        per_function = self._compute_rewards_per_func(drawn)
        return sum_rewards(per_function, self.reward_weights).view(-1, self.num_drafts)

    def _render(self, messages: list[dict[str, Any]]) -> list[int]:
        with self.template.generate_context():
            return list(self.template.encode({"messages": deepcopy(messages)})["input_ids"])

    def _score_completions(self, samples: list[Any]) -> list[Any]:
        samples = super()._score_completions(samples)
        if self.model.training:
            rewards = sum_rewards(self._rewards_per_func, self.reward_weights)
            refinements = rewards.view(-1, self.num_generations)
            log_stages(self._metrics["train"], self._draft_rewards_of_step, refinements)
        return samples


def _check_options(trainer: GRPOTrainer) -> None:
    """Refuse what leaves no place for a draft, before anything is sampled."""
    takes_turns = trainer.args.multi_turn_scheduler or trainer.enable_server_multi_turn
    refuse_on("multi_turn_scheduler", takes_turns, "a draft is one answer, not a conversation")
    refuse_on("use_gym_env", trainer.use_gym_env, "a draft is one answer, not a game")
    refuse_on(
        "async_generate",
        trainer.args.async_generate,
        "the refinements of a batch can't be sampled before its drafts are scored",
    )


def _as_completion(sample: Any, tokenizer: Any) -> Completion:
    ids = list(sample.response_token_ids or [])
    content = sample.messages[-1]["content"]
    if isinstance(content, str):
        return Completion(ids, content)
    return Completion.decoded(ids, tokenizer)
