"""A run's folder goes on with the same run only, and only one process writes into it."""

import json
from pathlib import Path

import pytest

from igrpo_algo.cli.run_folder import (
    SETTINGS,
    Checkpoint,
    check_settings,
    last_checkpoint,
    load_settings,
    save_settings,
    weights_of,
)


def test_settings_must_be_the_same_but_for_free_ones(tmp_path: Path) -> None:
    save_settings(tmp_path, {"seed": 1, "limit": None, "ks": (1, 2), "steps": 3})
    assert load_settings(tmp_path) == {"seed": 1, "limit": None, "ks": [1, 2], "steps": 3}
    check_settings(tmp_path, {"seed": 1, "ks": (1, 2), "steps": 3})  # None is not given
    check_settings(tmp_path, {"seed": 1, "ks": [1, 2], "steps": 4}, free={"steps"})
    with pytest.raises(ValueError, match=r"other settings \(seed was 1, is 2; steps was 3, is Non"):
        check_settings(tmp_path, {"seed": 2, "ks": (1, 2)})


@pytest.mark.parametrize("text", ["", "{", "[1]"])
def test_broken_settings_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / SETTINGS).write_text(text)
    with pytest.raises(ValueError, match=r"run\.json"):
        load_settings(tmp_path)


def write_state(folder: Path, step: int, text: str) -> None:
    (folder / f"checkpoint-{step}").mkdir()
    (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(text)


def test_the_last_whole_checkpoint_is_found(tmp_path: Path) -> None:
    assert last_checkpoint(tmp_path) is None
    for step in (2, 10, 9):
        write_state(tmp_path, step, json.dumps({"global_step": step}))
    write_state(tmp_path, 11, '{"global_st')
    (tmp_path / "checkpoint-12").mkdir()
    assert last_checkpoint(tmp_path) == Checkpoint(10, tmp_path / "checkpoint-10")


@pytest.mark.parametrize("text", ["[1]", "3", "null", "{}", '{"global_step": "5"}'])
def test_a_state_that_says_no_step_is_named(tmp_path: Path, text: str) -> None:
    write_state(tmp_path, 5, text)
    with pytest.raises(
        ValueError, match=r"checkpoint-5.trainer_state\.json must hold an object with global_step"
    ):
        last_checkpoint(tmp_path)


def test_weights_are_files(tmp_path: Path) -> None:
    (tmp_path / "cache.bin").mkdir()
    assert weights_of(str(tmp_path)) is None
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert weights_of(str(tmp_path)) is not None
