"""A real vLLM engine on the CPU, and real servers; collected by `make test-vllm` alone."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

# Before vLLM is imported: the engine in this process (seconds to start, tensors can be handed to
# it), no compiler, one thread (two spin against each other), no network.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    TORCHDYNAMO_DISABLE="1",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)

from tiny_models import KINDS, make_model, save  # noqa: E402


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder per kind of model, with weights of seed 0 and a tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {kind: save(make_model(kind, 0), root / kind.replace(" ", "-")) for kind in KINDS}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let vLLM and what it imports warn about themselves."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("default"))
