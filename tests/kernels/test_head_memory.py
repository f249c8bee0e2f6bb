"""What the head holds at its peak on a GPU, by an account of its tensors: no GPU is needed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.results import RESULTS
from igrpo_kernels._triton import exp_product, head_softmax
from igrpo_kernels.linear_head import LinearHead
from igrpo_kernels.row_softmax import LogitTransform

TILE = exp_product.TILES[9, 0]


def recorded(name: str) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(Path(RESULTS, name).read_text())
    return record


def held(rows: int, vocabulary: int, width: int, monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of what lives beside each other in the last of several chunks, in bf16."""
    monkeypatch.setattr(head_softmax, "tile_for", lambda weight: TILE)
    with torch.device("meta"):
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16).requires_grad_()
        head = LinearHead(weight, None, LogitTransform())
        most = head_softmax.rows_per_chunk(head, rows, keeps=True)
        assert most < rows
        chunk = math.ceil(rows / math.ceil(rows / most))
        exponentials = head_softmax.new_memory(head, chunk, keeps=True)
    return {
        "exponentials": exponentials.nbytes,
        "gradient of the weight, fp32": 4 * weight.numel(),
        "gradient of the hidden states": 2 * rows * width,
        "a chunk's share of it in fp32, and its scaled hidden states": (4 + 2) * chunk * width,
        "sums of the tiles": 4 * chunk * math.ceil(vocabulary / TILE.columns),
    }


def test_a_long_batch_takes_half_of_the_memory_of_the_fastest_peer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {"tokens": 32_768, "vocabulary": 151_936, "width": 4096, "active": 1.0}
    (peer,) = (
        figure["peak_bytes"]
        for figure in recorded("2026-11-26-h100.json")["figures"]
        if figure["peer"] == "Liger Triton" and figure["passes"] == "forward and backward"
        if sizes.items() <= figure.items() and figure["op"] == "linear_policy_loss"
    )
    assert sum(held(32_768, 151_936, 4096, monkeypatch).values()) <= 0.5 * peer


def test_a_small_models_step_peaks_no_higher_than_trls(monkeypatch: pytest.MonkeyPatch) -> None:
    record = recorded("2026-11-26-h100-train-step.json")
    figures, case = record["figures"], record["case"]
    rows, vocabulary = case["sequences"] * case["tokens"], case["vocabulary"]
    now = held(rows, vocabulary, case["width"], monkeypatch)
    # that run held all products in fp32 where the exponentials are now, and summed one chunk
    before = 4 * rows * vocabulary + 2 * vocabulary * case["width"]
    after = now["exponentials"] + now["gradient of the weight, fp32"]
    assert figures["igrpo"]["peak_bytes"] - before + after <= figures["TRL"]["peak_bytes"]
