"""iGRPO inside slime's own rollout function and beside its own loss, from its source.

slime is on no package index: SLIME_SOURCE names a clone. Its engine is SGLang behind a router; here
a tiny model answers in the form that slime reads. Megatron's state is real, on one rank.
"""

import ast
import asyncio
import json
import os
import sys
import types
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

SOURCE = Path(os.environ["SLIME_SOURCE"])
sys.path[:0] = [str(Path(__file__).parents[1]), str(SOURCE), str(Path(__file__).parent)]
torch._dynamo.config.disable = True  # its losses are compiled, which takes longer than they do

import hooks
from contract import Group
from differences import note_tensors
from slime.rollout import sglang_rollout
from slime.rollout.data_source import RolloutDataSourceWithBuffer
from slime.utils.misc import SingletonMeta
from slime.utils.types import Sample
from tiny_qwen3 import make_model, make_tokenizer

from igrpo_algo.engines.transformers import TransformersSampler
from igrpo_algo.trainers.slime import make_generate

VERSION = "0.3.1"
assert f'version="{VERSION}"' in (SOURCE / "setup.py").read_text()
G = 3


class Engine:
    """What stands behind slime's router."""

    def __init__(self) -> None:
        self.sampler = TransformersSampler(make_model(), make_tokenizer(), max_new_tokens=8)
        self.asked: list[str] = []
        self.answered: list[tuple[str, str]] = []
        self.seeds: list[Any] = []
        self.abort_after = 10_000

    async def post(self, url: str, payload: Any, headers: Any = None) -> dict[str, Any]:
        prompt = self.sampler.tokenizer.decode(payload["input_ids"])
        self.asked.append(prompt)
        self.seeds.append(payload["sampling_params"].get("sampling_seed"))
        number = len(self.asked)
        await asyncio.sleep(0)
        ((drawn,),) = self.sampler.sample([payload["input_ids"]], 1, seed=number)
        stopped = number > self.abort_after
        pairs = [*zip(drawn.logprobs, drawn.token_ids, strict=True)][: 1 if stopped else None]
        meta = {
            "output_token_logprobs": [(logprob, token, None) for logprob, token in pairs],
            "finish_reason": {"type": "abort" if stopped else drawn.finish_reason},
        }
        ids = [token for _, token in pairs]
        text = self.sampler.tokenizer.decode(ids, skip_special_tokens=True)
        self.answered.append((prompt, text))
        return {"text": text, "meta_info": meta}

    async def get(self, url: str) -> dict[str, Any]:
        return {"workers": []}


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    SingletonMeta._instances.clear()
    engine = Engine()
    monkeypatch.setattr(sglang_rollout, "post", engine.post)
    monkeypatch.setattr(sglang_rollout, "get", engine.get)
    monkeypatch.setattr(hooks, "generate", make_generate(rules=hooks.RULES, num_drafts=4))
    sglang_rollout.load_function.cache_clear()
    return engine


@pytest.fixture
def args(tmp_path: Path) -> Namespace:
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": [{"role": "user", "content": f"{n}+{n}?"}], "label": "7"} for n in (1, 2)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return Namespace(
        **dict.fromkeys(OFF),
        ci_test=False,
        hf_checkpoint=tmp_path / "model",
        prompt_data=str(tmp_path / "data.jsonl"),
        input_key="text",
        label_key="label",
        metadata_key="metadata",
        apply_chat_template=False,
        rollout_global_dataset=True,
        rollout_shuffle=False,
        rollout_seed=5,
        rollout_num_engines=1,
        sglang_server_concurrency=512,
        sglang_router_ip="localhost",
        sglang_router_port=1,
        n_samples_per_prompt=G,
        rollout_batch_size=2,
        over_sampling_batch_size=2,
        rollout_temperature=1.0,
        rollout_top_p=1.0,
        rollout_top_k=-1,
        rollout_max_response_len=8,
        rollout_max_prompt_len=200,
        custom_generate_function_path="hooks.generate",
        custom_rm_path="hooks.letters",
        rewards_normalization=True,
        grpo_std_normalization=True,
        advantage_estimator="grpo",
    )


OFF = (
    "tool_key",
    "multimodal_keys",
    "apply_chat_template_kwargs",
    "dump_details",
    "buffer_filter_path",
    "rollout_stop",
    "rollout_stop_token_ids",
    "rollout_skip_special_tokens",
    "sglang_dp_size",
    "sglang_enable_deterministic_inference",
    "partial_rollout",
    "mask_offpolicy_in_partial_rollout",
    "group_rm",
    "dynamic_sampling_filter_path",
    "rollout_sample_filter_path",
    "rollout_all_samples_process_path",
    "use_rollout_routing_replay",
    "rollout_max_context_len",
    "reward_key",
    "eval_reward_key",
    "rm_type",
)


def borrow(file: str, name: str, **namespace: Any) -> Any:
    """Run a function of a file that imports SGLang without importing the rest of it."""
    nodes = ast.walk(ast.parse((SOURCE / file).read_text()))
    (found,) = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == name]
    found.returns, found.args.args[1].annotation = None, None
    exec(compile(ast.Module([found], []), file, "exec"), namespace)
    return namespace[name]


def roll_out(args: Namespace) -> list[list[Sample]]:
    data = RolloutDataSourceWithBuffer(args)
    return sglang_rollout.generate_rollout(args, 0, data).samples


def advantages_of(args: Namespace, samples: list[Sample]) -> list[float]:
    normalize = borrow("slime/ray/rollout.py", "_post_process_rewards", torch=torch)
    host = types.SimpleNamespace(args=args, custom_reward_post_process_func=None)
    return normalize(host, samples)[1]


@pytest.mark.parametrize("concurrency", [512, 2])
def test_a_group_shares_the_best_draft_of_its_own(
    engine: Engine, args: Namespace, concurrency: int
) -> None:
    """With two samples let in at once, the third asks when Stage 1 is long over."""
    args.sglang_server_concurrency = concurrency
    groups = roll_out(args)
    tokenizer = engine.sampler.tokenizer
    assert len(engine.asked) == 2 * (4 + G)
    advantages = advantages_of(args, [sample for group in groups for sample in group])
    for number, (group, question) in enumerate(zip(groups, ("1+1?", "2+2?"), strict=True)):
        plain = f"<s>user:{question}</s><s>assistant:"
        drafts = [text for prompt, text in engine.answered if prompt == plain]
        Group(
            question,
            drafts,
            max(drafts, key=lambda text: sum(map(ord, text))),
            [prompt for prompt in engine.asked if prompt.startswith(f"<s>user:{question}[")],
            [tokenizer.decode(s.tokens[: len(s.tokens) - s.response_length]) for s in group],
            [sample.reward for sample in group],
            advantages[number * G : (number + 1) * G],
        ).check(num_drafts=4, num_refinements=G)
        for sample in group:
            assert len(sample.loss_mask) == len(sample.rollout_log_probs) == sample.response_length
            assert len(sample.metadata["igrpo"]["draft_rewards"]) == 4


def test_a_group_reward_scores_the_drafts_of_a_group_together(
    engine: Engine, args: Namespace
) -> None:
    args.group_rm = True
    args.custom_rm_path = "hooks.batched_letters"
    for group in roll_out(args):
        assert [sample.reward for sample in group] == [3.0, 4.0, 5.0]
        assert group[0].metadata["igrpo"]["draft_rewards"] == [4.0, 5.0, 6.0, 7.0]


def test_drafts_have_seeds_of_their_own(engine: Engine, args: Namespace) -> None:
    args.sglang_enable_deterministic_inference = True
    roll_out(args)
    assert sorted(engine.seeds) == sorted(2 * [*range(5, 9), *range(5, 8)])


def test_a_draft_is_cut_and_a_question_is_not(engine: Engine, args: Namespace) -> None:
    args.rollout_max_prompt_len, args.rollout_max_context_len = 40, 38
    roll_out(args)
    assert all(prompt.startswith(("<s>user:1+1?", "<s>user:2+2?")) for prompt in engine.asked)
    ids = engine.sampler.tokenizer
    assert max(len(ids(p, add_special_tokens=False)["input_ids"]) for p in engine.asked) <= 38 - 8
    args.rollout_max_context_len = 20
    with pytest.raises(ValueError, match="a question is never cut"):
        roll_out(args)


def test_the_example_has_the_functions_that_its_launch_line_names(
    engine: Engine, args: Namespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[3] / "examples"))
    args.custom_generate_function_path = "slime_igrpo.generate"
    args.rollout_max_prompt_len = 600
    roll_out(args)
    assert len(engine.asked) == 2 * (8 + G)
    assert callable(sglang_rollout.load_function("slime_igrpo.loss"))


def ask(args: Namespace, *samples: Sample, **options: Any) -> list[Sample]:
    async def all_of_them() -> list[Sample]:
        calls = (
            hooks.generate(args, sample, {"max_new_tokens": 8}, **options) for sample in samples
        )
        return await asyncio.gather(*calls)

    return asyncio.run(all_of_them())


def make_sample(**fields: Any) -> Sample:
    messages = [{"role": "user", "content": "1+1?"}]
    return Sample(**{"prompt": messages, "label": "7", "group_index": 0, **fields})


def test_a_group_that_was_stopped_in_stage_one_starts_anew(engine: Engine, args: Namespace) -> None:
    engine.abort_after = 2
    samples = ask(args, make_sample(), make_sample())
    assert {sample.status for sample in samples} == {Sample.Status.ABORTED}
    assert not any(sample.tokens for sample in samples)
    engine.abort_after = 10_000
    first, second = ask(args, *samples)
    assert len(engine.asked) == 4 + 4 + 2
    assert first.metadata["igrpo"] == second.metadata["igrpo"]


def test_a_refinement_that_was_stopped_goes_on_under_its_prompt(
    engine: Engine, args: Namespace
) -> None:
    engine.abort_after = 4
    (sample,) = ask(args, make_sample())
    assert sample.status is Sample.Status.ABORTED
    prompt, before = engine.asked[-1], sample.response_length
    engine.abort_after = 10_000
    (sample,) = ask(args, sample)
    assert len(engine.asked) == 4 + 2
    assert engine.asked[-1].startswith(prompt)
    assert sample.response_length > before
    (late,) = ask(args, make_sample())  # a sibling that was not let in before the stop
    assert late.metadata["igrpo"] == sample.metadata["igrpo"]


def test_evaluation_is_single_shot(engine: Engine, args: Namespace) -> None:
    ask(args, make_sample(group_index=None), evaluation=True)
    assert engine.asked == ["<s>user:1+1?</s><s>assistant:"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "<s>user:1+1?</s>"}, "a chat template was applied"),
        ({"multimodal_inputs": {"images": [1]}}, "images, videos and audios"),
        ({"group_index": None}, "group_index must be set"),
    ],
)
def test_what_can_not_work_is_refused_before_sampling(
    engine: Engine, args: Namespace, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(args, make_sample(**fields))
    assert not engine.asked


@pytest.fixture(scope="module")
def of_slime() -> Any:
    """slime's loss file, with the real Megatron state of one rank and without its patches."""
    package = types.ModuleType("slime.backends.megatron_utils")
    package.__path__ = [str(SOURCE / "slime" / "backends" / "megatron_utils")]
    sys.modules["slime.backends.megatron_utils"] = package
    from megatron.core import mpu
    from slime.backends.megatron_utils import loss

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    mpu.initialize_model_parallel()
    yield loss
    torch.distributed.destroy_process_group()


def loss_args(**options: Any) -> Namespace:
    off = "use_rollout_logprobs use_opsm get_mismatch_metrics use_tis use_kl_loss use_unbiased_kl "
    off += "allgather_cp recompute_loss_function calculate_per_token_loss"
    given = {
        "eps_clip": 0.2, "eps_clip_high": 0.28, "eps_clip_c": 3.0, "kl_loss_type": "k3",
        "kl_loss_coef": 0.1, "entropy_coef": 0.0, "advantage_estimator": "grpo",
        "rollout_temperature": 1.0, "rollout_top_p": 1.0, "log_probs_chunk_size": -1,
        "tis_clip": 1.5, "tis_clip_low": 0.5, "loss_type": "policy_loss",
        "custom_loss_function_path": "hooks.loss", "custom_tis_function_path": None,
    }  # fmt: skip
    return Namespace(**{**dict.fromkeys(off.split(), False), **given, **options})


def make_batch(seed: int) -> tuple[dict[str, Any], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts, responses = [3, 1, 4], [4, 2, 5]
    total = [p + r for p, r in zip(prompts, responses, strict=True)]

    def per_token(scale: float) -> list[torch.Tensor]:
        return [scale * torch.randn(n, generator=generator) for n in responses]

    masks = [(torch.rand(n, generator=generator) < 0.7).float() for n in responses]
    masks[1] = torch.zeros(2)
    batch = {
        "unconcat_tokens": [torch.randint(0, 7, (n,), generator=generator) for n in total],
        "total_lengths": total,
        "response_lengths": responses,
        "loss_masks": masks,
        "rollout_mask_sums": [mask.sum() for mask in masks],
        "advantages": per_token(1.0),
        "log_probs": [-2 + x for x in per_token(0.3)],
        "rollout_log_probs": [-2 + x for x in per_token(0.3)],
        "ref_log_probs": [-2 + x for x in per_token(0.3)],
    }
    return batch, 0.5 * torch.randn(1, sum(total), 7, generator=generator)


def run_loss(of_slime: Any, args: Namespace, batch: Any, logits: torch.Tensor) -> list[Any]:
    leaf = logits.clone().requires_grad_()
    value, _, logged = of_slime.loss_function(args, batch, 2, 6, leaf)
    value.backward()
    return [value.detach(), leaf.grad, dict(zip(logged["keys"], logged["values"][1:], strict=True))]


PER_TOKEN = ("loss_masks", "advantages", "log_probs", "rollout_log_probs", "ref_log_probs")
OPTIONS = st.fixed_dictionaries(
    {
        "use_tis": st.booleans(),
        "use_kl_loss": st.booleans(),
        "use_unbiased_kl": st.booleans(),
        "kl_loss_type": st.sampled_from(["k1", "k2", "k3"]),
        "entropy_coef": st.sampled_from([0.0, 0.1]),
        "calculate_per_token_loss": st.booleans(),
        "rollout_temperature": st.sampled_from([1.0, 0.7]),
        "eps_clip_c": st.sampled_from([None, 3.0]),
    }
)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), options=OPTIONS)
def test_loss_and_gradient_are_those_of_slime(
    of_slime: Any, seed: int, options: dict[str, Any]
) -> None:
    batch, logits = make_batch(seed)
    theirs = run_loss(of_slime, loss_args(**options), batch, logits)
    ours = run_loss(of_slime, loss_args(**options, loss_type="custom_loss"), batch, logits)
    for name, their, our in zip(("loss", "gradient"), theirs, ours, strict=False):
        what = f"{name}; sample and token means, dual clip, KL, entropy, TIS"
        note_tensors("slime", what, our, their, version=VERSION)
        torch.testing.assert_close(our, their, atol=1e-6, rtol=1e-6)
    for name in ("loss", "ppo_kl"):
        torch.testing.assert_close(ours[2][name], theirs[2][name], atol=1e-6, rtol=1e-5)


def test_another_surrogate_is_slimes_where_it_has_it(of_slime: Any) -> None:
    batch, logits = make_batch(3)
    clip = {"eps_clip": 1.0, "eps_clip_high": 0.28}
    path = "hooks.cispo"
    theirs = run_loss(of_slime, loss_args(**clip, advantage_estimator="cispo"), batch, logits)
    args = loss_args(**clip, loss_type="custom_loss", custom_loss_function_path=path)
    ours = run_loss(of_slime, args, batch, logits)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-6, rtol=1e-6)


def test_a_batch_without_tokens_still_reaches_the_logits(of_slime: Any) -> None:
    batch, logits = make_batch(0)
    batch = {
        name: [each[:0] for each in values] if name in PER_TOKEN else values
        for name, values in batch.items()
    }
    batch["response_lengths"] = [0, 0, 0]
    value, gradient, _ = run_loss(of_slime, loss_args(loss_type="custom_loss"), batch, logits)
    assert value == 0
    assert torch.equal(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"use_opsm": True}, "use_opsm must be off"),
        ({"use_kl_loss": True, "kl_loss_type": "low_var_kl"}, "kl_loss_type must be k1, k2 or k3"),
    ],
)
def test_options_of_its_own_loss_are_refused(of_slime: Any, option: Any, message: str) -> None:
    batch, logits = make_batch(0)
    with pytest.raises(ValueError, match=message):
        run_loss(of_slime, loss_args(loss_type="custom_loss", **option), batch, logits)
