"""The largest difference that the tests of each host saw, for docs/use/conformance.md.

Written with `RECORD=1 make conformance`; tools/conformance_table.py makes the table.
"""

import json
import os
from importlib.metadata import version
from pathlib import Path

import torch

RECORD = Path(__file__).parents[2] / "docs" / "use" / "conformance.json"


def note(host: str, what: str, difference: float, read: str = "") -> None:
    """Keep a difference if it is the largest of its kind; `read` is the version of a copy."""
    if not os.environ.get("RECORD"):
        return
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    entry = known.setdefault(host, {"version": "", "differences": {}})
    entry["version"] = read or version(host)
    seen = entry["differences"]
    seen[what] = max(difference, seen.get(what, 0.0))
    RECORD.write_text(json.dumps(known, indent=2, sort_keys=True) + "\n")


def note_tensors(
    host: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, read: str = ""
) -> None:
    note(host, what, (ours.detach() - theirs.detach()).abs().max().item(), read)
