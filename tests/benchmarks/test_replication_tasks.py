"""The tasks of the replication: what is right, what is partly right, and what teachers say."""

import random
from itertools import product

import pytest

from benchmarks.replication.tasks import TASKS, packing, signs, thinking
from igrpo_algo.cli.demo.chain import TEMPLATE, Problem
from igrpo_algo.cli.demo.model import build_tokenizer
from igrpo_algo.drafts.text import splice_prompt

SIGNS = signs.Signs(7, (2, 3, 1, 3, 1), 1)
PACKING = packing.Packing((3, 7, 2, 9, 4, 6), 17)
CHAIN = Problem(7, ("+5", "*3", "-4", "*9", "+2"))  # 12 4 0 0 2


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1 6 7 2 1", 1.0),  # + - + + -
        ("1 6 7 4 3", 0.0),  # right steps to another place
        ("1 6 7 3 1", 0.0),  # 7 to 3 is neither + 3 nor - 3
        ("1 6 7 2", 0.0),
        ("1 6 7 2 1 1", 0.0),
        ("1", 0.0),
        ("", 0.0),
        ("to", 0.0),
    ],
)
def test_signs_by_hand(text: str, score: float) -> None:
    assert signs.score(text, SIGNS) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("3 3 5 14 14 14", 14 / 17),  # 3 + 2 + 9; the best is 7 + 4 + 6
        ("0 7 7 7 11 17", 1.0),
        ("0 0 0 0 0 0", 0.0),
        ("3 10 12 12 16 22", 0.0),  # too heavy
        ("3 9 9 9 9 9", 0.0),  # 6 is not the second weight
        ("3 3 5 14 14", 0.0),
        ("3 0 0 0 0 0", 0.0),  # nothing is taken out again
        ("in", 0.0),
    ],
)
def test_packing_by_hand(text: str, score: float) -> None:
    assert packing.score(text, PACKING) == pytest.approx(score, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>12 4 0 0</think>2", 1.0),
        ("<think>1 1 1 1</think>2", 1.0),  # only what follows the thinking is judged
        ("2", 1.0),
        ("<think>12 4 0 0</think>3", 0.0),
        ("<think>12 4 0 0</think>0 2", 0.0),
        ("<think>12 4 0 2</think>", 0.0),
        ("<think>12 4 0 0 2", 0.0),  # cut off while it thinks
        ("12 4 0 0 2", 0.0),
        ("3<think>12 4 0 0</think>2", 1.0),  # as the library's rewards read it
        ("", 0.0),
    ],
)
def test_thinking_by_hand(text: str, score: float) -> None:
    assert thinking.score(text, CHAIN) == score


def test_the_best_load_is_that_of_all_choices() -> None:
    rng = random.Random(0)
    for _ in range(50):
        problem = packing.draw(rng)
        loads = (
            sum(w for w, taken in zip(problem.weights, choice, strict=True) if taken)
            for choice in product((False, True), repeat=len(problem.weights))
        )
        assert packing.best_load(problem) == max(x for x in loads if x <= problem.limit)


def test_every_walk_can_be_read_back_and_every_problem_solved() -> None:
    rng = random.Random(1)
    for _ in range(50):
        problem = signs.draw(rng)
        solved = 0
        for choice in product((1, -1), repeat=signs.NUMBERS):
            walked = signs.walk(problem.start, problem.numbers, choice)
            text = " ".join(map(str, walked))
            assert signs.read_signs(text, problem) == list(choice)
            solved += signs.score(text, problem) == 1.0
        assert solved >= 1


def test_a_mended_walk_arrives_with_at_most_one_sign_turned() -> None:
    rng, mended = random.Random(2), 0
    for _ in range(200):
        problem = signs.draw(rng)
        before = [rng.choice((1, -1)) for _ in problem.numbers]
        after = signs.mend(problem, before)
        if after is not None:
            mended += 1
            assert signs.walk(problem.start, problem.numbers, after)[-1] == problem.target
            assert sum(a != b for a, b in zip(after, before, strict=True)) <= 1
    # One in four walks arrives, and one of five numbers mends most of the others.
    assert 0.6 < mended / 200 < 0.98


@pytest.mark.parametrize("name", TASKS)
def test_a_teacher_is_right_now_and_then_in_words_that_the_tokenizer_knows(name: str) -> None:
    task, rng = TASKS[name], random.Random(3)
    tokenizer = build_tokenizer(task.words)
    scores = []
    for problem in task.draw_many(200, seed="teacher"):
        draft = task.teach(problem, None, rng)
        answer = task.teach(problem, draft, rng)
        scores += [task.score(draft, problem), task.score(answer, problem)]
        prompt = [{"role": "user", "content": problem.question}]
        (spliced,) = splice_prompt(prompt, draft, template=TEMPLATE)
        for text in (spliced["content"], answer):
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text
        assert len(tokenizer(answer).input_ids) < task.answer_tokens
    assert 0.05 < sum(score == 1.0 for score in scores) / 400 < 0.6


def test_a_wrong_draft_helps_the_teacher_of_signs() -> None:
    task, rng = TASKS["signs"], random.Random(4)
    alone = with_draft = wrong = 0
    for problem in task.draw_many(600, seed="helps"):
        draft = task.teach(problem, None, rng)
        if task.score(draft, problem) < 1.0:  # so nothing is given away
            wrong += 1
            alone += task.score(task.teach(problem, None, rng), problem) == 1.0
            with_draft += task.score(task.teach(problem, draft, rng), problem) == 1.0
    assert (with_draft - alone) / wrong > 0.08


def test_a_right_draft_helps_the_teacher_of_thinking() -> None:
    task, rng = TASKS["thinking"], random.Random(4)
    alone, with_draft = [], []
    for problem in task.draw_many(2000, seed="helps"):
        right = problem.answer.split()[-1]
        alone.append(task.score(task.teach(problem, None, rng), problem))
        with_draft.append(task.score(task.teach(problem, right, rng), problem))
    # Half of the time it thinks twice: p becomes p + p (1 - p) / 2, and p is about 0.23; the two
    # shares of 2,000 differ by chance by 0.03 at most.
    assert 0.04 < (sum(with_draft) - sum(alone)) / 2000 < 0.14


def test_the_warm_up_shows_drafts_with_their_thinking_and_without() -> None:
    """Half each, on the task that thinks; what other tasks draw is as it was."""
    rng = random.Random(5)
    shown = []
    for _ in range(400):
        prompt, _ = TASKS["thinking"].converse(rng, exclude=frozenset(), draft_share=1.0)
        shown.append("<think>" in prompt["content"])
    assert 0.4 < sum(shown) / 400 < 0.6
    assert [name for name in TASKS if TASKS[name].thinks] == ["thinking"]


@pytest.mark.parametrize("name", TASKS)
def test_held_out_problems_are_left_out(name: str) -> None:
    task = TASKS[name]
    held_out = frozenset(task.draw_many(20, seed=0))
    drawn = task.draw_many(20, seed=0, exclude=held_out)
    assert len(set(drawn)) == 20
    assert held_out.isdisjoint(drawn)
    assert task.draw_many(40, seed=0)[20:] == drawn


def test_the_reward_reads_chat_completions() -> None:
    completions = [[{"role": "assistant", "content": text}] for text in ("1 6 7 2 1", "")]
    assert TASKS["signs"].reward(completions, [SIGNS, SIGNS], prompts=["?"] * 2) == [1.0, 0.0]
