"""The largest differences that the tests of a host saw, for docs/use/conformance.md.

`RECORD=1 make conformance` names the file in the environment, and moves it into the host's folder
once all its tests have passed; tools/conformance_table.py makes the table.
"""

import json
import os
from importlib.metadata import version as installed
from pathlib import Path

import torch

RUN, COPY = "the trainer itself", "a copy of its source"


def note(trainer: str, what: str, difference: float, *, version: str = "", how: str = RUN) -> None:
    """Keep a difference if it is the largest of its kind; `version` is for what is no package."""
    if "DIFFERENCES" not in os.environ:
        return
    path = Path(os.environ["DIFFERENCES"])
    seen = json.loads(path.read_text())["differences"] if path.exists() else {}
    seen[what] = max(difference, seen.get(what, 0.0))
    record = {
        "trainer": trainer,
        "version": version or installed(trainer),
        "how": how,
        "differences": seen,
    }
    path.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def note_tensors(
    trainer: str, what: str, ours: torch.Tensor, theirs: torch.Tensor, **known: str
) -> None:
    note(trainer, what, (ours.detach() - theirs.detach()).abs().max().item(), **known)
