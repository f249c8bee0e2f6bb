"""What the trainer refuses before anything is sampled."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny_qwen import (
    digit_reward,
    make_dataset,
    make_tokenizer,
    third_party,
)
from transformers import ProcessorMixin

from igrpo_algo.advantages.baselines import rloo
from igrpo_algo.drafts.rules import DraftRules
from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer
from igrpo_algo.trainers.trl.versions import warn_of_untested_trl

pytestmark = third_party
MakeTrainer = Callable[..., Any]


def make_config() -> IGRPOConfig:
    return IGRPOConfig("out", bf16=False, report_to="none")


@pytest.mark.parametrize("name", ["rollout_func", "environment_factory", "tools"])
def test_what_has_stages_of_its_own_is_refused(make_trainer: MakeTrainer, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        make_trainer(**{name: [print] if name == "tools" else print})


def test_images_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="images"):
        make_trainer(train_dataset=make_dataset().add_column("image", [None] * 8))
    with pytest.raises(ValueError, match="images"):
        make_trainer(eval_dataset={"one": make_dataset().add_column("images", [None] * 8)})


def test_images_in_messages_are_refused(make_trainer: MakeTrainer) -> None:
    parts = [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]
    prompts = [[{"role": "user", "content": content}] for content in (parts[1:], parts)]
    with pytest.raises(
        ValueError, match=r"row 1 of the data set has .* of type image: .* text alone"
    ):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": prompts}))


def test_the_ranking_must_be_one_that_exists(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="selection_reward must be one of digit_reward, got 'no'"):
        make_trainer(reward_funcs=digit_reward, selection_reward="no")
    with pytest.raises(ValueError, match="exclude each other"):
        make_trainer(
            reward_funcs=digit_reward, selection_reward="digit_reward", selection_func=digit_reward
        )


def test_prompts_of_token_ids_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match=r"row 0 .* got list \[5, 6\]: TRL takes no token ids"):
        make_trainer(train_dataset=Dataset.from_dict({"prompt": [[5, 6], [7]]}))


def test_a_tokenizer_without_an_end_is_refused(make_trainer: MakeTrainer) -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="processing_class must have an eos_token"):
        IGRPOTrainer("model", digit_reward, make_config(), processing_class=tokenizer)


def test_the_configuration_must_be_ours(make_trainer: MakeTrainer) -> None:
    from trl import GRPOConfig

    from igrpo_algo.trainers.trl import IGRPOTrainer

    with pytest.raises(TypeError, match="args must be an IGRPOConfig, got GRPOConfig"):
        IGRPOTrainer("model", digit_reward, GRPOConfig("out", bf16=False, report_to="none"))


def test_a_processor_is_refused_with_the_way_out(make_trainer: MakeTrainer) -> None:
    class Images(ProcessorMixin):
        def __init__(self) -> None:
            pass

    with pytest.raises(ValueError, match=r"got Images: .*processing_class=processor.tokenizer"):
        IGRPOTrainer("model", digit_reward, make_config(), processing_class=Images())


@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_a_conversation_without_a_users_message_is_refused(
    make_trainer: MakeTrainer, part: str
) -> None:
    prompts = [[{"role": "user", "content": "1"}], [{"role": "system", "content": "2"}]]
    dataset = Dataset.from_dict({"prompt": prompts})
    with pytest.raises(ValueError, match=r"row 1 .*without a user's message.*num_drafts=0"):
        make_trainer(**{part: dataset})
    assert make_trainer(num_drafts=0, **{part: dataset})
    assert make_trainer(draft_choice="none", **{part: dataset})


@pytest.mark.parametrize(
    ("prompt", "mark"),
    [("<s>user:1+1?</s><s>assistant:", "assistant:"), ("1+1?</s>", "</s>")],
)
def test_a_string_that_carries_a_template_is_refused(
    make_trainer: MakeTrainer, prompt: str, mark: str
) -> None:
    dataset = Dataset.from_dict({"prompt": ["plain", prompt]})
    with pytest.raises(ValueError, match=f"row 1 .*{mark}.*list of messages"):
        make_trainer(train_dataset=dataset)
    assert make_trainer(train_dataset=dataset, rules=DraftRules())  # a splice of the caller's own


def test_a_string_that_begins_a_text_is_no_template(make_trainer: MakeTrainer) -> None:
    assert make_trainer(train_dataset=Dataset.from_dict({"prompt": ["<s>1+1?"]}))


def test_options_beside_values_that_replace_them_are_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="draft_dropout would have no effect beside rules"):
        make_trainer(rules=DraftRules(), draft_dropout=0.5)
    with pytest.raises(ValueError, match="scale_rewards would have no effect beside an advantage"):
        make_trainer(advantage=rloo, scale_rewards="none")
    with pytest.raises(ValueError, match="scale_rewards would have no effect with multi_obj"):
        make_trainer(scale_rewards="none", multi_objective_aggregation="normalize_then_sum")
    with pytest.raises(ValueError, match="scale_rewards must be one of group, batch, none"):
        make_trainer(scale_rewards="std")
    with pytest.raises(ValueError, match="multi_objective_aggregation must be one of sum_then"):
        make_trainer(multi_objective_aggregation="sum")


def test_values_about_drafts_without_effect_are_refused(make_trainer: MakeTrainer) -> None:
    for options in ({"num_drafts": 0}, {"draft_choice": "none"}):
        with pytest.raises(ValueError, match="selection_func would have no effect without drafts"):
            make_trainer(selection_func=digit_reward, **options)
    with pytest.raises(ValueError, match="rules would have no effect without drafts"):
        make_trainer(rules=DraftRules(), num_drafts=0)
    ranked = DraftRules(selection_score=digit_reward)
    with pytest.raises(ValueError, match="the rules' selection_score exclude each other"):
        make_trainer(rules=ranked, selection_func=digit_reward)


def test_without_arguments_the_defaults_are_taken(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class StopError(Exception):
        pass

    def stop(self: Any, args: IGRPOConfig, **_: Any) -> None:
        seen.append(args)
        raise StopError

    @dataclass
    class OnCpu(IGRPOConfig):
        use_cpu: bool = True

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("igrpo_algo.trainers.trl.trainer.IGRPOConfig", OnCpu)
    monkeypatch.setattr("igrpo_algo.trainers.trl.policy_loss.PolicyLossTrainer.__init__", stop)
    with pytest.raises(StopError):
        IGRPOTrainer("folder/Qwen3-0.6B", train_dataset=make_dataset())
    assert Path(seen[0].output_dir).name == "Qwen3-0.6B-iGRPO"
    assert seen[0].num_drafts == 4


def test_a_version_that_was_not_tested_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, warns in (("1.13.2", True), ("1.14.0", False), ("1.16.3", False), ("1.17", True)):
        monkeypatch.setattr("trl.__version__", version)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warn_of_untested_trl()
        texts = [str(warning.message) for warning in caught]
        assert [("1.14 to 1.16" in t and f"TRL {version} is" in t) for t in texts] == [True] * warns
