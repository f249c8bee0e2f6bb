"""The loop of the example, and the README's, on a tiny model of random weights."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "algo" / "trainers"))

from tiny_qwen import make_model, make_tokenizer  # noqa: E402

from igrpo_algo.drafts.rules import DraftRules, Fallback  # noqa: E402
from igrpo_algo.drafts.splice import TextSplice  # noqa: E402
from igrpo_algo.drafts.text import DraftTemplate  # noqa: E402
from igrpo_algo.engines.transformers import TransformersSampler  # noqa: E402


@pytest.fixture
def own_loop():
    spec = importlib.util.spec_from_file_location("own_loop", ROOT / "examples" / "own_loop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_loop_learns_which_letter_to_end_with(own_loop):
    model, tokenizer = make_model(), make_tokenizer()
    sampler = TransformersSampler(model, tokenizer, max_new_tokens=2, batch_size=64)
    question = [{"role": "user", "content": "Which letter?"}]
    rules = DraftRules(splice=TextSplice(DraftTemplate("[", "]")))
    batches = [([question] * 8, ["A"] * 8)] * 40

    def reward(prompts, completions, answer):  # graded, so that a random model finds a beginning
        texts = [completion[0]["content"] for completion in completions]
        return [float(sum(letter < "K" for letter in text)) for text in texts]

    own_loop.ends_with_answer = reward
    steps = own_loop.train(model, sampler, batches, rules, learning_rate=1e-2, max_tokens=300)
    rewards = [rollouts.refinement_rewards.mean().item() for rollouts in steps]
    assert sum(rewards[-5:]) / 5 > 1.5 * sum(rewards[:5]) / 5


def test_the_reward_wants_the_answer_at_the_end(own_loop):
    drawn = [[{"role": "assistant", "content": text}] for text in ("It is 42.", "42 or 43", "")]
    assert own_loop.ends_with_answer([], drawn, ["42"] * 3) == [1.0, 0.0, 0.0]


def test_a_step_without_advantages_leaves_the_weights_alone(own_loop):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sampler = TransformersSampler(model, make_tokenizer(), max_new_tokens=2)
    rules = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    question = [{"role": "user", "content": "1+1?"}]
    (rollouts,) = own_loop.train(model, sampler, [([question], ["2"])], rules, learning_rate=1e-2)
    assert rollouts.skipped.tolist() == [True]
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_the_loop_of_the_readme_runs(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (loop,) = [block for block in blocks if "optimizer.step()" in block]
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    question = [{"role": "user", "content": "Which letter?"}]

    def reward(prompts, completions, answer):
        return [float(len(set(completion[0]["content"]))) for completion in completions]

    monkeypatch.setattr("igrpo_algo.rewards.math_reward", reward)
    given = {
        "model": model,
        "tokenizer": make_tokenizer(),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "batches": [([question] * 2, ["A"] * 2)],
    }
    exec(loop.replace("max_new_tokens=512", "max_new_tokens=3"), given)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
