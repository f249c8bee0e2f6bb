"""The demo's task, tokenizer, warm-up and evaluation."""

import random
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from igrpo_algo.cli.demo import chain, evaluation
from igrpo_algo.cli.demo.evaluation import evaluate, summarize
from igrpo_algo.cli.demo.model import build_model, build_tokenizer, load_model, save_weights
from igrpo_algo.cli.demo.warmup import (
    IGNORED,
    WarmUp,
    chain_conversations,
    encode,
    warm_up,
)
from igrpo_algo.cli.demo.workers import SHIPPED_WEIGHTS
from igrpo_algo.drafts.text import splice_prompt
from igrpo_algo.rollouts.completions import Completion

PROBLEMS = st.builds(
    chain.Problem,
    st.integers(0, 15),
    st.tuples(*[st.sampled_from(chain.OPERATIONS)] * chain.NUM_OPERATIONS),
)
ANSWER = "12 4 0 0 2"


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.mark.parametrize(
    ("start", "operations", "answer"),
    [
        (7, ("+5", "*3", "-4", "*9", "+2"), "12 4 0 0 2"),
        (0, ("-1", "-8", "+8", "*15", "*7"), "15 7 15 1 7"),
        (15, ("+1", "*3", "+8", "*5", "-3"), "0 0 8 8 5"),
    ],
)
def test_answers_worked_by_hand(start: int, operations: tuple[str, ...], answer: str) -> None:
    assert chain.Problem(start, operations).answer == answer


@pytest.mark.parametrize("operation", chain.OPERATIONS)
def test_every_operation_permutes_the_values(operation: str) -> None:
    images = [chain.apply_operation(value, operation) for value in range(16)]
    assert sorted(images) == list(range(16))
    assert images != list(range(16))  # and none of them is idle


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (ANSWER, True),
        (f"  {ANSWER}\n", True),
        ("12  4 0 0 2", True),
        ("2", False),
        ("12 4 0 0", False),
        ("12 4 0 0 2 2", False),
        ("12 4 0 0 3", False),
        ("4 12 0 0 2", False),
        ("12 4 0 0 +2", False),
        ("12, 4, 0, 0, 2", False),
        ("12 4 0 0 2 mod", False),
        ("12 4 0 0 \u00b2", False),
        ("", False),
    ],
)
def test_the_verifier_wants_every_value_and_nothing_else(text: str, right: bool) -> None:
    assert chain.is_correct(text, ANSWER) is right


def test_the_reward_reads_chat_completions() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in (ANSWER, "2", ANSWER)]
    rewards = chain.chain_reward(completions, [ANSWER, ANSWER, "2"], prompts=["?"] * 3)
    assert rewards == [1.0, 0.0, 0.0]


def test_held_out_problems_are_never_trained_on() -> None:
    held_out = frozenset(chain.draw_problems(3, seed=0))
    first = chain.draw_problems(4, seed=0, exclude=held_out)
    assert held_out.isdisjoint(first)
    assert first == chain.draw_problems(7, seed=0)[3:]  # the same draws, those in `exclude` skipped


def test_the_teacher_errs_as_often_as_it_says() -> None:
    rng = random.Random(0)
    teacher = chain.Teacher(seed=3)
    right = total = 0
    for problem in chain.draw_problems(2000, seed=5):
        values = [problem.start, *map(int, teacher.answer(problem, rng).split())]
        steps = zip(values[:-1], problem.operations, values[1:], strict=True)
        for value, operation, following in steps:
            right += chain.apply_operation(value, operation) == following
            total += 1
    # 0.6 * 0.97 + 0.4 * 0.35; which of the 368 facts are weak is drawn, hence the width.
    assert right / total == pytest.approx(0.722, abs=0.06)


def test_a_weak_fact_has_one_favorite_error() -> None:
    rng = random.Random(0)
    teacher = chain.Teacher(weak_share=1.0, weak_accuracy=0.0)
    problem = chain.Problem(3, ("+1",))
    answers = [teacher.answer(problem, rng) for _ in range(400)]
    counts = sorted((answers.count(answer) for answer in set(answers)), reverse=True)
    assert "4" not in answers
    assert counts[0] / 400 == pytest.approx(0.6 + 0.4 / 15, abs=0.08)
    assert counts[1] < 40


@given(PROBLEMS, st.lists(st.integers(0, 15), min_size=1, max_size=5))
def test_the_tokenizer_gives_back_every_text_of_the_task(problem, values) -> None:
    tokenizer = build_tokenizer()
    draft = chain.write_values(values)
    [message] = splice_prompt(chain.ask(problem), draft, template=chain.TEMPLATE)
    for text in (problem.question, problem.answer, message["content"]):
        ids = tokenizer(text).input_ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    assert len(tokenizer(problem.answer).input_ids) == chain.NUM_OPERATIONS


def test_a_draft_stands_in_the_prompt_in_the_tokens_it_was_sampled_in(tokenizer) -> None:
    problem = chain.Problem(7, ("+5", "*3", "-4", "*9", "+2"))
    spliced = splice_prompt(chain.ask(problem), ANSWER, template=chain.TEMPLATE)
    text = tokenizer.apply_chat_template(spliced, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\n7 +5 *3 -4 *9 +2 mod 16\ndraft:\n12 4 0 0 2\nrefine:<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    ids, draft = tokenizer(text).input_ids, tokenizer(ANSWER).input_ids
    assert any(ids[start : start + len(draft)] == draft for start in range(len(ids)))


def test_unknown_words_become_the_unknown_token(tokenizer) -> None:
    assert tokenizer("hello").input_ids == [tokenizer.unk_token_id]


def test_labels_are_the_answer_and_its_end(tokenizer) -> None:
    short = [{"role": "user", "content": "7 +5"}, {"role": "assistant", "content": "12"}]
    long = [{"role": "user", "content": "7 +5 *3"}, {"role": "assistant", "content": "12 4"}]
    batch = encode([short, long], tokenizer)
    kept = [row[row != IGNORED] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in kept] == ["12<|im_end|>", "12 4<|im_end|>"]
    assert torch.equal(batch["labels"] != IGNORED, (batch["labels"] == batch["input_ids"]))
    assert batch["attention_mask"].sum(-1).tolist() == [12, 14]


def test_the_warm_up_learns(tokenizer) -> None:
    model, settings = build_model(tokenizer), WarmUp(steps=30, batch_size=64)
    losses = list(warm_up(model, tokenizer, settings, chain_conversations(settings)))
    assert len(losses) == 30
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


def test_the_warm_up_is_the_same_each_time(tokenizer) -> None:
    def losses() -> list[float]:
        settings = WarmUp(batch_size=4)
        draw = chain_conversations(settings)
        return list(islice(warm_up(build_model(tokenizer), tokenizer, settings, draw), 3))

    assert losses() == losses()


def test_building_a_model_leaves_the_global_generator_alone(tokenizer) -> None:
    before = torch.get_rng_state()
    build_model(tokenizer, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_come_back_from_their_file(tokenizer, tmp_path) -> None:
    model = build_model(tokenizer, seed=1)
    save_weights(model, tmp_path / "weights.safetensors")
    loaded = load_model(tmp_path / "weights.safetensors", tokenizer)
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, model.state_dict()[name].bfloat16().float())


def test_the_shipped_model_is_sometimes_right_with_and_without_a_draft(tokenizer) -> None:
    assert SHIPPED_WEIGHTS.stat().st_size < 1_000_000
    model = load_model(SHIPPED_WEIGHTS, tokenizer)
    problems = chain.held_out_problems(400)
    result = evaluate(model, tokenizer, problems, seed=0)
    for accuracy in (result.accuracy, result.refined_accuracy):
        assert 0.1 < accuracy < 0.3
    assert result.correct != result.refined
    assert result.length == pytest.approx(6, abs=0.1)
    assert evaluate(model, tokenizer, problems, seed=0) == result


def test_a_refinement_sees_its_own_answer(tokenizer, monkeypatch) -> None:
    asked: list[list] = []

    def sample(prompts, sampler, count, *, seed):
        asked.append(prompts)
        ids = tokenizer(str(len(asked))).input_ids
        answers = [Completion(ids, str(number), [-1.0], "stop") for number in range(len(prompts))]
        return SimpleNamespace(flat=answers)

    monkeypatch.setattr(evaluation, "sample_group", sample)
    problems = chain.held_out_problems(2)
    evaluate(load_model(SHIPPED_WEIGHTS, tokenizer), tokenizer, problems, seed=0)
    assert asked[0] == [chain.ask(problem) for problem in problems]
    assert asked[1] == [
        splice_prompt(prompt, draft, template=chain.TEMPLATE)
        for prompt, draft in zip(asked[0], ["0", "1"], strict=True)
    ]


def test_an_evaluation_is_accuracies_entropy_and_length() -> None:
    problem = chain.Problem(7, ("+5", "*3", "-4", "*9", "+2"))
    answers = [
        Completion([1, 2], ANSWER, [-0.5, -0.1], "stop"),
        Completion([1, 2, 3, 4], "2", [-0.2, -0.2, -0.4, -0.4], "length"),
    ]
    result = summarize(answers, [answers[0]] * 2, [problem, problem])
    assert result.correct == [True, False]
    assert (result.accuracy, result.refined_accuracy) == (0.5, 1.0)
    assert result.entropy == pytest.approx(1.8 / 6)
    assert result.length == 3.0
