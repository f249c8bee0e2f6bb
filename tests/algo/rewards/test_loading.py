"""Rewards by name: the built-in ones and those of a user."""

import subprocess
import sys
from pathlib import Path

import pytest

from igrpo_algo.rewards import BUILT_IN_REWARDS, load_reward


def test_load_reward_by_name_and_from_the_current_directory(tmp_path: Path, monkeypatch) -> None:
    for name, reward in BUILT_IN_REWARDS.items():
        assert load_reward(name) is reward
    (tmp_path / "my_rewards_here.py").write_text(
        "class Scores:\n    @staticmethod\n    def length(completions, **_):\n"
        "        return [float(len(c)) for c in completions]\nlimit = 3\n"
    )
    (tmp_path / "my_broken_rewards.py").write_text("import no_such_module_anywhere\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    assert load_reward("my_rewards_here:Scores.length")(["abc"]) == [3.0]
    with pytest.raises(ValueError, match=r"my_rewards_here has no attribute 'Scores.width'"):
        load_reward("my_rewards_here:Scores.width")
    with pytest.raises(TypeError, match="reward 'my_rewards_here:limit' must be callable, got int"):
        load_reward("my_rewards_here:limit")
    with pytest.raises(
        ImportError, match=r"'my_broken_rewards' could not.*no_such_module_anywhere"
    ):
        load_reward("my_broken_rewards:f")


@pytest.mark.parametrize("name", ["maths", "", ":f", "module:"])
def test_load_reward_names_what_it_knows(name: str) -> None:
    with pytest.raises(ValueError, match=r"one of math, exact, format, format-opened or module:fu"):
        load_reward(name)


def test_importing_rewards_loads_no_math_library() -> None:
    code = (
        "import sys, igrpo_algo.rewards;"
        "print([m for m in ('math_verify', 'transformers', 'trl', 'datasets') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
