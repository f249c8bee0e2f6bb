"""One stage in TRL's hands: its generation, its scoring and its batch, with our advantages."""

import inspect
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ...advantages.of_groups import sum_rewards
from ...prompts import decode_completion, encode_prompt
from ...rollouts.sampling import run_blocking
from .advantage_options import Advantage, advantages_of
from .policy_loss import PolicyLossTrainer
from .stages import Stage


class StageTrainer(PolicyLossTrainer):
    """Runs a `Stage` through TRL's `_generate_and_score_completions`.

    The methods that TRL calls on the way read what is to be drawn off the stage, and leave on it
    what was drawn and how it was scored.
    """

    advantage: Advantage | None = None
    selection_func: Callable[..., Any] | None = None
    _stage: Stage | None = None

    def run_stage(self, inputs: list[dict[str, Any]], stage: Stage) -> dict[str, Any]:
        """Let TRL draw and score a stage, and make its batch for the loss."""
        with self._running(stage):
            batch: dict[str, Any] = super()._generate_and_score_completions(inputs)
        of_all_ranks = advantages_of(
            stage.rewards_per_func, stage.group, self.reward_weights, self.args, self.advantage
        )
        first = self.accelerator.process_index * len(inputs)
        batch["advantages"] = of_all_ranks[first : first + len(inputs)]
        logged = self._logs["advantages"]
        for _ in range(min(len(of_all_ranks), len(logged))):
            logged.pop()  # TRL's own
        logged.extend(of_all_ranks.tolist())
        return batch

    def draw_and_score(self, inputs: list[dict[str, Any]], stage: Stage) -> None:
        """Let TRL draw and score a stage that is not trained on."""
        prompts = [row["prompt"] for row in inputs]
        with self._running(stage):
            self._generate(prompts)
            self._calculate_rewards(inputs, prompts, stage.completions, stage.completion_ids)

    def total_rewards(self, stage: Stage) -> Tensor:
        """Add up the weighted rewards of all ranks; NaN where there is none. Shape [P, G]."""
        rewards = stage.rewards_per_func
        total = sum_rewards(rewards, self.reward_weights.to(rewards.device))
        return total.view(-1, stage.group)

    def texts(self, stage: Stage) -> list[str]:
        """Return the texts of this rank's completions."""
        return [decode_completion(ids, self._tokenizer) for ids in stage.completion_ids]

    def selection_scores(self, inputs: list[dict[str, Any]], stage: Stage) -> Tensor | None:
        """Rank what was drawn by something else than its training reward. Shape [P, N]."""
        if self.args.selection_reward is not None:
            column = self.reward_func_names.index(self.args.selection_reward)
            return stage.rewards_per_func[:, column].view(-1, stage.group)
        if self.selection_func is None:
            return None
        rank = self.selection_func

        def selection_func(**columns: Any) -> Any:
            scores = rank(**columns)
            return run_blocking(_wait_for(scores)) if inspect.isawaitable(scores) else scores

        with self._holding(
            reward_funcs=[selection_func],
            reward_func_names=["selection_func"],
            reward_processing_classes=[None],
            _pending_extra_logs=defaultdict(list),
        ):
            prompts = [row["prompt"] for row in inputs]
            scores = self._calculate_rewards(
                inputs, prompts, stage.completions, stage.completion_ids
            )
        return scores.view(-1, stage.group)

    @contextmanager
    def drafting(self) -> Iterator[None]:
        """Make TRL draw `num_drafts` of each prompt, its metrics and tables set aside."""
        with self._holding(
            num_generations=self.args.num_drafts,
            num_generations_eval=self.args.num_drafts,
            _metrics={mode: defaultdict(list) for mode in self._metrics},
            _logs={
                name: defaultdict(list) if isinstance(log, defaultdict) else []
                for name, log in self._logs.items()
            },
            _pending_extra_logs=defaultdict(list),
            _pending_metrics=defaultdict(list),
        ):
            yield

    @contextmanager
    def _holding(self, **values: Any) -> Iterator[None]:
        """Give attributes of TRL's other values for a while."""
        kept = {name: getattr(self, name) for name in values}
        for name, value in values.items():
            setattr(self, name, value)
        try:
            yield
        finally:
            for name, value in kept.items():
                setattr(self, name, value)

    @contextmanager
    def _running(self, stage: Stage) -> Iterator[None]:
        self._stage = stage
        try:
            yield
        finally:
            self._stage = None

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        if self._stage is not None and self._stage.sampled is not None:
            return self._stage.sampled.prompt_ids, None, {}
        kwargs = self.chat_template_kwargs
        return [encode_prompt(each, self._tokenizer, kwargs) for each in prompts], None, {}

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], Any]:
        if self._stage is None or self._stage.sampled is None:
            drawn: tuple[list[list[int]], Any] = super()._generate_single_turn(*args, **kwargs)
            return drawn
        completions = self._stage.sampled.completions
        ids = [completion.token_ids for completion in completions]
        logprobs = [completion.logprobs for completion in completions]
        if None not in logprobs:
            return ids, logprobs
        if self.vllm_importance_sampling_correction:
            raise ValueError(
                "the sampler gives no log-probs, which the importance correction needs: set "
                "vllm_importance_sampling_correction=False, or sample with log-probs"
            )
        return ids, None

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        stage = self._stage
        if stage is None:
            return super()._generate(prompts)
        ids, drawn, mask, completions, *rest = super()._generate(
            prompts if stage.prompts is None else stage.prompts
        )
        stage.completion_ids, stage.completions = drawn, completions
        for place, text in enumerate(self.texts(stage)):  # TRL drops thinking marks that are tokens
            if isinstance(completions[place], str):
                completions[place] = text
            elif completions[place][0].keys() == {"role", "content"}:
                completions[place][0]["content"] = text
        return ids, drawn, mask, completions, *rest

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        stage = self._stage
        if stage is None or stage.sampled is None:
            rewards = super()._calculate_rewards(*args, **kwargs)
        else:
            rewards = self.accelerator.gather(stage.sampled.rewards_per_func)
            self._scored = ~rewards.isnan()
            for column, values in stage.sampled.extra.items():
                self._log_completion_extra(column, values)
        for name, values in zip(self.reward_func_names, rewards.T, strict=True):
            if values.isinf().any():
                raise ValueError(
                    f"reward function {name!r} must return finite numbers, or None for what cannot "
                    "be scored, got inf or -inf"
                )
        if stage is not None:
            stage.rewards_per_func = rewards
            if self.log_completions and stage.drafts is not None:
                taken = "draft" in self._pending_extra_logs  # a reward's own column
                self._log_completion_extra("igrpo/draft" if taken else "draft", stage.drafts)
        return rewards


async def _wait_for(scores: Awaitable[Any]) -> Any:
    return await scores
