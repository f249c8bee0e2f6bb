"""Weights by way of a folder to several servers: all of them or none."""

import asyncio
from functools import partial
from pathlib import Path

import pytest
import torch
from fake_vllm_server import make_sampler
from tiny_model import make_model

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def root(tmp_path):
    make_model(0, tie=True).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def steps(server):
    return [path for path in server.paths() if not path.startswith("/v1")]


ALL_STEPS = ["/pause?mode=wait", "/collective_rpc", "/reset_prefix_cache", "/resume"]


@pytest.mark.parametrize("form", ["state dict", "folder"])
def test_each_server_reads_a_folder_with_every_name_and_forgets_its_cache(
    fake, root, tmp_path, form
):
    from safetensors.torch import load_file

    model = make_model(1, tie=True)
    read = []

    def reload(body):
        assert body["method"] == "reload_weights"
        folder = Path(body["kwargs"]["weights_path"])
        assert folder.is_absolute()
        files = [load_file(path) for path in folder.glob("*.safetensors")]
        read.append({name: tensor for file in files for name, tensor in file.items()})
        return 200, {"results": [None]}

    servers = [fake(root=root), fake(root=root)]
    for server in servers:
        server.answers["/collective_rpc"] = reload
    sampler = make_sampler(*servers, sync_folder=tmp_path / "sync")
    (tmp_path / "sync").mkdir()
    model.save_pretrained(tmp_path / "new" / "step-1")
    given = model.state_dict() if form == "state dict" else tmp_path / "new" / "step-1"
    sampler.sync_weights(given)
    assert [steps(server) for server in servers] == [ALL_STEPS] * 2
    assert len(read) == 2
    for weights in read:
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(weights[name], t) for name, t in model.state_dict().items())
    assert list((tmp_path / "sync").iterdir()) == []
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["step-1"]


def test_weights_that_do_not_fit_reach_no_server(fake, root):
    server = fake(root=root)
    sampler = make_sampler(server)
    weights = make_model(1, tie=True).state_dict()
    with pytest.raises(ValueError, match="1 unknown names"):
        sampler.sync_weights({**weights, "adapter": torch.zeros(2)})
    with pytest.raises(TypeError, match="weights must be a state dict or a folder"):
        sampler.sync_weights(3)
    assert steps(server) == []
    assert len(sampler.sample(["a"], 1)) == 1


def test_if_one_cannot_pause_none_is_written_and_the_others_go_on(fake, root):
    servers = [fake(root=root), fake(root=root)]
    servers[1].answers["/pause"] = (404, {"detail": "Not Found"})
    sampler = make_sampler(*servers)
    with pytest.raises(RuntimeError, match=f"{servers[1].url} has no /pause.*VLLM_SERVER_DEV_MODE"):
        sampler.sync_weights(make_model(1, tie=True).state_dict())
    assert steps(servers[0]) == ["/pause?mode=wait", "/resume"]
    assert steps(servers[1]) == ["/pause?mode=wait"]
    assert len(sampler.sample(["a", "b"], 1)) == 2


@pytest.mark.parametrize("path", ["/collective_rpc", "/reset_prefix_cache"])
@pytest.mark.parametrize("status", [400, 500])
def test_if_one_fails_to_read_the_sampler_draws_no_more(fake, root, path, status):
    servers = [fake(root=root), fake(root=root)]
    servers[1].answers[path] = (status, {"error": "no space"})
    sampler = make_sampler(*servers)
    weights = make_model(1, tie=True).state_dict()
    with pytest.raises(RuntimeError, match="half old and half new") as caught:
        sampler.sync_weights(weights)
    assert servers[1].url in str(caught.value.__cause__)
    assert all(steps(server)[-1] == "/resume" for server in servers)
    for call in (partial(sampler.sample, ["a"], 1), partial(sampler.sync_weights, weights)):
        with pytest.raises(RuntimeError, match="half old and half new"):
            call()
    with pytest.raises(RuntimeError, match="half old and half new"):
        asyncio.run(sampler.sample_one("a", 1))
    assert servers[0].completions() + servers[1].completions() == []


def test_a_server_that_a_sync_does_not_reach_draws_nothing_until_one_does(fake, root):
    gone, there = fake(root=root), fake(root=root)
    sampler = make_sampler(gone, there, rest=0)
    gone.stop()
    weights = make_model(1, tie=True).state_dict()
    with pytest.warns(UserWarning, match=f"left out until a later sync_weights.*{gone.url}"):
        sampler.sync_weights(weights)
    gone.start(gone.port)  # with old weights, for all we know
    sampler.sample(["a", "b"], 1)
    assert (len(gone.completions()), len(there.completions())) == (0, 2)
    sampler.sync_weights(weights)
    sampler.sample(["a", "b"], 1)
    assert (len(gone.completions()), len(there.completions())) == (1, 3)


def test_a_server_that_drops_out_after_a_sync_draws_nothing_until_the_next(fake, root):
    servers = [fake(root=root), fake(root=root)]
    sampler = make_sampler(*servers, rest=0)
    weights = make_model(1, tie=True).state_dict()
    sampler.sync_weights(weights)
    servers[0].stop()
    sampler.sample(["a", "b"], 1)
    servers[0].start(servers[0].port)
    sampler.sample(["a", "b"], 1)
    assert (len(servers[0].completions()), len(servers[1].completions())) == (0, 4)
    servers[1].stop()
    with pytest.raises(ConnectionError, match=f"{servers[0].url}.*it may have old weights"):
        sampler.sample(["a"], 1)
    servers[1].start(servers[1].port)
    sampler.sync_weights(weights)
    sampler.sample(["a", "b"], 1)
    assert len(servers[0].completions()) == 1


def test_a_sync_that_reaches_nobody_is_an_error_and_no_sync(fake, root):
    server = fake(root=root)
    sampler = make_sampler(server)
    server.stop()
    with pytest.raises(ConnectionError, match=f"no vLLM server answers: {server.url}"):
        sampler.sync_weights(make_model(1, tie=True).state_dict())
    server.start(server.port)
    assert len(sampler.sample(["a"], 1)) == 1


def test_a_busy_server_has_no_old_weights(fake, root):
    server = fake(root=root)
    sampler = make_sampler(server, max_retries=0)
    sampler.sync_weights(make_model(1, tie=True).state_dict())
    server.answers["/v1/completions"] = (429, {"error": "full"}, {"Retry-After": "0"})
    with pytest.raises(ConnectionError, match="status 429"):
        sampler.sample(["a"], 1)
    del server.answers["/v1/completions"]
    assert len(sampler.sample(["a"], 1)) == 1
