"""Whole runs on the tiny model: learning, adapters, evaluation, saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_qwen import early_letters, make_dataset, third_party
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def snapshot(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("beyond", [{}, {"draft_loss_coef": 1.0, "draft_dropout": 0.25}])
def test_training_raises_the_reward_single_shot(
    make_trainer: MakeTrainer, beyond: dict[str, float]
) -> None:
    trainer = make_trainer(
        eval_dataset=make_dataset(4),
        per_device_train_batch_size=16,
        per_device_eval_batch_size=16,
        num_train_epochs=1000,
        max_steps=20,
        learning_rate=3e-2,
        **beyond,
    )
    before = trainer.evaluate()["eval_reward"]
    trainer.train()
    after = trainer.evaluate()["eval_reward"]
    # Chance is .41, 16 completions have a standard error of .04, and all early letters give .86.
    assert before < 0.6
    assert after > 0.7
    history = [log["igrpo/draft_reward"] for log in trainer.state.log_history if "reward" in log]
    assert len(history) == 20
    assert sum(history[-3:]) > sum(history[:3])


def test_a_streamed_data_set_keeps_its_groups(make_trainer: MakeTrainer) -> None:
    seen: list[list[str]] = []

    def noted(completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
        seen.append(answer)
        return early_letters(completions)

    dataset = make_dataset().to_iterable_dataset()
    trainer = make_trainer(train_dataset=dataset, reward_funcs=noted, num_drafts=2)
    trainer.train()
    for drafted, refined in zip(seen[::2], seen[1::2], strict=True):
        first, second = refined[0], refined[4]
        assert refined == [first] * 4 + [second] * 4
        assert drafted == [first] * 2 + [second] * 2


def test_a_saved_model_loads_again(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trainer = make_trainer(max_steps=1, save_steps=1, save_strategy="steps")
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert snapshot(loaded).keys() == snapshot(trainer.model).keys()
    for name, parameter in snapshot(trainer.model).items():
        torch.testing.assert_close(loaded.get_parameter(name), parameter, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.chat_template == trainer.processing_class.chat_template
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "2602.09000" in card


def test_evaluation_during_training(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        eval_dataset=make_dataset(2),
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
        num_generations_eval=2,
        num_drafts=2,
        eval_with_draft=True,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "eval_reward" in log]
    assert len(logs) == 2
    assert "eval_igrpo/uplift" in logs[0]


def test_lora_trains_the_adapter_alone(make_trainer: MakeTrainer) -> None:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(peft_config=adapter, learning_rate=1e-1)
    before = snapshot(trainer.model)
    trainer.train()
    changed = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


def test_a_head_that_peft_trains_whole_is_trained(make_trainer: MakeTrainer) -> None:
    adapter = LoraConfig(
        r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM"
    )
    trainer = make_trainer(peft_config=adapter, learning_rate=1e-1)
    before = snapshot(trainer.model)
    trainer.train()
    heads = {name for name in before if "lm_head" in name}
    after = snapshot(trainer.model)
    changed = {name for name in heads if not torch.equal(after[name], before[name])}
    assert changed == {name for name in heads if "modules_to_save" in name}
    assert changed
