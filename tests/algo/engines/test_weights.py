"""Weights before an engine sees them: read from folders, compared, tied names completed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_model

from igrpo_algo.engines.weights import (
    FolderWeights,
    WantedWeights,
    as_folder,
    memory_folder,
    open_weights,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def model(request):
    return make_model(tie=request.param)


def same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("size", ["1KB", "5GB"])
def test_a_folder_gives_names_shapes_and_tensors_of_all_its_files(model, tmp_path, size):
    model.save_pretrained(tmp_path, max_shard_size=size)
    if size == "1KB":
        (tmp_path / "not-in-the-index.safetensors").write_bytes(b"")
    weights = FolderWeights(tmp_path)
    assert (len(weights.files) > 1) == (size == "1KB")
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected[HEAD]
    same(dict(weights), expected)
    assert weights.shapes == {name: list(tensor.shape) for name, tensor in expected.items()}
    assert len(weights) == len(expected)


def test_what_is_no_weights(tmp_path):
    with pytest.raises(FileNotFoundError, match="no safetensors file in"):
        open_weights(tmp_path)
    with pytest.raises(TypeError, match="weights must be a state dict or a folder, got int"):
        open_weights(3)


class Sharded(torch.Tensor):
    """As a DTensor shows itself."""

    def full_tensor(self):
        return self


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ([0.0], r"weights\['a'\] must be a tensor, got list"),
        (torch.zeros(2).as_subclass(Sharded), r"weights\['a'\] is sharded: gather it"),
        (torch.zeros(2, device="meta"), r"weights\['a'\] is on the meta device"),
    ],
)
def test_values_that_no_engine_could_load(value, match):
    with pytest.raises(TypeError, match=match):
        open_weights({"a": value})


def test_a_folder_that_was_opened_is_not_read_again(model, tmp_path, monkeypatch):
    model.save_pretrained(tmp_path)
    opened = FolderWeights(tmp_path)
    monkeypatch.setattr(FolderWeights, "__getitem__", lambda *_: pytest.fail("it was read"))
    assert open_weights(opened) is opened


@pytest.mark.parametrize("load", ["files", "config"])
def test_a_model_wants_the_same_by_its_files_its_config_and_its_state(model, tmp_path, load):
    if load == "files":
        model.save_pretrained(tmp_path)
    else:
        model.config.architectures = ["Qwen3ForCausalLM"]
        model.config.save_pretrained(tmp_path)
    wanted = WantedWeights.of_model(str(tmp_path))
    state = WantedWeights.of_state_dict(model.state_dict())
    assert wanted.shapes == state.shapes
    tied = model.config.tie_word_embeddings
    assert wanted.tied == ({HEAD: EMBEDDING} if tied else {})
    assert state.tied == ({HEAD: EMBEDDING} if tied else {})


def test_tied_weights_may_come_under_either_name_or_both():
    weights = make_model(tie=True).state_dict()
    wanted = WantedWeights.of_state_dict(weights)
    for lacked in (HEAD, EMBEDDING, None):
        given = {name: tensor for name, tensor in weights.items() if name != lacked}
        wanted.check(given)
        same(dict(wanted.complete(given)), weights)
    with pytest.raises(ValueError, match=r"are tied but differ"):
        wanted.check({**weights, HEAD: weights[HEAD] + 1})
    neither = {name: t for name, t in weights.items() if name not in (HEAD, EMBEDDING)}
    with pytest.raises(ValueError, match=r"lacks 2 names"):
        wanted.check(neither)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({HEAD: None}, r"lacks 1 names: \['lm_head.weight'\]"),
        ({"adapter": torch.zeros(2)}, r"1 unknown names: \['adapter'\]"),
        ({"model.norm.weight": torch.zeros(3)}, r"must have shape \[32\], got \[3\]"),
    ],
)
def test_weights_that_do_not_fit_are_named(tmp_path, changes, match):
    weights = make_model(tie=False).state_dict()
    wanted = WantedWeights.of_state_dict(weights)
    given = {name: t for name, t in {**weights, **changes}.items() if t is not None}
    with pytest.raises(ValueError, match=match):
        wanted.check(given)
    save_file(given, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=match):
        wanted.check(FolderWeights(tmp_path))


def read(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def test_a_lent_folder_holds_each_name_once_and_is_gone_afterwards(model, tmp_path):
    state = model.state_dict()
    wanted = WantedWeights.of_state_dict(state)
    with as_folder(wanted, state, tmp_path) as folder:
        same(read(folder), state)
        assert folder.parent == tmp_path
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_lent_as_it_is_unless_a_tied_name_lacks(model, tmp_path):
    source, parent = tmp_path / "source", tmp_path / "parent"
    parent.mkdir()
    model.save_pretrained(source, max_shard_size="1KB")
    wanted = WantedWeights.of_state_dict(model.state_dict())
    with as_folder(wanted, FolderWeights(source), parent) as folder:
        same(read(folder), model.state_dict())
        assert (folder == source) == (not model.config.tie_word_embeddings)
        links = [path for path in folder.iterdir() if path.is_symlink()]
        assert len(links) == (0 if folder == source else len(FolderWeights(source).files))
    assert list(parent.iterdir()) == []
    assert FolderWeights(source).files
    assert json.loads((source / "config.json").read_text())["vocab_size"] == 260


def test_the_memory_folder_is_there():
    assert memory_folder().is_dir()
