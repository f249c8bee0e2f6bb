import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

OF_TRAINER = (
    "model",
    "reward_funcs",
    "reward_processing_classes",
    "train_dataset",
    "eval_dataset",
    "surrogate",
    "aggregate",
    "selection_func",
    "rules",
    "advantage",
    "sampler",
    "callbacks",
    "peft_config",
    "rollout_func",
    "environment_factory",
    "tools",
)


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Any]:
    """Build a trainer on the tiny model; options go to the trainer or to its configuration."""
    import tiny_qwen

    from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer

    def build(**options: Any) -> IGRPOTrainer:
        given = {name: options.pop(name) for name in OF_TRAINER if name in options}
        given.setdefault("model", tiny_qwen.make_model())
        given.setdefault("reward_funcs", tiny_qwen.early_letters)
        given.setdefault("train_dataset", tiny_qwen.make_dataset())
        args = IGRPOConfig(**tiny_qwen.base_options(tmp_path) | options)
        return IGRPOTrainer(args=args, processing_class=tiny_qwen.make_tokenizer(), **given)

    return build


@pytest.fixture
def saved_model(tmp_path: Path) -> str:
    """A folder to load the reference model from."""
    from tiny_qwen import make_model, make_tokenizer

    make_model(seed=1).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")
