"""Stage 1 once for a group whose samples are asked for one by one."""

import asyncio
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from igrpo_algo import Completion, DraftRules, DraftTemplate, TextSplice
from igrpo_algo.drafts.rules import Fallback, Ties
from igrpo_algo.drafts.splice import TokenBudget
from igrpo_algo.rollouts.once_per_group import (
    HostDraft,
    OncePerGroup,
    StageTwoPrompt,
    fit_to_tokenizer,
    stage_one,
)
from igrpo_algo.rollouts.scoring import RewardError

SPLICE = TextSplice(DraftTemplate("[", "]"))


class Host:
    """A trainer that asks for G samples of each prompt at once."""

    def __init__(self, texts: Sequence[str], **options: Any) -> None:
        self.texts = texts
        rules = options.pop("rules", DraftRules(splice=SPLICE))
        self.stage_one = OncePerGroup(rules=rules, num_drafts=len(texts), **options)
        self.drawn: list[tuple[str, int]] = []
        self.scored: list[list[str]] = []
        self.columns: dict[str, Any] = {}

    async def sample(self, prompt: str, **options: Any) -> StageTwoPrompt:
        async def draw(number: int) -> Completion:
            self.drawn.append((prompt, number))
            await asyncio.sleep(0)
            text = self.texts[number]
            return Completion(list(range(len(text))), text)

        async def score(drafts: Sequence[Completion]) -> list[float]:
            self.scored.append([draft.text for draft in drafts])
            await asyncio.sleep(0)
            return [float(draft.text) if draft.text.isdigit() else math.nan for draft in drafts]

        return await self.stage_one.prompt(
            prompt, prompt, draw, score, columns=self.columns, **options
        )

    def groups(self, *prompts: str, samples: int = 3, **options: Any) -> list[list[StageTwoPrompt]]:
        async def all_samples() -> Any:
            groups = (
                asyncio.gather(*(self.sample(prompt, **options) for _ in range(samples)))
                for prompt in prompts
            )
            return await asyncio.gather(*groups)

        return asyncio.run(all_samples())


def test_stage_one_runs_once_and_all_samples_get_its_best_draft():
    host = Host(["1", "30", "2"])
    ((first, *siblings),) = host.groups("q?")
    assert first == StageTwoPrompt("q?[30]", "30", (1.0, 30.0, 2.0))
    assert all(sibling is first for sibling in siblings)
    assert host.drawn == [("q?", 0), ("q?", 1), ("q?", 2)]
    assert host.scored == [["1", "30", "2"]]


def test_groups_with_other_keys_have_drafts_of_their_own():
    host = Host(["4"])
    (first, *_), (second, *_) = host.groups("a?", "b?")
    assert (first.prompt, second.prompt) == ("a?[4]", "b?[4]")
    assert sorted(host.drawn) == [("a?", 0), ("b?", 0)]


def test_the_next_epoch_draws_new_drafts():
    host = Host(["4"])

    async def twice() -> None:
        await asyncio.gather(*(host.sample("q?") for _ in range(2)))
        await asyncio.gather(*(host.sample("q?") for _ in range(2)))

    asyncio.run(twice())
    assert host.drawn == [("q?", 0)] * 2


def test_a_sample_that_comes_late_gets_the_draft_of_its_group_if_groups_are_kept():
    host = Host(["1"], keep=1)
    ((first, *_),) = host.groups("q?")
    ((late,),) = host.groups("q?", samples=1)
    assert late is first
    assert len(host.drawn) == 1
    host.groups("p?", "q?")  # the other group takes the one place that there is
    assert len(host.drawn) == 2
    host.groups("q?")
    assert len(host.drawn) == 3


def test_without_a_scored_draft_the_prompt_stays_plain():
    ((stage_two, *_),) = Host(["x", "y"]).groups("q?")
    assert (stage_two.prompt, stage_two.draft) == ("q?", "")
    assert all(map(math.isnan, stage_two.draft_rewards))
    assert (stage_two.mean_draft_reward, stage_two.is_conditioned) == (0.0, False)


def test_drafts_without_a_score_are_left_out_of_the_mean():
    ((stage_two, *_),) = Host(["2", "x", "4"]).groups("q?")
    assert (stage_two.mean_draft_reward, stage_two.is_conditioned) == (3.0, True)


def test_the_rules_see_scores_of_their_own_columns_and_lengths():
    def fewest_characters(completions: list[str], bonus: list[float], **_: Any) -> list[float]:
        return [-len(text) + extra for text, extra in zip(completions, bonus, strict=True)]

    host = Host(
        ["77", "8", "99"], rules=DraftRules(selection_score=fewest_characters, splice=SPLICE)
    )
    host.columns = {"bonus": 0.5}
    ((stage_two, *_),) = host.groups("q?")
    assert stage_two.draft == "8"
    shortest = DraftRules(ties=Ties.SHORTEST, splice=SPLICE)
    ((stage_two, *_),) = Host(["07", "7"], rules=shortest).groups("q?")
    assert stage_two.draft == "7"


def test_the_seed_and_the_key_decide_about_dropout():
    def dropped(seed: int) -> list[bool]:
        rules = DraftRules(dropout=0.5, splice=SPLICE)
        prompts = [f"{number}?" for number in range(40)]
        groups = Host(["1"], rules=rules, seed=seed).groups(*prompts, samples=2)
        assert all(len({sample.draft for sample in group}) == 1 for group in groups)
        return [group[0].draft == "" for group in groups]

    assert dropped(0) == dropped(0) != dropped(1)
    assert 8 <= sum(dropped(0)) <= 32  # of 40 at one half: beyond 3.8 standard deviations


def test_rules_of_the_call_stand_in_for_those_of_the_start():
    other = DraftRules(splice=TextSplice(DraftTemplate("{", "}")))
    ((stage_two, *_),) = Host(["5"]).groups("q?", rules=other)
    assert stage_two.prompt == "q?{5}"


def test_an_error_reaches_every_sample_and_the_next_call_starts_anew():
    def fails(completions: list[str], **_: Any) -> list[float]:
        raise KeyError("solution")

    host = Host(["1"], rules=DraftRules(selection_score=fails, splice=SPLICE))

    async def all_fail() -> list[Any]:
        samples = (host.sample("q?") for _ in range(3))
        return await asyncio.gather(*samples, return_exceptions=True)

    errors = asyncio.run(all_fail())
    assert [type(error) for error in errors] == [RewardError] * 3
    host.stage_one.rules = DraftRules(splice=SPLICE)
    assert host.groups("q?")[0][0].draft == "1"


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([0.0], ValueError, "score must give one reward per draft = 2, got 1"),
        ([0.0, 0.0, 1.0], ValueError, "score must give one reward per draft = 2, got 3"),
        ([0.0, None], TypeError, r"score must give a list of numbers, got list \[0.0, None\]"),
        (None, TypeError, "score must give a list of numbers, got NoneType"),
    ],
)
def test_score_must_give_one_number_per_draft(rewards: Any, error: Any, message: str):
    with pytest.raises(error, match=message):
        scored_by(rewards)


def scored_by(rewards: Any) -> StageTwoPrompt:
    async def draw(number: int) -> Completion:
        return Completion([number], str(number))

    async def score(_: Sequence[Completion]) -> Any:
        return rewards

    return asyncio.run(
        stage_one("q?", draw, score, rules=DraftRules(splice=SPLICE), num_drafts=2, seed=0)
    )


def test_rewards_close_to_each_other_are_no_tie():
    """As in `two_stage_rollout`: float32 would make these equal, and take the first."""
    assert scored_by([1.0, 1.0 + 1e-9]).draft == "1"
    assert scored_by([False, True]).draft_rewards == (0.0, 1.0)


@pytest.mark.parametrize("name", ["when_failed", "when_solved", "when_unscored"])
def test_rules_that_skip_prompts_are_refused(name: str):
    rules = DraftRules(**{name: Fallback.SKIP}, failed_below=1.0)
    with pytest.raises(ValueError, match=rf"{name} must not be Fallback\.SKIP"):
        OncePerGroup(rules=rules)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="rules must be DraftRules, got"):
        OncePerGroup(rules="best")
    with pytest.raises(ValueError, match="num_drafts must be >= 1, got 0"):
        OncePerGroup(num_drafts=0)
    with pytest.raises(ValueError, match="seed must be >= 0, got -1"):
        OncePerGroup(seed=-1)


class Characters:
    """A tokenizer of one token per character, and one control token."""

    eos_token_id = None
    unk_token_id = chat_template = None
    all_special_tokens = ("<end>",)
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(map(chr, ids))

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return list(map(chr, ids))


def test_a_draft_carries_what_the_trainer_drew_it_as_to_its_score():
    async def draw(number: int) -> HostDraft:
        return HostDraft.decoded(f"{number}!".encode(), Characters(), host={"reward": -number})

    async def score(drafts: Sequence[HostDraft]) -> list[float]:
        return [draft.host["reward"] for draft in drafts]

    stage_two = asyncio.run(
        stage_one("q", draw, score, rules=DraftRules(splice=SPLICE), num_drafts=3, seed=0)
    )
    assert stage_two.prompt == "q[0!]"
    assert stage_two.draft_rewards == (0.0, -1.0, -2.0)
    assert stage_two.logs() == {"igrpo_draft_reward": -1.0, "igrpo_conditioned": 1.0}
    assert stage_two.logs("igrpo/").keys() == {"igrpo/draft_reward", "igrpo/conditioned"}


def test_a_text_splice_gets_the_room_and_the_control_tokens():
    rules = fit_to_tokenizer(DraftRules(splice=SPLICE), Characters(), max_prompt_tokens=6)
    spliced = rules.condition("q?", Completion([], "12345"))
    assert spliced.prompt == "q?[45]"
    assert spliced.tokens_cut == 3
    free = fit_to_tokenizer(DraftRules(splice=SPLICE), Characters())
    assert free.condition("q?", Completion([], "1<end>2")).prompt == "q?[1 2]"


def test_a_budget_of_its_own_and_other_splices_are_left_as_they_are():
    budget = TokenBudget(Characters(), max_draft_tokens=1)
    own = DraftRules(splice=TextSplice(DraftTemplate("[", "]"), budget=budget))
    fitted = fit_to_tokenizer(own, Characters(), max_prompt_tokens=3)
    assert fitted.condition("q?", Completion([], "123")).prompt == "q?[3]"
    plain = DraftRules(splice=lambda prompt, draft: (prompt, draft.text, 0))
    assert fit_to_tokenizer(plain, Characters(), 3) is plain
    assert torch.equal(  # and the choice stays that of the rules
        fitted.choose(torch.tensor([[0.0, 1.0]]), seeds=[0]).index, torch.tensor([1])
    )
