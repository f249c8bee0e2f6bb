"""Every field of every public dataclass is checked: a value of another type is refused by name."""

import dataclasses
import importlib
import inspect
import math
import pkgutil
from typing import Any

import pytest
import torch

import igrpo_algo
from igrpo_algo import Completion, DraftTemplate, Rollouts, Samples, TextSplice, TokenSplice
from igrpo_algo.batch import TrainingBatch
from igrpo_algo.drafts import DraftChoice, DraftRules, RandomTokens, TokenBudget
from igrpo_algo.early_warning import EarlyWarning
from igrpo_algo.fields import check_fields
from igrpo_algo.layouts import PackedRow, pack_sequences, pad_sequences
from igrpo_algo.rollouts import Rollout, Stage, StageFinished, StageStarted
from igrpo_algo.rollouts.once_per_group import HostDraft, StageTwoPrompt
from igrpo_algo.shared_prompt import pack_shared_prompt

DRAWN = Completion([5, 2], "four", [-0.1, -0.2])
CHOICE = DraftChoice(0, 1.0, "four")
STAGE = Stage("2 + 2?", [DRAWN], [1.0], [1, 2])
ROLLOUT = Rollout(0, STAGE, [CHOICE], [STAGE])
BATCH = TrainingBatch(
    [[1, 2]], [DRAWN], torch.ones(1), torch.zeros(1).long(), torch.zeros(1).long(), 1, 2
)

SOUND = [
    DRAWN, HostDraft([5], "four"), CHOICE, STAGE, ROLLOUT, Rollouts([ROLLOUT]),
    Samples(["2 + 2?"], [[DRAWN]], [[1, 2]]), StageStarted(0, 0, 0.0),
    StageFinished(0, 0, STAGE, True), StageTwoPrompt("2 + 2?", "four", (1.0,)),
    DraftTemplate("[", "]", ("[",)), TextSplice(), TokenSplice(), TokenBudget(len, 5),
    RandomTokens(len), DraftRules(), BATCH, BATCH.padded(0)[0], EarlyWarning(),
    *pad_sequences([[1]], [[2]], pad_token_id=0), *pack_sequences([[1]], [[2]]),
    *pack_shared_prompt([[1]], [[[2]]]),
]  # fmt: skip

FREE = {(HostDraft, "host")}  # a trainer's own


def public(record: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(record) if not f.name.startswith("_")]


FIELDS = [(r, name) for r in SOUND for name in public(r) if (type(r), name) not in FREE]


def test_the_table_has_every_public_dataclass():
    listed: set[type] = set()
    for module in pkgutil.iter_modules(igrpo_algo.__path__):
        if module.name not in ("engines", "trainers", "cli"):
            found = vars(importlib.import_module(f"igrpo_algo.{module.name}")).values()
            classes = [value for value in found if inspect.isclass(value)]
            listed |= {c for c in classes if dataclasses.is_dataclass(c) and c.__init__}
    inside = {"Tails", "GroupedRewards", "Mean"}
    assert {c.__name__ for c in listed} - inside <= {type(r).__name__ for r in SOUND}


@pytest.mark.parametrize(
    ("record", "name"), FIELDS, ids=[f"{type(r).__name__}-{name}" for r, name in FIELDS]
)
def test_a_field_of_another_type_is_refused_by_its_name(record, name):
    class Other:
        pass

    for value in (Other(), True, b"bytes"):
        if isinstance(getattr(record, name), bool) and value is True:
            continue
        with pytest.raises((TypeError, ValueError), match=rf"^{name}\b.*must be"):
            dataclasses.replace(record, **{name: value})


@dataclasses.dataclass
class Point:
    x: float
    y: int | None = None
    z: "list[int] | str" = ""
    on: bool = False
    any: Any = None

    def __post_init__(self) -> None:
        check_fields(self)


def test_fields_hold_what_their_annotations_say():
    Point(1)
    Point(math.nan, 3, [1], on=True, any=Point)
    for values, message in (
        (("1",), "x must be a number, got str '1'"),
        ((True,), "x must be a number, got bool True"),
        ((1.0, 1.5), "y must be an int or None, got float 1.5"),
        ((1.0, None, (1,)), r"z must be a list or a string, got tuple \(1,\)"),
        ((1.0, None, "", 1), "on must be True or False, got int 1"),
    ):
        with pytest.raises(TypeError, match=message):
            Point(*values)


def test_what_belongs_together_is_of_one_length():
    with pytest.raises(ValueError, match="must be as many"):
        Samples(["a", "b"], [[DRAWN]], [None])
    with pytest.raises(ValueError, match=r"advantages must have shape \[B\] = \[1\]"):
        dataclasses.replace(BATCH, advantages=torch.ones(2))
    with pytest.raises(ValueError, match="prompt_ids must hold B = 1 lists, got 2"):
        dataclasses.replace(BATCH, prompt_ids=[[1], [2]])


def test_a_subclass_checks_its_own_fields_too():
    row = pack_shared_prompt([[1]], [[[2]]])[0]
    assert isinstance(row, PackedRow)
    with pytest.raises(TypeError, match="lengths must be a tuple"):
        dataclasses.replace(row, lengths=[1])
