"""Arguments that no sane caller passes: each is refused by its name, never taken for another."""

import math

import pytest
import torch

from igrpo_algo import (
    Completion,
    DraftRules,
    Rollouts,
    TextSplice,
    TokenSplice,
    igrpo_loss,
    sample_group,
    stream_two_stage_rollout,
    two_stage_rollout,
)
from igrpo_algo.advantages import sum_rewards
from igrpo_algo.advantages.presets import (
    nemo_rl_gdpo_advantages,
    verl_gdpo_advantages,
    verl_opo_advantages,
)
from igrpo_algo.drafts import RandomTokens, TokenBudget, truncate_draft
from igrpo_algo.early_warning import EarlyWarning
from igrpo_algo.layouts import pack_sequences, pad_sequences
from igrpo_algo.losses import high_entropy_mask
from igrpo_algo.prompts import check_prompts, decode_completion, encode_prompt
from igrpo_algo.rewards import format_reward, load_reward, math_reward
from igrpo_algo.rollouts import RolloutProgress, plot_rollout_timeline
from igrpo_algo.rollouts.completions import pad_completions
from igrpo_kernels import SequenceMean, VocabularyShard, clipped_policy_loss, token_logprobs
from igrpo_kernels.checks import describe

LOGITS, TARGETS = torch.zeros(2, 3), torch.tensor([0, 1])
LOGPROBS, ADVANTAGES = -torch.ones(2, 3), torch.ones(2)
META = torch.ones(2, device="meta")


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def nested() -> list:
    value: list = []
    for _ in range(5000):
        value = [value]
    return value


def sampler(prompts, n, seed=None):
    return [[Completion([1], "1")] * n for _ in prompts]


def score(completions, **_):
    return [1.0] * len(completions)


def rollout(**options):
    return two_stage_rollout(["q"], sampler, score, **options)


def stream(**options):
    return stream_two_stage_rollout(["q"], sampler, score, **options)


def scores(**options):
    return token_logprobs(LOGITS, TARGETS, **options)


def clipped(**options):
    return clipped_policy_loss(LOGPROBS, ADVANTAGES, **options)


REFUSED = [
    # Tensors that hold no plain values.
    ("logits must be dense", lambda: token_logprobs(LOGITS.to_sparse(), TARGETS)),
    (
        "logits must have at least 16 bits",
        lambda: token_logprobs(LOGITS.to(torch.float8_e4m3fn), TARGETS),
    ),
    ("temperature must hold values", lambda: scores(temperature=META)),
    ("temperature must hold numbers", lambda: scores(temperature=torch.ones(2).bool())),
    ("threshold must hold values", lambda: high_entropy_mask(LOGITS, META)),
    (r"threshold must have shape \[\]", lambda: high_entropy_mask(LOGITS, LOGITS)),
    ("threshold must be a floating-point", lambda: high_entropy_mask(LOGITS, TARGETS[0])),
    ("rewards must hold K >= 1", lambda: nemo_rl_gdpo_advantages(torch.zeros(2, 3, 0))),
    ("rewards must have shape", lambda: verl_gdpo_advantages(torch.tensor(1.0), TARGETS)),
    ("lengths must have shape", lambda: verl_opo_advantages(LOGITS, TARGETS)),
    ("weights must hold values", lambda: sum_rewards(LOGITS[None], META)),
    # Numbers.
    (r"weights\[0\] must fit 64 bits", lambda: sum_rewards(LOGITS[None], [10**400, 1, 1])),
    ("threshold must fit 64 bits", lambda: high_entropy_mask(LOGITS, 10**30)),
    ("denominator must be 0 or >= 1.18e-38", lambda: SequenceMean(1e-40)),
    ("dual_clip must be >= 1.2", lambda: clipped(dual_clip=1.0)),
    ("clip_low must be >= 0", lambda: clipped(clip_low=-1.0)),
    ("kl_coef must be a number", lambda: igrpo_loss(LOGPROBS, ADVANTAGES, kl_coef=META)),
    ("return_entropy must be True or False", lambda: scores(return_entropy="no")),
    ("think_opened must be True or False", lambda: format_reward(["a"], think_opened=None)),
    ("pad_token_id must be an int", lambda: pad_sequences([[1]], [[2]], pad_token_id=0.5)),
    ("pad_token_id must be >= 0", lambda: pad_completions([], pad_token_id=-1)),
    ("sizes must be a tuple", lambda: VocabularyShard(3, 0, "group")),
    # Token ids, texts and log-probs.
    (r"token_ids\[1\] must be an int, got float", lambda: Completion([1, 2.0], "a")),
    (r"token_ids\[0\] must be an int, got bool", lambda: Completion([True], "a")),
    ("token_ids must lie in .*, got int -1", lambda: Completion([-1], "a")),
    ("token_ids must lie in .*, got int 9223", lambda: Completion([2**63], "a")),
    ("token_ids must be a list, got int", lambda: Completion(3, "a")),
    ("text must be a string, got NoneType", lambda: Completion([1], None)),
    (r"logprobs\[0\] must be a number, got str", lambda: Completion([1], "a", ["-1"])),
    ("logprobs must be finite, got -1e", lambda: Completion([1], "a", [-1e300])),
    ("logprobs must be finite, got -1000", lambda: Completion([1], "a", [-(10**400)])),
    (r"draft_ids\[0\] must be an int", lambda: truncate_draft([1.5], 1)),
    (r"after_ids\[0\] must be an int", lambda: TokenSplice(after_ids=("3",))),
    ("special_ids must be a collection", lambda: TokenSplice(special_ids="</s>")),
    (r"prompt\[0\] must be an int, got float", lambda: encode_prompt([1.5], None)),
    ("prompt must be a string or a non-empty list", lambda: encode_prompt([], None)),
    ("tokenizer must be callable", lambda: encode_prompt("q", None)),
    ("tokenizer must be one of transformers", lambda: decode_completion([1], None)),
    (r"prompts\[0\] is nested too deeply", lambda: check_prompts([nested()])),
    # Functions, columns and records.
    ("tokenizer must be callable, got str", lambda: TokenBudget("gpt2", 5)),
    ("strip must be callable", lambda: TextSplice(strip="<think>")),
    ("tokenizer must be callable, got str", lambda: RandomTokens("gpt2")),
    ("draft must be a str, got None", lambda: RandomTokens(len)(None)),
    ("clock must be callable", lambda: RolloutProgress(1, clock=3)),
    ("label must be a str", lambda: RolloutProgress(1, label=3)),
    ("metrics must be a mapping, got list", lambda: EarlyWarning().see([])),
    ("template must be a DraftTemplate", lambda: TextSplice(template="{draft}")),
    ("budget must be a TokenBudget or None", lambda: TextSplice(budget=512)),
    ("draft must have a text and token_ids", lambda: TextSplice()("q", "a draft")),
    ("columns must be a dict of lists", lambda: rollout(columns=["answer"])),
    ("seeds must be a list", lambda: DraftRules().choose(torch.zeros(1, 2), seeds=3)),
    (r"completions\[0\] must be a Completion, got str", lambda: pad_completions(["a"])),
    ("answer must be a list, got float", lambda: math_reward(["1"], answer=1.0)),
    ("answer must be a list, got set", lambda: math_reward(["1"], answer={"1"})),
    ("completions must be a list, got dict", lambda: format_reward({"a": 1})),
    ("chat_template_kwargs must be a mapping", lambda: encode_prompt("q", len, ["think"])),
    (r"prompts\[0\]\[0\] must be an int", lambda: pack_sequences([["1"]], [[2]])),
    (r"completions\[0\] must be a list", lambda: pack_sequences([[1]], [2])),
    ("journal must be a path, got int 3", lambda: stream(journal=3)),
    ("path must be a path, got bytes", lambda: rollout().save(b"x")),
    ("path must be a path, got int 3", lambda: Rollouts.load(3)),
    ("title must be a str", lambda: plot_rollout_timeline(rollout(), title=3)),
    ("seed must be an int or a list", lambda: sample_group(["q"], sampler, 1, seed=b"x")),
    ("completions must be a list, got str", lambda: math_reward("1", answer=["1"])),
    ("reward must be a string, got NoneType", lambda: load_reward(None)),
]


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_an_argument_is_refused_by_its_name(message, call):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("value", [Unprintable(), nested()])
def test_what_cannot_be_shown_is_named_by_its_type(value):
    assert describe(value) == f"{type(value).__name__} that cannot be shown"
    for refuse in (
        lambda: token_logprobs(value, TARGETS),
        lambda: TextSplice(template=value),
        lambda: math_reward([value], answer=["1"]),
        lambda: TextSplice(special_tokens=[value]),
    ):
        with pytest.raises(TypeError, match="must be"):
            refuse()


def test_log_probs_at_the_edge_of_float32_are_kept():
    largest = torch.finfo(torch.float32).max
    assert Completion([1, 2], "a", [-largest, 0]).logprobs == [-largest, 0]
    with pytest.raises(ValueError, match="logprobs must be finite, got nan for token 1"):
        Completion([1, 2], "a", [0.0, math.nan])
