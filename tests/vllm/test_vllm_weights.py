"""New weights in a live vLLM engine: train, sync, sample; and syncs that fail."""

import asyncio

import pytest
import torch
import vllm.envs
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, PROMPTS, engine, make_model, worst_difference

from igrpo_algo.engines.vllm import VllmSampler

TOLERANCE = 5e-5  # as in test_vllm.py
BOTH = ["qwen3", "qwen3 tied"]


def train_step(model):
    """Move every weight, the way a trainer does."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.randint(4, 100, (2, 24))
    model(ids, labels=ids).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("kind", BOTH)
def test_every_round_samples_from_the_trainers_weights(folders, tmp_path, kind):
    model = make_model(kind, 0)
    llm = engine(folders[kind])
    sampler = VllmSampler(llm, max_new_tokens=24)
    for number in range(6):
        before = sampler.sample(PROMPTS, 2, seed=0)
        train_step(model)
        # A cache that outlived the sync, or a head that did, would show in what was told.
        assert worst_difference(model, sampler, PROMPTS, before) > 1e-3
        if number % 2:
            sampler.sync_weights(model.state_dict())
        else:
            model.save_pretrained(tmp_path / f"{number}")
            written = load_file(tmp_path / f"{number}" / "model.safetensors")
            assert ("lm_head.weight" in written) == (kind == "qwen3")
            sampler.sync_weights(tmp_path / f"{number}")
        groups = sampler.sample(PROMPTS, 2, seed=0)
        assert worst_difference(model, sampler, PROMPTS, groups) <= TOLERANCE


@pytest.mark.parametrize("kind", BOTH)
def test_a_sharded_folder_and_tensors_of_another_dtype_are_taken(folders, tmp_path, kind):
    model = make_model(kind, 1)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    llm = engine(folders[kind])
    sampler = VllmSampler(llm, max_new_tokens=24)
    sampler.sync_weights(str(tmp_path))
    groups = sampler.sample(PROMPTS, 2, seed=0)
    assert worst_difference(model, sampler, PROMPTS, groups) <= TOLERANCE
    rounded = make_model(kind, 2)
    half = {name: tensor.bfloat16() for name, tensor in rounded.state_dict().items()}
    rounded.load_state_dict(half)
    sampler.sync_weights(half)
    groups = sampler.sample(PROMPTS, 2, seed=0)
    assert worst_difference(rounded, sampler, PROMPTS, groups) <= TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("qwen3", {"lm_head.weight": None}, r"lacks 1 names: \['lm_head.weight'\]"),
        ("qwen3", {"adapter.weight": torch.zeros(2)}, r"unknown names: \['adapter.weight'\]"),
        (
            "qwen3",
            {"model.norm.weight": torch.zeros(3)},
            r"norm.weight'\] must have shape \[64\], got \[3\]",
        ),
        ("qwen3 tied", {"lm_head.weight": torch.ones(100, 64)}, "are tied but differ"),
    ],
)
@pytest.mark.parametrize("form", ["state dict", "folder"])
def test_weights_that_do_not_fit_leave_the_old_ones_whole(
    folders, tmp_path, kind, changes, match, form
):
    weights = {**make_model(kind, 1).state_dict(), **changes}
    weights = {name: t.clone() for name, t in weights.items() if t is not None}
    if form == "folder":
        save_file(weights, tmp_path / "model.safetensors")
    llm = engine(folders[kind])
    sampler = VllmSampler(llm, max_new_tokens=12)
    before = sampler.sample(PROMPTS, 2, seed=0)
    with pytest.raises(ValueError, match=match):
        sampler.sync_weights(weights if form == "state dict" else tmp_path)
    assert sampler.sample(PROMPTS, 2, seed=0) == before


def test_a_sync_that_breaks_half_way_is_told_and_the_engine_gives_nothing_more(folders):
    good = make_model("qwen3", 1).state_dict()
    name = "model.layers.1.mlp.down_proj.weight"

    class Torn(dict):
        """Fails where the disk or another GPU would: after some weights are in."""

        def __getitem__(self, key):
            if key == name and self.is_read:
                raise OSError("the disk is gone")
            return super().__getitem__(key)

    torn = Torn(good)
    torn.is_read = False
    llm = engine(folders["qwen3"], "to be broken")
    sampler, other = VllmSampler(llm, max_new_tokens=4), VllmSampler(llm, max_new_tokens=5)
    sampler.sync_weights(torn)
    torn.is_read = True
    with pytest.raises(RuntimeError, match="half old and half new") as caught:
        sampler.sync_weights(torn)
    assert isinstance(caught.value.__cause__, OSError)
    for unusable in (sampler, other):
        with pytest.raises(RuntimeError, match="half old and half new: make a new engine"):
            unusable.sample(PROMPTS, 1)
    with pytest.raises(RuntimeError, match="half old and half new"):
        asyncio.run(other.sample_one("q", 1))
    with pytest.raises(RuntimeError, match="half old and half new"):
        sampler.sync_weights(good)


def test_a_sync_waits_for_what_is_in_flight_and_later_requests_for_it(folders):
    old, new = make_model("qwen3", 0), make_model("qwen3", 1)
    llm = engine(folders["qwen3"])
    sampler = VllmSampler(llm, max_new_tokens=CONTEXT - 20, stop_token_ids=[])

    async def run():
        first = asyncio.create_task(sampler.sample_one(PROMPTS[0], 2, seed=0))
        while not llm.llm_engine.get_num_unfinished_requests():
            await asyncio.sleep(0.001)
        sync = asyncio.create_task(asyncio.to_thread(sampler.sync_weights, new.state_dict()))
        await asyncio.sleep(0.05)
        assert not first.done(), "it was to be in flight still"
        second = asyncio.create_task(sampler.sample_one(PROMPTS[0], 2, seed=0))
        groups = await asyncio.gather(first, second)
        await sync
        return groups

    before, after = asyncio.run(asyncio.wait_for(run(), timeout=60))
    assert worst_difference(old, sampler, PROMPTS[:1], [before]) <= TOLERANCE
    assert worst_difference(new, sampler, PROMPTS[:1], [after]) <= TOLERANCE


def test_an_engine_in_a_process_of_its_own_is_synced_over_a_folder(folders, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    vllm.envs.disable_envs_cache()
    model = make_model("qwen3 tied", 1)
    llm = engine(folders["qwen3 tied"], "in a process of its own")
    assert type(llm.llm_engine.engine_core).__name__ == "SyncMPClient"
    sampler = VllmSampler(llm, max_new_tokens=12)
    sampler.sync_weights(model.state_dict())
    groups = sampler.sample(PROMPTS, 2, seed=0)
    assert worst_difference(model, sampler, PROMPTS, groups) <= TOLERANCE
    sampler.sync_weights(folders["qwen3 tied"])
    groups = sampler.sample(PROMPTS, 2, seed=0)
    assert worst_difference(make_model("qwen3 tied", 0), sampler, PROMPTS, groups) <= TOLERANCE
