"""No figure is given for a wrong result: the benchmarks' gate, their oracle, and their clock."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks import exact, measure
from benchmarks.cases import BOTH, FORWARD, FROZEN, Case, cpu_grid, gpu_grid, small_grid
from benchmarks.measure import Ceilings, Figure
from benchmarks.ops import OPS, OURS, Op, Peer, op_of

CPU = torch.device("cpu")
YARDSTICK = Ceilings(1e9, {"fp32": 1e9, "bf16": 1e9})
SMALL = small_grid()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_our_ops_and_plain_torch_pass_the_gate(case: Case) -> None:
    op = op_of(case)
    figures = {name: Figure(case, name, "cpu") for name in op.peers}
    for name in set(figures) - {OURS, "torch"}:
        figures[name].not_run = "another test"
    measure.pass_gate(op, case, CPU, figures)
    assert [figures[name].not_run for name in (OURS, "torch") if name in figures] in (
        [None],
        [None, None],
    )
    assert figures[OURS].rows_checked == case.tokens
    gradients = {name for name in figures[OURS].errors if name.endswith("gradient")}
    assert len(gradients) == {FORWARD: 0, FROZEN: 1, BOTH: 2 if case.width else 1}[case.passes]


def altered(op: Op, peer: str, change: Any) -> Op:
    """The op with something done to what a peer returns."""
    run = op.peers[peer].run
    return replace(op, peers={OURS: op.peers[OURS], peer: Peer(lambda batch: change(run(batch)))})


def measured(op: Op, case: Case, monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    monkeypatch.setattr(measure, "op_of", lambda case: op)
    figures = measure.measure(case, CPU, YARDSTICK, 0.0, memory=False)
    return {figure.peer: figure for figure in figures}


def test_a_wrong_peer_gets_no_figure_and_ours_does(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in SMALL if case.op == "token_logprobs" and case.passes == BOTH)
    wrong = altered(op_of(case), "torch", lambda loss: 1.5 * loss)
    figures = measured(wrong, case, monkeypatch)
    assert str(figures["torch"].not_run).startswith("wrong result")
    assert figures["torch"].ms == {}
    assert figures[OURS].not_run is None
    ms = figures[OURS].ms
    assert 0 < ms["p20"] <= ms["median"] <= ms["p80"]


@pytest.mark.parametrize("change", [lambda loss: loss * (1 + 1e-3), lambda loss: loss * torch.nan])
def test_a_wrong_result_of_ours_stops_the_case(
    change: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = next(case for case in SMALL if case.op == "linear_policy_loss" and case.dtype == "fp32")
    op = altered(op_of(case), OURS, change)
    op.peers["torch"] = op_of(case).peers["torch"]
    figures = measured(op, case, monkeypatch)
    assert list(figures) == [OURS]
    assert str(figures[OURS].not_run).startswith("wrong result")


def test_a_peer_that_does_not_import_is_named_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = SMALL[0]

    def missing(batch: Any) -> None:
        raise ModuleNotFoundError("No module named 'quack'\nsecond line")

    op = op_of(case)
    op = replace(op, peers={OURS: op.peers[OURS], "QuACK CE": Peer(missing)})
    figures = measured(op, case, monkeypatch)
    assert figures["QuACK CE"].not_run == "not installed: No module named 'quack'"
    assert figures[OURS].not_run is None


def test_exact_gradients_are_those_of_autograd() -> None:
    case = replace(SMALL[0], active=0.6)
    batch = op_of(case).make(case, 3, CPU)
    wanted = exact.linear(case, batch, exact.of_the_loss)
    doubled = exact.in_float64(batch)
    doubled.hidden = batch.hidden.detach().double().requires_grad_()
    doubled.weight = batch.weight.detach().double().requires_grad_()
    logits = doubled.hidden @ doubled.weight.t()
    logprobs = logits.log_softmax(-1).gather(-1, batch.targets[..., None]).squeeze(-1)
    loss = exact.clipped_token_mean(logprobs, doubled)
    loss.backward()
    for name, value in doubled.grads().items():
        torch.testing.assert_close(wanted[name], value, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(wanted["loss"], loss.detach(), rtol=1e-12, atol=0)


def test_errors_of_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact, "PART", 3)
    wanted = torch.tensor([3.0, 0, 0, 0, 0, 0, 4.0], dtype=torch.double)
    got = wanted.float()
    got[5] = 0.5
    assert exact.error(got, wanted, "weight gradient") == pytest.approx(0.1)
    assert exact.error(got, wanted, "logprobs") == pytest.approx(0.125)
    assert not exact.error(got / 0, wanted, "logprobs") <= 1.0


def test_every_case_has_an_op_and_floors_follow_the_rows_that_matter() -> None:
    for case in [*cpu_grid(), *gpu_grid(), *SMALL]:
        assert (case.op, case.passes) in OPS
        assert YARDSTICK.floor(op_of(case), case) > 0
    (dense, sparse) = (case for case in gpu_grid()[:2])
    floors = [YARDSTICK.floor(op_of(case), case) for case in (dense, sparse)]
    assert floors[0] == pytest.approx(6 * 8192 * 151936 * 4096 / 1e9)
    assert floors[1] == pytest.approx(0.3 * floors[0])


def test_spread_of_readings() -> None:
    assert measure.spread([1.0, 2.0, 3.0, 4.0, 5.0, 100.0]) == {
        "median": 3.5,
        "p20": 2.0,
        "p80": 5.0,
    }
