"""The table of differences in the docs is what the tests of the hosts recorded, and small."""

from pathlib import Path

import pytest
from conformance_table import make_table, read_records

ROOT = Path(__file__).resolve().parents[2]
RECORDS = {record["trainer"]: record for record in read_records()}
PINS = {
    path.parent.name: path.read_text() for path in (ROOT / "tests/hosts").glob("*/requirements.txt")
}


def test_the_page_is_made_of_the_records() -> None:
    page = (ROOT / "docs" / "use" / "conformance.md").read_text()
    assert page == make_table(RECORDS.values()), "run: python tools/conformance_table.py"


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
