import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def fake():
    """Makes servers, and stops them."""
    from fake_vllm_server import FakeServer

    made = []

    def make(**options):
        made.append(FakeServer(**options))
        return made[-1]

    yield make
    for server in made:
        server.gate.set()
        server.stop()


@pytest.fixture(scope="session")
def tokenizer():
    from tiny_model import make_tokenizer

    return make_tokenizer()


@pytest.fixture
def model():
    from tiny_model import make_model

    return make_model()
