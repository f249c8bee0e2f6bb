"""Rewards for the form of a completion."""

import pytest

from igrpo_algo.rewards import format_reward, opened_format_reward


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("\n<think>\na\nb\n</think>\n\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a</think> so <answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer>.", 0.0),
        ("ok <think>a</think><answer>b</answer>", 0.0),
        ("<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer> </answer>", 0.0),
        ("<answer>b</answer><think>a</think>", 0.0),
        ("<think>a<answer>b</answer></think>", 0.0),
        ("<think>a</think><answer>b", 0.0),
        ("<think>a<think></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("a</think><answer>b</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_format_reward(text: str, score: float) -> None:
    assert format_reward([text], answer=["b"]) == [score]
    assert opened_format_reward([text.removeprefix("<think>")]) == (
        [score] if text.startswith("<think>") else opened_format_reward([text])
    )


def test_opened_format_reward() -> None:
    texts = ["a</think><answer>b</answer>", "<think>a</think><answer>b</answer>", "a"]
    assert opened_format_reward(texts) == [1.0, 0.0, 0.0]
