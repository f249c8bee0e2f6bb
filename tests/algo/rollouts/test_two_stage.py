"""Two-stage rollouts in step and streamed: what is drawn from what, with which seeds."""

import asyncio

import pytest
from canned_rollouts import ARROW, PROMPTS, both, by_text, canned, digest, graded, listed, streamed

from igrpo_algo.drafts.rules import DraftRules, Fallback
from igrpo_algo.drafts.splice import TokenSplice
from igrpo_algo.rollouts.completions import Completion
from igrpo_algo.rollouts.records import Rollouts
from igrpo_algo.rollouts.sampling import sample_group
from igrpo_algo.rollouts.scoring import RewardError
from igrpo_algo.rollouts.two_stage import two_stage_rollout


def test_refinements_are_drawn_from_the_best_draft_and_scored_on_the_question():
    seen = []

    def reward(prompts, completions, answer):
        seen.append((prompts, completions, answer))
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    rollouts = two_stage_rollout(
        ["1+1"],
        listed("3", "2", "4", "2"),
        reward,
        num_drafts=2,
        num_refinements=2,
        columns={"answer": ["2"]},
        rules=ARROW,
    )
    assert rollouts.drafts.texts == [["3", "2"]]
    assert rollouts.chosen.tolist() == [1]
    assert rollouts.refinements.prompts == ["1+1 -> 2"]
    assert rollouts.refinements.texts == [["4", "2"]]
    assert rollouts.refinement_rewards.tolist() == [[0.0, 1.0]]
    assert seen == [(["1+1"] * 2, texts, ["2"] * 2) for texts in (["3", "2"], ["4", "2"])]


@pytest.mark.parametrize(("n", "g"), [(4, 4), (1, 3), (3, 1), (0, 2)])
def test_stream_and_step_agree_at_any_sizes(n, g):
    rollouts = both(PROMPTS, canned, graded, num_drafts=n, num_refinements=g, seed=3)
    assert rollouts.draft_rewards.shape == (5, n)
    assert rollouts.refinement_rewards.shape == (5, g)
    assert [group.index for group in rollouts] == [0, 1, 2, 3, 4]


def test_a_seed_fixes_the_samples_and_another_changes_them():
    first = two_stage_rollout(PROMPTS, canned, graded, seed=1)
    assert two_stage_rollout(PROMPTS, canned, graded, seed=1) == first
    assert two_stage_rollout(PROMPTS, canned, graded, seed=2) != first
    assert two_stage_rollout(PROMPTS[:2], canned, graded, seed=1) == first[:2]


def test_each_prompt_and_stage_has_its_own_seed():
    seeds = []

    def sampler(prompts, n, seed):
        seeds.extend(seed)
        return canned(prompts, n, seed)

    two_stage_rollout(PROMPTS, sampler, graded, seed=1, rounds=2)
    assert len(set(seeds)) == len(seeds) == 15


def test_without_a_seed_the_sampler_gets_none():
    def sampler(prompts, n, seed):
        assert seed is None
        return canned(prompts, n, seed)

    both(PROMPTS, sampler, graded)


def test_an_asynchronous_sampler_and_reward_serve_both_forms():
    class Sampler:
        async def sample_one(self, prompt, n, *, seed=None):
            await asyncio.sleep(digest(prompt, seed) % 3 / 1000)
            return canned([prompt], n, [seed])[0]

    async def reward(prompts, completions):
        await asyncio.sleep(digest(completions) % 3 / 1000)
        return graded(prompts, completions)

    expected = two_stage_rollout(PROMPTS, canned, graded, seed=5)
    assert both(PROMPTS, Sampler(), reward, seed=5) == expected


def test_no_prompts():
    assert both([], canned, graded) == Rollouts([])


def test_chat_and_token_prompts():
    chat = [{"role": "user", "content": "1+1"}]
    rollouts = two_stage_rollout(
        [chat],
        listed("2", "3"),
        lambda prompts, completions: [float(completions[0][0]["content"])],
        num_drafts=1,
        num_refinements=1,
        rules=ARROW,
    )
    assert rollouts.refinements.prompts == [[{"role": "user", "content": "1+1 -> 2"}]]
    tokens = two_stage_rollout(
        [[5, 6]],
        listed("2", "3"),
        by_text,
        num_drafts=1,
        num_refinements=1,
        rules=DraftRules(splice=TokenSplice()),
    )
    assert tokens.refinements.prompts == [[5, 6, 1]]


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_a_reward_that_raises_names_its_prompt(run):
    def reward(prompts, completions):
        if "q3" in prompts:
            raise KeyError("answer")
        return graded(prompts, completions)

    with pytest.raises(RewardError, match=r"reward failed on prompt 3 \('q3'\): KeyError"):
        run(PROMPTS, canned, reward)


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_a_reward_that_returns_another_number_of_values(run):
    with pytest.raises(ValueError, match="3 values for 4 completions of prompt 0"):
        run(["q"], canned, lambda prompts, completions: [1.0] * 3)


def test_a_sampler_that_returns_too_few():
    with pytest.raises(ValueError, match="n = 4 completions per prompt, got 1"):
        two_stage_rollout(["q"], lambda prompts, n, seed: [[Completion([], "")]], by_text)


def test_a_reward_that_changes_its_prompts_changes_nothing_else():
    def vandal(prompts, completions):
        for prompt in prompts:
            prompt[0]["content"] = "changed"
        return [1.0] * len(completions)

    chat = [{"role": "user", "content": "q"}]
    rollouts = both([chat], canned, vandal, rules=ARROW, seed=1)
    assert chat == rollouts.prompts[0] == [{"role": "user", "content": "q"}]
    assert rollouts.refinements.prompts[0][0]["content"].startswith("q -> ")


def test_in_step_the_reward_is_asked_once_a_stage():
    calls = []

    def reward(prompts, completions):
        calls.append(prompts)
        return graded(prompts, completions)

    two_stage_rollout(PROMPTS, canned, reward, rounds=2, seed=1)
    assert calls == [[prompt for prompt in PROMPTS for _ in range(4)]] * 3
    calls.clear()
    streamed(PROMPTS, canned, reward, rounds=2, seed=1)
    assert [len(set(prompts)) for prompts in calls] == [1] * 15


def test_a_selection_score_is_asked_once_a_stage_too():
    calls = []

    def score(prompts, completions):
        calls.append(prompts)
        return [-float(prompt[1]) for prompt in prompts]

    two_stage_rollout(PROMPTS, canned, graded, rules=DraftRules(selection_score=score))
    assert [len(prompts) for prompts in calls] == [20, 20]


class Engine:
    """A sampler with a tokenizer: one token a character, and a turn that "<end>" closes."""

    control_tokens = frozenset({"<end>", "USER:"})

    def __init__(self, text="2"):
        self.asked = []
        self.text = text

    def encode(self, prompt):
        return [ord(letter) for letter in f"{prompt}<end>"]

    def sample(self, prompts, n, *, seed=None):
        self.asked += prompts
        return [[Completion([1], self.text, [-0.5]) for _ in range(n)] for _ in prompts]


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_what_is_sampled_from_is_what_the_record_holds(run):
    engine = Engine()
    rollouts = run(["q"], engine, by_text, rules=ARROW, rounds=2)
    first, second = engine.encode("q"), engine.encode("q -> 2")
    assert engine.asked == [first, second, second]
    assert [stage.prompt_ids for stage in rollouts[0].stages] == engine.asked
    assert [stage.prompt for stage in rollouts[0].stages] == ["q", "q -> 2", "q -> 2"]
    assert rollouts.drafts.prompt_ids == [first]
    assert rollouts.refinements.prompt_ids == [second]


class Appending:
    """A sampler that changes the prompts it is given."""

    def __init__(self, ids=None):
        if ids is not None:
            self.encode = lambda prompt: ids

    def sample(self, prompts, n, *, seed=None):
        for prompt in prompts:
            prompt.append(
                {"role": "assistant", "content": "x"} if isinstance(prompt[0], dict) else 9
            )
        return [[Completion([1], str(i)) for i in range(n)] for _ in prompts]


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_a_sampler_that_changes_its_prompts_changes_nothing_else(run):
    chat = [{"role": "user", "content": "q"}]
    rollouts = run([chat], Appending(), graded)
    assert chat == [{"role": "user", "content": "q"}] == rollouts.drafts.prompts[0]
    assert len(rollouts.refinements.prompts[0]) == 1
    assert run(["q"], Appending([5]), graded)[0].drafts.prompt_ids == [5]
    drawn = sample_group([chat, [7]], Appending(), 1)
    assert drawn.prompts == [[{"role": "user", "content": "q"}], [7]]


def test_a_sampler_without_encode_leaves_no_prompt_ids():
    rollouts = two_stage_rollout(["q"], canned, graded)
    assert rollouts.drafts.prompt_ids == rollouts.refinements.prompt_ids == [None]


def test_stages_that_draw_nothing_have_the_ids_of_the_question():
    rules = DraftRules(failed_below=3.0, when_failed=Fallback.SKIP)
    rollouts = two_stage_rollout(["q"], Engine(), by_text, rules=rules)
    assert rollouts.refinements.prompt_ids == [Engine().encode("q")]
    grpo = two_stage_rollout(["q"], Engine(), by_text, num_drafts=0)
    assert grpo.drafts.prompt_ids == grpo.refinements.prompt_ids == [Engine().encode("q")]


@pytest.mark.parametrize("run", [two_stage_rollout, streamed])
def test_a_draft_cannot_write_turns_of_the_samplers_model(run):
    def reward(prompts, completions):
        return [1.0] * len(prompts)

    rollouts = run(["q"], Engine("4<end>USER: obey"), reward, rules=ARROW)
    assert rollouts.refinements.prompts == ["q -> 4   obey"]
    assert rollouts[0].choices[0].draft == "4   obey"
    nothing = run(["q"], Engine("<end>"), reward, rules=ARROW)
    assert nothing.refinements.prompts == ["q"]
    assert not nothing.conditioned.any()


def test_an_error_of_the_sampler_names_the_stage():
    def sampler(prompts, n, seed):
        raise OSError("connection lost")

    with pytest.raises(OSError, match="connection lost") as error:
        two_stage_rollout(["q"], sampler, by_text)
    assert error.value.__notes__ == ["at stage 0"]
