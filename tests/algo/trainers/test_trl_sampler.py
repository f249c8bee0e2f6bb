"""Both stages drawn by a sampler of the library: streamed, scored, synced, corrected."""

import asyncio
import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pandas
import pytest
import torch
from peft import LoraConfig
from scripted import DRAFTS, REFINED, chat
from tiny_qwen import (
    SHORT_TEMPLATE,
    digit_reward,
    early_letters,
    make_dataset,
    make_model,
    make_tokenizer,
    text_of,
    third_party,
)
from torch import Tensor
from transformers import Qwen3ForSequenceClassification

from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.prompts import encode_prompt
from igrpo_algo.rollouts.completions import Completion

pytestmark = third_party
MakeTrainer = Callable[..., Any]
TOKENIZER = make_tokenizer()


class ScriptedEngine:
    """Gives out the texts that are written for a prompt; keeps what it is asked, in order."""

    def __init__(self, texts: dict[str, list[str]], *, gives_logprobs: bool = True) -> None:
        self.texts = texts
        self.gives_logprobs = gives_logprobs
        self.asked: list[str] = []
        self.slow: str | None = None

    def encode(self, prompt: Any) -> list[int]:
        return encode_prompt(prompt, TOKENIZER)

    async def sample_one(self, prompt: Any, n: int, *, seed: int | None = None) -> list[Completion]:
        shown = TOKENIZER.decode(self.encode(prompt))
        self.asked.append(shown)
        for _ in range(10_000 * (shown == self.slow)):
            if any("[" in asked for asked in self.asked):
                break  # another prompt has come to its second stage
            await asyncio.sleep(0)
        drawn = []
        for text in self.texts[shown][:n]:
            ids = TOKENIZER.convert_tokens_to_ids([*text, "</s>"])
            drawn.append(Completion(ids, text, [-4.6] * len(ids) if self.gives_logprobs else None))
        return drawn


def scripted(**options: Any) -> ScriptedEngine:
    """Draw `DRAFTS` and then `REFINED` for the first two questions."""
    return ScriptedEngine(
        {
            chat("0+0?"): DRAFTS[:4],
            chat("1+1?"): DRAFTS[4:],
            chat("0+0?[b3]"): REFINED[:4],
            chat("1+1?[e0]"): REFINED[4:],
            chat("1+1?[f0]"): REFINED[4:],
        },
        **options,
    )


def run_batch(trainer: Any, mode: str = "train") -> dict[str, Any]:
    rows = [trainer.train_dataset[q] for q in (0, 1) for _ in range(4)]
    trainer.model.train(mode == "train")
    return trainer._generate_and_score_completions(rows)


def shown(rows: Tensor, mask: Tensor) -> list[str]:
    return [TOKENIZER.decode(ids[kept.bool()]) for ids, kept in zip(rows, mask, strict=True)]


def test_what_the_sampler_drew_is_what_is_trained_on(make_trainer: MakeTrainer) -> None:
    engine = scripted()
    trainer = make_trainer(reward_funcs=digit_reward, sampler=engine, draft_template=SHORT_TEMPLATE)
    batch = run_batch(trainer)
    assert shown(batch["prompt_ids"], batch["prompt_mask"]) == (
        [chat("0+0?[b3]")] * 4 + [chat("1+1?[e0]")] * 4
    )
    completions = shown(batch["completion_ids"], batch["completion_mask"])
    assert completions == [f"{text}</s>" for text in REFINED]
    centered = torch.tensor([-1.5, -0.5, 0.5, 1.5, -0.5, -0.5, -0.5, 1.5])
    assert torch.equal(batch["advantages"].sign(), centered.sign())
    assert batch["sampling_per_token_logps"].unique().tolist() == pytest.approx([-4.6])
    old, ratio = batch["old_per_token_logps"], batch["importance_sampling_ratio"]
    assert ratio[:, 0].tolist() == pytest.approx((old + 4.6).sum(1).exp().tolist(), rel=1e-4)
    metrics = trainer._metrics["train"]
    assert metrics["igrpo/best_draft_right"] == [0.5]
    assert metrics["igrpo/uplift"] == [pytest.approx(((10 - 7) / 4 + 0.5) / 2)]
    assert metrics["reward"] == [pytest.approx(12 / 8)]
    read = [*[chat("0+0?"), chat("1+1?")] * 4, *[chat("0+0?[b3]"), chat("1+1?[e0]")] * 4]
    drawn = [f"{text}</s>" for text in [*DRAFTS, *REFINED]]
    tokens = sum(len(TOKENIZER(text)["input_ids"]) for text in [*read, *drawn])
    assert metrics["num_tokens"] == [tokens]


def test_no_prompt_waits_for_anothers_drafts(make_trainer: MakeTrainer) -> None:
    engine = scripted()
    engine.slow = chat("1+1?")  # waits for a refinement of the other prompt
    trainer = make_trainer(reward_funcs=digit_reward, sampler=engine, draft_template=SHORT_TEMPLATE)
    ended: list[str] = []
    draw = engine.sample_one

    async def noted(prompt: Any, n: int, **options: Any) -> list[Completion]:
        drawn = await draw(prompt, n, **options)
        ended.append(TOKENIZER.decode(engine.encode(prompt)))
        return drawn

    engine.sample_one = noted
    run_batch(trainer)
    assert ended.index(chat("0+0?[b3]")) < ended.index(chat("1+1?"))


def test_rewards_are_called_as_by_trl(make_trainer: MakeTrainer) -> None:
    calls: list[dict[str, Any]] = []

    def noted(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float | None]:
        calls.append({"prompts": prompts, "texts": [text_of(c) for c in completions], **columns})
        columns["log_extra"]("text", [text_of(c) for c in completions])
        columns["log_metric"]("calls", 1.0)
        return digit_reward(completions)

    async def length(completions: list[Any], **columns: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(text_of(c))) for c in completions]

    trainer = make_trainer(
        reward_funcs=[noted, length],
        reward_weights=[1.0, 0.5],
        sampler=scripted(),
        draft_template=SHORT_TEMPLATE,
        log_completions=True,
        per_device_train_batch_size=16,
    )
    run_batch(trainer)
    texts = sorted(tuple(call["texts"]) for call in calls)
    assert texts == sorted(map(tuple, (DRAFTS[:4], DRAFTS[4:], REFINED[:4], REFINED[4:])))
    for call in calls:
        question = call["answer"][0][1:]
        assert call["answer"] == [f"a{question}"] * 4
        assert call["prompts"] == [trainer.train_dataset[int(question)]["prompt"]] * 4
        assert call["trainer_state"] is trainer.state
        assert [len(ids) for ids in call["completion_ids"]] == [len(t) + 1 for t in call["texts"]]
    metrics = trainer._metrics["train"]
    assert metrics["rewards/noted/mean"] == [pytest.approx(12 / 8)]
    assert metrics["rewards/length/mean"] == [2.0]
    assert metrics["calls"] == [1.0]
    trainer.log({})
    path = f"{trainer.args.output_dir}/completions/completions_00000.parquet"
    table = pandas.read_parquet(path)
    assert table["text"].tolist() == REFINED
    assert table["draft"].tolist() == ["b3"] * 4 + ["e0"] * 4


def test_a_reward_model_scores_what_the_sampler_drew(make_trainer: MakeTrainer) -> None:
    config = make_model().config
    config.num_labels = 1
    torch.manual_seed(0)
    judge = Qwen3ForSequenceClassification(config).eval()
    engine = scripted()
    for question, drafts in ((0, DRAFTS[:4]), (1, DRAFTS[4:])):
        for draft in drafts:
            engine.texts[chat(f"{question}+{question}?[{draft}]")] = REFINED[:4]
    found = []
    for sampler in (engine, None):
        trainer = make_trainer(
            reward_funcs=judge,
            reward_processing_classes=make_tokenizer(),
            draft_template=SHORT_TEMPLATE,
            sampler=sampler,
        )
        if sampler is None:
            texts = iter([DRAFTS, REFINED[:4] * 2])
            trainer._generate_single_turn = lambda ids, *_, texts=texts, **__: (
                [TOKENIZER.convert_tokens_to_ids([*text, "</s>"]) for text in next(texts)],
                None,
            )
        found.append(run_batch(trainer)["advantages"])
    # Padding changes float32 sums, and differences of the scores are a tenth of them.
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_drafts_are_trained_too(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        reward_funcs=digit_reward,
        sampler=scripted(),
        draft_template=SHORT_TEMPLATE,
        draft_loss_coef=1.0,
        vllm_importance_sampling_mode="token_truncate",
    )
    batch = run_batch(trainer)
    drafts = batch["is_draft"]
    assert shown(batch["completion_ids"][drafts], batch["completion_mask"][drafts]) == [
        f"{text}</s>" for text in DRAFTS
    ]
    assert batch["importance_sampling_ratio"].shape == batch["completion_mask"].shape
    assert batch["advantages"][drafts][6] == 0.0  # the one that cannot be scored


@pytest.mark.parametrize("name", ["selection_reward", "selection_func"])
def test_something_else_may_rank_the_drafts(make_trainer: MakeTrainer, name: str) -> None:
    def late(completions: list[Any], **columns: Any) -> list[float]:
        assert columns["answer"]
        return [float(ord(text_of(c)[0])) for c in completions]

    engine = scripted()
    engine.texts |= {chat("0+0?[d0]"): REFINED[:4], chat("1+1?[h0]"): REFINED[4:]}
    ranking = {"reward_funcs": digit_reward, "selection_func": late}
    if name == "selection_reward":
        ranking = {"reward_funcs": [digit_reward, late], "reward_weights": [1.0, 1e-6]}
        ranking |= {"selection_reward": "late"}
    trainer = make_trainer(sampler=engine, draft_template=SHORT_TEMPLATE, **ranking)
    batch = run_batch(trainer)
    prompts = shown(batch["prompt_ids"], batch["prompt_mask"])
    assert prompts[::4] == [chat("0+0?[d0]"), chat("1+1?[h0]")]


def test_a_skipped_prompt_keeps_its_rows(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(
        reward_funcs=digit_reward,
        sampler=scripted(),
        draft_template=SHORT_TEMPLATE,
        all_drafts_failed="skip",
    )
    batch = run_batch(trainer)
    assert batch["completion_mask"].sum(1).tolist() == [3] * 4 + [1] * 4
    assert (batch["advantages"][:4] != 0).all()
    assert not batch["advantages"][4:].any()


@pytest.mark.parametrize("eval_with_draft", [False, True])
def test_an_evaluation_is_the_mean_over_its_completions(
    make_trainer: MakeTrainer, eval_with_draft: bool
) -> None:
    scores: list[float] = []

    def noted(completions: list[Any], **columns: Any) -> list[float]:
        scores.append(early_letters(completions))
        return scores[-1]

    trainer = make_trainer(
        sampler=TransformersSampler(make_model(), make_tokenizer(), max_new_tokens=6),
        reward_funcs=noted,
        eval_dataset=make_dataset(3),  # batches of two prompts and of one
        eval_with_draft=eval_with_draft,
    )
    metrics = trainer.evaluate()
    refined = scores[1::2] if eval_with_draft else scores
    assert metrics["eval_reward"] == pytest.approx(sum(map(sum, refined)) / 12, rel=1e-6)
    assert metrics["eval_rewards/noted/mean"] == pytest.approx(metrics["eval_reward"])


def test_evaluation_is_single_shot_and_so_is_grpo(make_trainer: MakeTrainer) -> None:
    for options, mode in (({}, "eval"), ({"num_drafts": 0}, "train")):
        engine = scripted()
        trainer = make_trainer(reward_funcs=digit_reward, sampler=engine, **options)
        batch = run_batch(trainer, mode)
        assert engine.asked == [chat("0+0?"), chat("1+1?")]
        assert shown(batch["completion_ids"], batch["completion_mask"]) == [
            f"{text}</s>" for text in DRAFTS
        ]


def test_the_first_draft_of_the_highest_reward_is_chosen(make_trainer: MakeTrainer) -> None:
    class OneByOne(ScriptedEngine):
        """Each request for one completion gets the next text."""

        async def sample_one(self, prompt: Any, n: int, *, seed: Any = None) -> list[Completion]:
            drawn = await super().sample_one(prompt, 9, seed=seed)
            if n > 1:
                return drawn
            place = self.asked.count(self.asked[-1]) - 1
            for _ in range(5 * place):
                await asyncio.sleep(0)  # the first is done first
            return drawn[place : place + 1]

    engine = OneByOne(scripted().texts)
    engine.texts[chat("0+0?")] = ["3", "3", "0", "3"]
    engine.texts[chat("0+0?[3]")] = REFINED[:4]
    trainer = make_trainer(
        reward_funcs=digit_reward, sampler=engine, draft_template=SHORT_TEMPLATE, reward_max=3.0
    )
    run_batch(trainer)
    assert trainer._metrics["train"]["igrpo/best_draft_reward"] == [1.5]
    # One draft of the first prompt was scored, and three of the second.
    assert trainer._metrics["train"]["igrpo/draft_reward"] == [(3 + 0 + 0 + 0) / 4]


@pytest.mark.parametrize("adapter", [False, True])
def test_the_engine_follows_the_trainer(make_trainer: MakeTrainer, adapter: bool) -> None:
    """After each sync the engine's log-probs are the trainer's, while the weights move."""
    engine = TransformersSampler(make_model(seed=3), make_tokenizer(), max_new_tokens=6)
    peft = None
    if adapter:
        peft = LoraConfig(
            r=2,
            target_modules=["q_proj", "down_proj"],
            modules_to_save=["lm_head"],
            task_type="CAUSAL_LM",
        )
    trainer = make_trainer(sampler=engine, max_steps=4, learning_rate=3e-2, peft_config=peft)
    weights: list[Tensor] = []
    sync = engine.sync_weights

    def noted(new: dict[str, Tensor]) -> None:
        weights.append(torch.cat([value.flatten() for value in new.values()]))
        sync(new)

    engine.sync_weights = noted
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == len(weights) == 4
    for before, after in pairwise(weights):
        assert float((before - after).abs().max()) > 1e-3
    # The same weights in float32, once padded in batches and once token by token.
    for log in logs:
        assert log["sampling/sampling_logp_difference/max"] < 1e-4
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(1.0, abs=1e-3)


def test_a_sampler_of_the_model_itself_needs_no_sync(make_trainer: MakeTrainer) -> None:
    model = make_model()
    engine = TransformersSampler(model, make_tokenizer(), max_new_tokens=6)
    engine.sync_weights = lambda weights: pytest.fail("there is nothing to sync")
    trainer = make_trainer(model=model, sampler=engine, max_steps=2, learning_rate=3e-2)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert max(log["sampling/sampling_logp_difference/max"] for log in logs) < 1e-4


def test_a_resumed_run_draws_what_it_would_have_drawn(
    make_trainer: MakeTrainer, tmp_path: Any
) -> None:
    def train(folder: str, checkpoint: str | None = None) -> Any:
        engine = TransformersSampler(make_model(seed=3), make_tokenizer(), max_new_tokens=6)
        trainer = make_trainer(
            sampler=engine,
            train_dataset=make_dataset(4),
            output_dir=str(tmp_path / folder),
            max_steps=4,
            save_steps=3,
            save_strategy="steps",
            draft_ties="random",
        )
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer

    whole = train("whole")
    resumed = train("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    for name, parameter in whole.model.named_parameters():
        torch.testing.assert_close(resumed.model.get_parameter(name), parameter, rtol=0, atol=0)


def test_a_sampler_without_log_probs_is_told_what_to_set(make_trainer: MakeTrainer) -> None:
    options = {"reward_funcs": digit_reward, "draft_template": SHORT_TEMPLATE}
    trainer = make_trainer(sampler=scripted(gives_logprobs=False), **options)
    with pytest.raises(ValueError, match="vllm_importance_sampling_correction=False"):
        run_batch(trainer)
    trainer = make_trainer(
        sampler=scripted(gives_logprobs=False),
        vllm_importance_sampling_correction=False,
        **options,
    )
    batch = run_batch(trainer)
    assert "importance_sampling_ratio" not in batch
    assert "sampling_per_token_logps" not in batch


@pytest.mark.parametrize(
    ("sampler", "options", "message"),
    [
        (None, {"reward_max": 1.0}, "reward_max would have no effect without a sampler"),
        (None, {"vllm_mode": "server"}, "vllm_mode would have no effect with use_vllm=False"),
        (
            None,
            {"vllm_importance_sampling_clip_max": 2.0},
            "vllm_importance_sampling_clip_max would have no effect with use_vllm=False",
        ),
        ("engine", {"top_p": 0.9}, "top_p would have no effect beside a sampler"),
        ("engine", {"vllm_structured_outputs_regex": "a+"}, "vllm_structured_outputs_regex would"),
        ("engine", {"sampler_concurrency": 4}, "the sampler has no sample_one"),
        ("engine", {"max_completion_length": 7}, r"max_new_tokens = 6 and args\.max_comp.* = 7"),
        ("engine", {"temperature": 0.7}, r"temperature = 1\.0 and args\.temperature = 0\.7"),
        (
            "engine",
            {"chat_template_kwargs": {"enable_thinking": False}},
            r"chat_template_kwargs = {} and args\.chat_template_kwargs = {'enable_thinking': Fals",
        ),
        (
            "engine",
            {
                "vllm_importance_sampling_correction": False,
                "vllm_importance_sampling_mode": "token_mask",
            },
            "sampling_mode would have no effect with vllm_importance_sampling_correction=False",
        ),
    ],
)
def test_options_that_the_sampler_decides_are_refused(
    make_trainer: MakeTrainer, sampler: str | None, options: dict[str, Any], message: str
) -> None:
    engine = TransformersSampler(make_model(), make_tokenizer(), max_new_tokens=6)
    with pytest.raises(ValueError, match=message):
        make_trainer(sampler=engine if sampler else None, **options)


def test_a_number_of_values_that_does_not_fit_is_named(make_trainer: MakeTrainer) -> None:
    short = make_trainer(reward_funcs=lambda **columns: [1.0], sampler=scripted())
    with pytest.raises(RuntimeError, match="returned 1 rewards, but 4 were expected"):
        run_batch(short)

    def noted(completions: list[Any], log_extra: Any, **columns: Any) -> list[float]:
        log_extra("one", [1])
        return early_letters(completions)

    with pytest.raises(RuntimeError, match=r"log_extra\('one', ...\).* 1 values for 4"):
        run_batch(make_trainer(reward_funcs=noted, sampler=scripted()))


def test_weights_are_lent_under_the_names_of_the_files(make_trainer: MakeTrainer) -> None:
    from igrpo_algo.trainers.trl.sampler import whole_weights

    adapter = LoraConfig(
        r=2,
        target_modules=["q_proj"],
        modules_to_save=["lm_head"],
        trainable_token_indices=[5, 6],
        task_type="CAUSAL_LM",
    )
    trainer = make_trainer(peft_config=adapter)
    plain = make_model().state_dict()
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "delta" in name:
                parameter.add_(1.0)
    before = copy.deepcopy(trainer.model.state_dict())
    with whole_weights(trainer.model, trainer._dist) as weights:
        assert {name: value.shape for name, value in weights.items()} == {
            name: value.shape for name, value in plain.items()
        }
        moved = {name for name, value in weights.items() if not torch.equal(value, plain[name])}
    queries = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1)}
    assert moved == queries | {"model.embed_tokens.weight"}
    for name, value in trainer.model.state_dict().items():  # and the adapters are apart again
        torch.testing.assert_close(value, before[name], rtol=1e-6, atol=1e-6)
