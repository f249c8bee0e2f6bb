"""The table of differences in the docs is what the tests of the hosts recorded, and small."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = json.loads((ROOT / "docs" / "use" / "conformance.json").read_text())


def test_the_page_is_made_of_the_record() -> None:
    spec = importlib.util.spec_from_file_location("table", ROOT / "tools" / "conformance_table.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    page = (ROOT / "docs" / "use" / "conformance.md").read_text()
    assert page == tool.make_table(RECORD), "run: python tools/conformance_table.py"


@pytest.mark.parametrize("host", sorted(RECORD))
def test_every_difference_is_below_a_millionth(host: str) -> None:
    assert RECORD[host]["differences"]
    assert max(RECORD[host]["differences"].values()) <= 1e-6


def test_every_host_with_tests_stands_in_the_record_in_the_version_that_is_installed() -> None:
    folders = {path.parent.name: path for path in (ROOT / "tests/hosts").glob("*/requirements.txt")}
    del folders["unsloth"]  # a step is trained by its own loss: nothing to compare
    packages = {
        "nemo_rl": "nemo-rl",
        "swift": "ms-swift",
        "tinker_cookbook": "tinker-cookbook",
        "verifiers": "prime-rl",
    }
    assert {packages.get(name, name) for name in folders} == set(RECORD)
    for name, path in folders.items():
        package = packages.get(name, name)
        pin = f"{package}=={RECORD[package]['version']}"
        assert pin in path.read_text()
