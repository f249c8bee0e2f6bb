"""iGRPO under tinker-cookbook's own rollouts, environments and data; a tiny model is the policy."""

import asyncio
import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tinker.lib.public_interfaces.training_client import TrainingClient
from tinker.types import ImageChunk
from tinker_cookbook.completers import TokenCompleter, TokensWithLogprobs
from tinker_cookbook.renderers import get_renderer
from tinker_cookbook.rl.data_processing import compute_advantages, trajectory_to_data
from tinker_cookbook.rl.message_env import EnvFromMessageEnv, MessageEnv, MessageStepResult
from tinker_cookbook.rl.problem_env import ProblemEnv, ProblemGroupBuilder
from tinker_cookbook.rl.rollout_strategy import RetryOnFailure, rollout_strategy_from_config
from tinker_cookbook.rl.rollouts import do_group_rollout
from tinker_cookbook.rl.types import Env, EnvGroupBuilder, TrajectoryGroup

HOSTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HOSTS))
from contract import Group
from differences import note_tensors
from tiny_qwen3 import SPECIAL, make_model, make_tokenizer

from igrpo_algo import DraftRules, DraftTemplate, TextSplice, select_worst_draft
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.tinker import IGRPO, make_loss
from igrpo_kernels import Clip

SHORT = TextSplice(DraftTemplate("[", "]"))
RULES = DraftRules(splice=SHORT)
TOKENIZER = make_tokenizer()
RENDERER = get_renderer("role_colon", TOKENIZER)


def letters(text: str) -> float:
    """Sum the letters, without the special tokens that tinker's renderer leaves in a message."""
    for special in SPECIAL:
        text = text.replace(special, "")
    return float(sum(map(ord, text.strip())))


class Policy(TokenCompleter):
    """Our sampler as tinker's policy."""

    def __init__(self, fail_on: int | None = None) -> None:
        self.sampler = TransformersSampler(make_model(), TOKENIZER, max_new_tokens=8)
        self.asked: list[list[int]] = []
        self.answered: list[tuple[str, str]] = []
        self.fail_on = fail_on

    async def __call__(
        self, model_input: tinker.ModelInput, stop: Any, *, max_tokens: int | None = None
    ) -> TokensWithLogprobs:
        ids = model_input.to_ints()
        self.asked.append(ids)
        number = len(self.asked)
        await asyncio.sleep(0)
        if number == self.fail_on:
            raise ConnectionError("out of order")
        ((drawn,),) = self.sampler.sample([ids], 1, seed=number)
        self.answered.append((TOKENIZER.decode(ids), drawn.text))
        return TokensWithLogprobs(drawn.token_ids, drawn.logprobs)


class Letters(ProblemEnv):
    """A problem for a random model: the reward is the sum of the letters."""

    def __init__(self, question: str = "1+1?") -> None:
        super().__init__(RENDERER, format_coef=0.0)
        self.question = question

    def get_question(self) -> str:
        return self.question

    def check_answer(self, sample_str: str) -> Any:
        return letters(sample_str)

    def check_format(self, sample_str: str) -> bool:
        return True

    def get_reference_answer(self) -> str:
        return "z"


def group(policy: TokenCompleter, strategy: IGRPO, builder: Any = None) -> TrajectoryGroup:
    builder = builder or ProblemGroupBuilder(Letters, num_envs=4)
    return asyncio.run(do_group_rollout(builder, policy, rollout_strategy_from_config(strategy)))


def text_of(model_input: tinker.ModelInput) -> str:
    return TOKENIZER.decode(model_input.to_ints())


@pytest.mark.parametrize("num_drafts", [3, 4, 6])
def test_a_group_shares_one_draft_and_its_refinements_are_trained_on(num_drafts: int) -> None:
    policy = Policy()
    done = group(policy, IGRPO(num_drafts, RULES))
    drafts = [text for prompt, text in policy.answered if "[" not in prompt.split("?")[1]]
    assert len(drafts) == num_drafts
    (advantages,) = compute_advantages([done])
    rows = [
        trajectory_to_data(trajectory, advantage)
        for trajectory, advantage in zip(done.trajectories_G, advantages.tolist(), strict=True)
    ]
    trained = []
    for (datum,) in rows:
        start = datum.loss_fn_inputs["mask"].to_torch().tolist().index(1.0)
        trained.append(TOKENIZER.decode(datum.model_input.to_ints()[: start + 1]))
    Group(
        "1+1?",
        drafts,
        max((text.strip() for text in drafts), key=letters),
        [prompt for prompt, _ in policy.answered if "1+1?[" in prompt],
        trained,
        done.get_total_rewards(),
        advantages.tolist(),
    ).check(num_drafts=num_drafts, num_refinements=4)
    metrics = done.trajectories_G[0].transitions[-1].metrics
    mean = sum(letters(text.strip()) for text in drafts) / num_drafts
    assert metrics["igrpo/draft_reward"] == pytest.approx(mean)
    assert metrics["igrpo/conditioned"] == 1.0


def test_what_is_trained_on_is_what_was_sampled_from() -> None:
    policy = Policy()
    done = group(policy, IGRPO(2, RULES))
    model = make_model()
    for trajectory in done.trajectories_G:
        (step,) = trajectory.transitions
        ids = step.ob.to_ints()
        assert ids in policy.asked
        with torch.no_grad():
            logits = model(torch.tensor([ids + step.ac.tokens])).logits[0, len(ids) - 1 : -1]
        targets = torch.tensor(step.ac.tokens)[:, None]
        known = logits.log_softmax(-1).gather(-1, targets)[:, 0]
        sampled = torch.tensor(step.ac.maybe_logprobs)
        torch.testing.assert_close(known, sampled, atol=5e-5, rtol=0)  # the samplers' own bound


@pytest.mark.parametrize(("rules", "pick"), [(DraftRules(select_worst_draft), min), (RULES, max)])
def test_the_draft_is_the_one_that_the_rules_choose(rules: DraftRules, pick: Any) -> None:
    policy = Policy()
    done = group(policy, IGRPO(3, DraftRules(rules.select, splice=SHORT)))
    drafts = [text.strip() for _, text in policy.answered[:3]]
    assert f"1+1?[{pick(drafts, key=letters)}]" in text_of(done.trajectories_G[0].transitions[0].ob)


def test_the_draft_is_cut_to_fit_and_the_question_never() -> None:
    policy = Policy()
    plain = len(RENDERER.build_generation_prompt([{"role": "user", "content": "1+1?"}]).to_ints())
    done = group(policy, IGRPO(2, RULES, max_prompt_tokens=plain + 5))
    assert {len(t.transitions[0].ob.to_ints()) for t in done.trajectories_G} == {plain + 5}
    assert all("1+1?[" in text_of(t.transitions[0].ob) for t in done.trajectories_G)
    done = group(policy, IGRPO(2, RULES, max_prompt_tokens=plain))
    assert {len(t.transitions[0].ob.to_ints()) for t in done.trajectories_G} == {plain}
    assert done.trajectories_G[0].transitions[0].metrics["igrpo/conditioned"] == 0.0


class Pictured:
    """A renderer that puts an image of 3 tokens before every prompt."""

    def __getattr__(self, name: str) -> Any:
        return getattr(RENDERER, name)

    def build_generation_prompt(self, messages: list[Any], **options: Any) -> tinker.ModelInput:
        image = ImageChunk(data=b"", format="png", expected_tokens=3)
        text = RENDERER.build_generation_prompt(messages, **options)
        return tinker.ModelInput(chunks=[image, *text.chunks])


def test_an_image_stays_and_counts_as_its_tokens() -> None:
    class PicturedLetters(Letters):
        def __init__(self) -> None:
            super().__init__()
            self.renderer = Pictured()

    class Blind(Policy):
        async def __call__(self, model_input: tinker.ModelInput, stop: Any, **options: Any) -> Any:
            text = tinker.ModelInput(chunks=model_input.chunks[1:])
            return await super().__call__(text, stop, **options)

    plain = len(RENDERER.build_generation_prompt([{"role": "user", "content": "1+1?"}]).to_ints())
    strategy = IGRPO(2, RULES, max_prompt_tokens=plain + 8)
    done = group(Blind(), strategy, ProblemGroupBuilder(PicturedLetters, 2))
    shown = [t.transitions[0].ob for t in done.trajectories_G]
    assert {each.length for each in shown} == {plain + 8}
    assert all(isinstance(each.chunks[0], ImageChunk) for each in shown)


class TwoTurns(MessageEnv):
    """Asks twice; the second turn repeats the conversation, as its environment knows it."""

    def __init__(self) -> None:
        self.messages: list[Any] = [{"role": "user", "content": "1+1?"}]

    async def initial_observation(self) -> list[Any]:
        return list(self.messages)

    async def step(self, message: Any) -> MessageStepResult:
        self.messages += [message, {"role": "user", "content": "Sure?"}]
        done = len(self.messages) > 3
        return MessageStepResult(letters(message["content"]), done, list(self.messages))


@dataclass(frozen=True)
class TwoTurnGroup(EnvGroupBuilder):
    made: list[TwoTurns] = field(default_factory=list)

    async def make_envs(self) -> Sequence[Env]:
        envs = [TwoTurns(), TwoTurns()]
        self.made.extend(envs)
        return [EnvFromMessageEnv(RENDERER, env, terminate_on_parse_error=False) for env in envs]

    async def compute_group_rewards(self, trajectory_group: Any, env_group: Any) -> Any:
        assert all(isinstance(env, EnvFromMessageEnv) for env in env_group)
        return [(100.0 * index, {}) for index in range(len(trajectory_group))]


class CleanPolicy(Policy):
    """Ends each answer with the end token, so that its renderer takes it as a message."""

    async def __call__(self, model_input: Any, stop: Any, **options: Any) -> TokensWithLogprobs:
        drawn = await super().__call__(model_input, stop, **options)
        drawn.tokens[-1] = TOKENIZER.eos_token_id
        return drawn


def test_the_draft_stays_in_the_prompt_over_further_turns() -> None:
    policy, builder = CleanPolicy(), TwoTurnGroup()
    done = group(policy, IGRPO(2, RULES), builder)
    for trajectory in done.trajectories_G:
        first, second = (text_of(step.ob) for step in trajectory.transitions)
        assert "1+1?[" in first
        assert second.startswith(first[: first.index("]")])
        assert "Sure?" in second
    assert all(env.messages[0]["content"] == "1+1?" for env in builder.made)  # never see the draft


def test_the_rewards_of_the_group_count_in_both_stages() -> None:
    policy, builder = CleanPolicy(), TwoTurnGroup()
    done = group(policy, IGRPO(2, RULES), builder)
    drafts = policy.answered[:4]
    assert all("[" not in prompt.split("?")[1] for prompt, _ in drafts)
    assert list(done.final_rewards_G) == [0.0, 100.0]


def test_failures_are_repeated_as_each_says() -> None:
    with pytest.raises(ConnectionError, match="out of order"):
        group(Policy(fail_on=2), IGRPO(3, RULES))
    strategy = IGRPO(3, RULES, each=RetryOnFailure(max_retries=1))
    assert strategy.catches_group_errors
    for number in (2, 5):  # a draft, a refinement
        done = group(Policy(fail_on=number), strategy)
        assert len(done.trajectories_G) == 4
        assert [error.error_type for error in done.rollout_errors] == ["ConnectionError"]


def test_what_can_not_work_is_refused_before_sampling() -> None:
    with pytest.raises(ValueError, match=r"when_failed must not be Fallback\.SKIP"):
        IGRPO(rules=DraftRules(failed_below=1.0, when_failed=Fallback.SKIP))
    for name in ("num_drafts", "max_prompt_tokens"):
        with pytest.raises(ValueError, match=f"{name} must be >= 1"):
            IGRPO(**{name: 0})

    class Tokens(Letters):
        def __init__(self) -> None:
            super().__init__()
            del self.renderer

    policy = Policy()
    with pytest.raises(ValueError, match="Tokens has no renderer"):
        group(policy, IGRPO(2, RULES), ProblemGroupBuilder(Tokens, 2))
    assert not policy.asked


def test_a_group_of_different_problems_is_refused() -> None:
    questions = iter(["1+1?", "2+2?"] * 4)
    builder = ProblemGroupBuilder(lambda: Letters(next(questions)), 2)
    with pytest.raises(ValueError, match="must begin with the same messages"):
        group(Policy(), IGRPO(2, RULES), builder)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000))
def test_loss_and_gradient_are_equation_5(seed: int) -> None:
    """Through tinker's own call of a custom loss, on tinker-cookbook's data."""
    generator = torch.Generator().manual_seed(seed)
    lengths, prompt = [3, 5, 2, 4], 3
    values = [torch.randn(4, n, generator=generator, dtype=torch.float64) for n in lengths]
    data, outputs, rows = [], [], []
    for value in values:
        start = torch.zeros(prompt - 1, dtype=torch.float64)
        old, new = -value[0].abs(), -value[0].abs() + 0.3 * value[2]
        fields = {
            "target_tokens": torch.zeros(prompt - 1 + len(old), dtype=torch.int64),
            "logprobs": torch.cat([start, old]),
            "advantages": torch.cat([start, value[1][:1].expand(len(old))]),
            "mask": torch.cat([start, torch.ones_like(old)]),
        }
        tensors = {name: tinker.TensorData.from_torch(each) for name, each in fields.items()}
        ints = tinker.ModelInput.from_ints([1] * len(fields["mask"]))
        data.append(tinker.Datum(model_input=ints, loss_fn_inputs=tensors))
        outputs.append({"logprobs": tinker.TensorData.from_torch(torch.cat([start, new]))})
        rows.append((new, old, value[1][0]))
    forward = tinker.ForwardBackwardOutput(
        loss_fn_output_type="logprobs", loss_fn_outputs=outputs, metrics={}
    )
    result = TrainingClient._compute_custom_loss(data, make_loss(Clip(0.2, 0.28)), forward)
    news, total = [], 0.0
    for new, old, advantage in rows:
        news.append(new.clone().requires_grad_())
        ratio = (news[-1] - old).exp()
        least = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        total = total - least.mean() / len(rows)
    total.backward()
    loss = torch.tensor(result.loss_sum, dtype=torch.float64)
    # tinker sends the negated gradient on as the weights of a cross entropy.
    weights = [datum.loss_fn_inputs["weights"] for datum in result.data]
    gradient = torch.cat([-weight.to_torch()[prompt - 1 :] for weight in weights])
    expected = torch.cat([new.grad for new in news])
    note_tensors("tinker-cookbook", "loss; equation 5 by its custom losses", loss, total)
    note_tensors("tinker-cookbook", "gradient; equation 5 by its custom losses", gradient, expected)
    # What comes back from a server is in float32.
    torch.testing.assert_close(loss, total.detach(), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-6)
    assert all(weight.to_torch()[: prompt - 1].eq(0).all() for weight in weights)


def test_the_configuration_of_the_example_takes_the_strategy() -> None:
    path = HOSTS.parents[1] / "examples" / "tinker_math.py"
    spec = importlib.util.spec_from_file_location("tinker_math", path)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    assert example.make_config().effective_rollout_strategy() == IGRPO(8, max_prompt_tokens=2048)
