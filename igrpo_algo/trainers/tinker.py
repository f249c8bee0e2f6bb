"""iGRPO in tinker-cookbook 0.6: a `RolloutStrategy`, which owns a whole group.

    from igrpo_algo.trainers.tinker import IGRPO
    Config(..., rollout_error_tolerance=IGRPO(num_drafts=4))

The environments, their rewards and tinker's losses stay as they are; G is the group size. tinker
centers the refinements' rewards. Its evaluators use no strategy, so evaluation is single-shot.
`make_loss` is for a loop of your own over `forward_backward_custom`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from igrpo_kernels import Clip, SequenceMean
from igrpo_kernels.aggregates import Aggregate
from igrpo_kernels.checks import check_count
from igrpo_kernels.surrogates import Surrogate

from .. import policy_loss
from ..drafts.rules import DraftRules
from ..rollouts.completions import Completion
from ..rollouts.once_per_group import check_rules, fit_to_tokenizer, stage_one
from ..seeds import derive_seed
from .rendering import AsTokenizer
from .versions import requires

with requires("tinker-cookbook", "0.6", "0.6"):
    import tinker
    from tinker_cookbook.completers import TokenCompleter
    from tinker_cookbook.rl.rollout_strategy import FailFast, RolloutResult, RolloutStrategy
    from tinker_cookbook.rl.types import Env, EnvGroupBuilder


@dataclass(frozen=True)
class IGRPO(RolloutStrategy):
    """Runs both stages of a group.

    All environments of a group must begin with the same messages, and render them with `renderer`,
    as `ProblemEnv` and `EnvFromMessageEnv` do. They never see the draft: it is put in where
    messages become tokens. A draft is the last action of its trajectory.

    Attributes:
        num_drafts: N.
        rules: How a draft is chosen and spliced. A `TextSplice` gets the control tokens of the
            renderer's tokenizer.
        max_prompt_tokens: Maximum tokens of a spliced prompt; the draft is cut to fit, the question
            never is. Set it below the context of the model, by the length of an answer.
        each: How the rollouts of a stage are run: `RetryOnFailure()`, say.
        seed: For random ties, random drafts and dropout.

    Raises:
        TypeError: `rules` is not `DraftRules`, or a count not an int.
        ValueError: A count is below 1, or the rules leave prompts out of Stage 2.
    """

    num_drafts: int = 4
    rules: DraftRules = DraftRules()
    max_prompt_tokens: int | None = None
    each: RolloutStrategy = field(default_factory=FailFast)
    seed: int = 0

    def __post_init__(self) -> None:
        check_count("num_drafts", self.num_drafts)
        check_count("seed", self.seed, at_least=0)
        if self.max_prompt_tokens is not None:
            check_count("max_prompt_tokens", self.max_prompt_tokens)
        check_rules(self.rules)

    @property
    def catches_group_errors(self) -> bool:
        """Whether a group that failed is left out, as `each` says."""
        return self.each.catches_group_errors

    async def execute(
        self, env_group_builder: EnvGroupBuilder, policy: TokenCompleter
    ) -> RolloutResult:
        """Draw the drafts, then the refinements, which alone are returned.

        Raises:
            ValueError: An environment has no renderer, or those of the group begin differently.
        """
        drafts = await self.each.execute(_Group(env_group_builder, self.num_drafts), policy)
        rewards = await _rewards(env_group_builder, drafts)
        question, renderer = _question_of(drafts.envs)

        async def draw(number: int) -> Completion:
            action = drafts.trajectories[number].transitions[-1].ac
            return Completion.decoded(action.tokens, renderer.tokenizer)

        async def score(_: Sequence[Completion]) -> list[float]:
            return rewards

        stage_two = await stage_one(
            question,
            draw,
            score,
            rules=self._fit_rules(renderer),
            num_drafts=len(rewards),
            seed=derive_seed(self.seed, repr(question)),
        )
        stage_two_group = _Group(env_group_builder, None, question, stage_two.prompt)
        refined = await self.each.execute(stage_two_group, policy)
        for trajectory in refined.trajectories:
            trajectory.transitions[-1].metrics.update(stage_two.logs("igrpo/"))
        return RolloutResult(refined.trajectories, refined.envs, [*drafts.errors, *refined.errors])

    def _fit_rules(self, renderer: Any) -> DraftRules:
        def render(messages: list[dict[str, Any]]) -> list[int]:
            # Only counted, as images have a length but no ids.
            return list(range(renderer.build_generation_prompt(messages).length))

        tokenizer = AsTokenizer(renderer.tokenizer, render)
        return fit_to_tokenizer(self.rules, tokenizer, self.max_prompt_tokens)


@dataclass
class _Group(EnvGroupBuilder):
    """The environments of a group, as many as wanted, which show `shown` in `question`'s place."""

    builder: EnvGroupBuilder
    count: int | None = None
    question: list[Any] | None = None
    shown: Any = None

    async def make_envs(self) -> Sequence[Env]:
        envs = list(await self.builder.make_envs())
        while len(envs) < (self.count or 0):
            envs += await self.builder.make_envs()
        for env in envs[: self.count]:
            if not hasattr(env, "renderer"):
                raise ValueError(
                    f"{type(env).__name__} has no renderer: a draft is put in among messages, and "
                    "this environment gives tokens"
                )
            env.renderer = _Renderer(env.renderer, self.question, self.shown)
        return envs[: self.count]


class _Renderer:
    """The renderer of one environment; what it begins with is kept, and replaced where asked for.

    What the environment adds later, in further turns, stays.
    """

    def __init__(self, renderer: Any, question: list[Any] | None, shown: Any) -> None:
        self._renderer = renderer
        self.question = question
        self._shown = shown

    def __getattr__(self, name: str) -> Any:
        return getattr(self._renderer, name)

    def build_generation_prompt(self, messages: list[Any], **options: Any) -> tinker.ModelInput:
        if self.question is None:
            self.question = list(messages)
        if self._shown is not None:
            if messages[: len(self.question)] != self.question:
                raise ValueError(_DIFFERENT)
            messages = [*self._shown, *messages[len(self.question) :]]
        return self._renderer.build_generation_prompt(messages, **options)


_DIFFERENT = "the environments of a group must begin with the same messages to share a draft"


def _question_of(envs: Sequence[Any]) -> tuple[list[Any], Any]:
    """Return the first messages of a group's environments, and their renderer."""
    first = envs[0].renderer
    if any(env.renderer.question != first.question for env in envs):
        raise ValueError(_DIFFERENT)
    return first.question, first


async def _rewards(builder: EnvGroupBuilder, result: RolloutResult) -> list[float]:
    """Score trajectories as tinker scores a group: the rewards of their steps, and the group's."""
    of_group = await builder.compute_group_rewards(result.trajectories, result.envs)
    return [
        sum(step.reward for step in trajectory.transitions) + reward
        for trajectory, (reward, _) in zip(result.trajectories, of_group, strict=True)
    ]


def make_loss(
    surrogate: Surrogate = Clip(), aggregate: Aggregate = SequenceMean()
) -> Callable[[Sequence[tinker.Datum], list[Tensor]], tuple[Tensor, dict[str, float]]]:
    """Make a loss for `TrainingClient.forward_backward_custom`, by default the paper's equation 5.

    The data are those of tinker-cookbook's `trajectory_to_data`. Give `aggregate` the denominator
    of the whole step where a step is several calls.

    Args:
        surrogate: Any surrogate of `igrpo_kernels`.
        aggregate: How tokens are averaged.

    Returns:
        A function of B data and their log-probs, each of shape [T], to a loss and its metrics.
    """

    def loss_fn(
        data: Sequence[tinker.Datum], logprobs: list[Tensor]
    ) -> tuple[Tensor, dict[str, float]]:
        def padded(name: str) -> Tensor:
            rows = [datum.loss_fn_inputs[name].to_torch() for datum in data]
            return pad_sequence(rows, batch_first=True)

        result = policy_loss(
            pad_sequence(logprobs, batch_first=True),
            padded("advantages"),
            padded("mask"),
            surrogate=surrogate,
            aggregate=aggregate,
            old_logprobs=padded("logprobs"),
        )
        return result.loss, {name: value.item() for name, value in result.metrics.items()}

    return loss_fn
