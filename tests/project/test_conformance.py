"""The table of differences in the docs is what the tests of the hosts recorded, and small."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("table", ROOT / "tools" / "conformance_table.py")
assert SPEC is not None
assert SPEC.loader is not None
TABLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(TABLE)
RECORDS = {record["trainer"]: record for record in TABLE.read_records()}
PINS = {
    path.parent.name: path.read_text() for path in (ROOT / "tests/hosts").glob("*/requirements.txt")
}


def test_the_page_is_made_of_the_records() -> None:
    page = (ROOT / "docs" / "use" / "conformance.md").read_text()
    assert page == TABLE.make_table(RECORDS.values()), "run: python tools/conformance_table.py"


@pytest.mark.parametrize("trainer", sorted(RECORDS))
def test_every_difference_is_below_a_millionth(trainer: str) -> None:
    assert RECORDS[trainer]["differences"]
    assert max(RECORDS[trainer]["differences"].values()) <= 1e-6


def test_every_host_has_a_record_of_the_version_that_is_installed() -> None:
    del PINS["unsloth"]  # a step is trained by its own loss: nothing to compare
    pins = "\n".join(PINS.values())
    assert len(RECORDS) == len(PINS)
    for record in RECORDS.values():
        assert f"{record['trainer']}=={record['version']}" in pins
