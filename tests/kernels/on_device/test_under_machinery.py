"""Each op under what a trainer puts around it: compilers, graphs, streams, devices, repetition."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from igrpo_kernels import (
    Cispo,
    Clip,
    SequenceClip,
    TokenMean,
    clipped_policy_loss,
    linear_policy_loss,
    linear_token_logprobs,
    logprobs_from_hidden,
    logprobs_from_logits,
    token_logprobs,
)

Inputs = dict[str, Tensor]
SEQUENCES = 4


@dataclass(frozen=True)
class Operation:
    """An op with its inputs.

    Attributes:
        inputs: Draws them from a place and a seed; those that require a gradient are leaves.
        forward: From the inputs to an output.
    """

    inputs: Callable[[Any, int], Inputs]
    forward: Callable[[Inputs], Tensor]

    def run(
        self, inputs: Inputs, forward: Callable[[Inputs], Tensor] | None = None
    ) -> list[Tensor]:
        """Return the output and the gradients of the leaves, for an upstream gradient of no use."""
        output = (forward or self.forward)(inputs)
        leaves = [values for values in inputs.values() if values.requires_grad]
        upstream = torch.linspace(0.5, 1.5, output.numel(), device=output.device)
        grads = torch.autograd.grad(output, leaves, upstream.view_as(output))
        return [output.detach(), *grads]


def token_inputs(place: Any, seed: int, tokens: int) -> Inputs:
    shape = (SEQUENCES, tokens)
    return {
        "advantages": place.normal(SEQUENCES, seed=seed + 1),
        "mask": place.normal(*shape, seed=seed + 2) > -1,
        "old_logprobs": -3 - 0.1 * place.normal(*shape, seed=seed + 3).abs(),
    }


def logits_inputs(place: Any, seed: int) -> Inputs:
    tokens, vocabulary = place.pick((300, 50_257), (2, 37))
    logits = place.normal(SEQUENCES, tokens, vocabulary, dtype=torch.bfloat16, seed=seed)
    targets = place.below(vocabulary, SEQUENCES, tokens, seed=seed)
    return {"logits": logits.requires_grad_(), "targets": targets}


def head_inputs(place: Any, seed: int) -> Inputs:
    tokens, vocabulary, width = place.pick((300, 50_257, 512), (3, 37, 8))
    hidden = place.normal(SEQUENCES, tokens, width, dtype=torch.bfloat16, seed=seed)
    weight = place.normal(vocabulary, width, dtype=torch.bfloat16, seed=seed + 7)
    return {
        "hidden": hidden.requires_grad_(),
        "weight": weight.mul_(width**-0.5).requires_grad_(),
        "targets": place.below(vocabulary, SEQUENCES, tokens, seed=seed),
    }


def clipped_inputs(place: Any, seed: int) -> Inputs:
    tokens = place.pick(4099, 5)
    logprobs = -3 - 0.1 * place.normal(SEQUENCES, tokens, seed=seed).abs()
    advantages = place.normal(SEQUENCES, tokens, seed=seed + 1)
    rest = token_inputs(place, seed, tokens)
    return {**rest, "logprobs": logprobs.requires_grad_(), "advantages": advantages}


def policy_inputs(place: Any, seed: int) -> Inputs:
    inputs = head_inputs(place, seed)
    return inputs | token_inputs(place, seed, inputs["targets"].shape[1])


def score(inputs: Inputs) -> Tensor:
    return torch.stack(token_logprobs(**inputs, return_entropy=True))


def score_hidden(inputs: Inputs) -> Tensor:
    return torch.stack(linear_token_logprobs(**inputs, return_entropy=True))


def lose(inputs: Inputs) -> Tensor:
    return linear_policy_loss(**inputs, surrogate=Clip(), aggregate=TokenMean()).loss


OPERATIONS = {
    "token_logprobs": Operation(logits_inputs, score),
    "linear_token_logprobs": Operation(head_inputs, score_hidden),
    "clipped_policy_loss": Operation(clipped_inputs, lambda inputs: clipped_policy_loss(**inputs)),
    "linear_policy_loss": Operation(policy_inputs, lose),
}


def assert_same_bits(got: list[Tensor], wanted: list[Tensor]) -> None:
    for mine, other in zip(got, wanted, strict=True):
        assert other.isfinite().all()
        torch.testing.assert_close(mine, other, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_twenty_runs_give_the_same_bits(place: Any, name: str) -> None:
    operation = OPERATIONS[name]
    first = operation.run(operation.inputs(place, 0))
    assert all(values.norm() > 0 for values in first)
    for _ in range(place.pick(19, 2)):
        assert_same_bits(operation.run(operation.inputs(place, 0)), first)


def apart(values: Tensor) -> Tensor:
    """The same numbers, with others between them in memory."""
    wide = torch.stack([values, torch.full_like(values, 1)], -1).flatten(-2)
    return wide.detach()[..., ::2].requires_grad_(values.requires_grad)


def with_options(inputs: Inputs) -> Inputs:
    """Add a temperature for each row, and a bias."""
    more = {}
    if "targets" in inputs:
        more["temperature"] = 0.5 + inputs["targets"] / inputs["targets"].amax()
    if "weight" in inputs:
        more["bias"] = inputs["weight"].detach().sum(1)
    return inputs | more


@pytest.mark.parametrize("name", OPERATIONS)
def test_numbers_that_lie_apart_in_memory_give_the_same(place: Any, name: str) -> None:
    operation = OPERATIONS[name]
    inputs = with_options(operation.inputs(place, 0))
    strided = {slot: apart(values) for slot, values in inputs.items()}
    assert not any(values.is_contiguous() for values in strided.values())
    # a product may add up in another order where an operand lies otherwise
    for mine, other in zip(operation.run(strided), operation.run(inputs), strict=True):
        assert (mine.double() - other.double()).norm() <= 4e-3 * other.double().norm()


def test_logits_whose_memory_the_gradient_took_are_not_used_again(place: Any) -> None:
    inputs = logits_inputs(place, 0)
    given = inputs["targets"], inputs["logits"]
    loss = token_logprobs(given[1] * 1.0, given[0], inplace_backward=True).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    kept = torch.tanh(given[1])  # keeps its output for its own backward
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        token_logprobs(kept, given[0], inplace_backward=True).sum().backward()


@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")  # inductor's imports
@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_compile_gives_the_eager_result(place: Any, name: str) -> None:
    operation = OPERATIONS[name]
    inputs = operation.inputs(place, 0)
    wanted = operation.run(inputs)
    torch.compiler.reset()
    backend = "aot_eager" if place.name == "interpreter" else "inductor"
    compiled = torch.compile(operation.forward, fullgraph=True, backend=backend)
    got = operation.run(inputs, compiled)
    # under a compiler the upstream scalar multiplies gradients that are rounded already
    for mine, other in zip(got, wanted, strict=True):
        limit = 8e-3 if mine.dtype == torch.bfloat16 else 1e-5
        assert (mine.double() - other.double()).norm() <= limit * other.double().norm()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck_of_token_logprobs(place: Any, with_entropy: bool) -> None:
    inputs = logits_inputs(place, 0)
    temperatures = torch.ones(1, device=place.device)
    flat = inputs["targets"].flatten()
    mask = flat % 5 != 0
    op = logprobs_from_logits._op
    check_op(place, op, (inputs["logits"], flat, mask, temperatures, with_entropy))
    upstream = torch.linspace(-1, 1, len(flat), device=place.device)
    by_entropy = upstream.flip(0) if with_entropy else None
    given = (inputs["logits"].detach(), flat, mask, temperatures)
    arguments = (*given, list(op(*given, with_entropy)), upstream, by_entropy)
    check_op(place, logprobs_from_logits._backward_op, arguments)
    check_op(place, logprobs_from_logits._backward_op_, arguments)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_opcheck_of_linear_token_logprobs(place: Any, with_entropy: bool, transposed: bool) -> None:
    inputs = head_inputs(place, 0)
    if transposed:  # its gradient is not
        inputs["weight"] = inputs["weight"].t().contiguous().t()
    hidden, temperatures = (
        inputs["hidden"].flatten(0, 1).detach(),
        torch.ones(1, device=place.device),
    )
    flat = inputs["targets"].flatten()
    head = (inputs["weight"].detach().requires_grad_(), None, flat, flat % 5 != 0, temperatures)
    op = logprobs_from_hidden._op
    check_op(place, op, (hidden.requires_grad_(), *head, 20.0, 1.3, with_entropy))
    upstream = torch.linspace(-1, 1, len(flat), device=place.device)
    by_entropy = upstream.flip(0) if with_entropy else None
    given = (hidden.detach(), head[0].detach(), *head[1:])
    known = list(op(*given, 20.0, 1.3, with_entropy))
    arguments = (*given, known, upstream, by_entropy, [True, True, False], 20.0, 1.3)
    check_op(place, logprobs_from_hidden._backward_op, arguments)


def check_op(place: Any, op: Any, arguments: tuple[Any, ...]) -> None:
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if place.name != "interpreter":  # which cannot run under the tracer
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(op, arguments, test_utils=tests, rtol=1e-3, atol=1e-3)


def replayed(place: Any, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """Capture a run in a CUDA graph; elsewhere the run itself."""
    if not place.real:
        return run
    place.synchronize()  # the inputs are drawn on another stream
    with place.new_stream():
        for _ in range(3):
            run()
    place.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> list[Tensor]:
        graph.replay()
        return outputs

    return replay


def unmasked_inputs(place: Any, seed: int) -> Inputs:
    inputs = policy_inputs(place, seed)
    return {slot: values for slot, values in inputs.items() if slot != "mask"}


def score_all(inputs: Inputs) -> Tensor:
    options = {"return_entropy": True, "skip_zero_rows": False, "softcap": 20.0}
    return torch.stack(linear_token_logprobs(**inputs, **options))


def lose_all(surrogate: Any, inputs: Inputs) -> Tensor:
    options = {"surrogate": surrogate, "aggregate": TokenMean(), "skip_zero_rows": False}
    return linear_policy_loss(**inputs, **options).loss


WITHOUT_WAITING = {
    "token_logprobs": OPERATIONS["token_logprobs"],
    "clipped_policy_loss": OPERATIONS["clipped_policy_loss"],
    "linear_token_logprobs": Operation(head_inputs, score_all),
    **{
        type(surrogate).__name__: Operation(unmasked_inputs, partial(lose_all, surrogate))
        for surrogate in (Clip(), Cispo(5.0), SequenceClip())
    },
}


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_no_host_waits_where_no_rows_are_looked_for(place: Any, name: str) -> None:
    operation = WITHOUT_WAITING[name]
    inputs = operation.inputs(place, 0)
    wanted = operation.run(inputs)  # which compiles
    with place.without_waiting():
        got = operation.run(inputs)
    assert_same_bits(got, wanted)


@pytest.mark.parametrize("name", WITHOUT_WAITING)
def test_a_cuda_graph_of_forward_and_backward(place: Any, name: str) -> None:
    operation = WITHOUT_WAITING[name]
    inputs = operation.inputs(place, 0)
    replay = replayed(place, partial(operation.run, inputs))
    for seed in (10, 20):
        fresh = operation.inputs(place, seed)
        with torch.no_grad():
            for slot, values in fresh.items():
                inputs[slot].copy_(values)
        assert_same_bits(replay(), operation.run(fresh))


def test_a_cuda_graph_of_the_log_probs_of_hidden_states(place: Any) -> None:
    inputs = {name: values.detach() for name, values in head_inputs(place, 0).items()}
    replay = replayed(place, lambda: [linear_token_logprobs(**inputs)])
    for seed in (10, 20):
        fresh = {name: values.detach() for name, values in head_inputs(place, seed).items()}
        for slot, values in fresh.items():
            inputs[slot].copy_(values)
        assert_same_bits(replay(), [linear_token_logprobs(**fresh)])


@pytest.mark.parametrize("name", OPERATIONS)
def test_two_streams_at_once(place: Any, name: str) -> None:
    operation = OPERATIONS[name]
    problems = [operation.inputs(place, seed) for seed in (0, 100)]
    alone = [operation.run(inputs) for inputs in problems]
    place.synchronize()
    streams = [place.new_stream() for _ in problems]
    together: list[list[Tensor]] = [[], []]
    for _ in range(place.pick(5, 1)):
        for i, (stream, inputs) in enumerate(zip(streams, problems, strict=True)):
            with stream:
                together[i] = operation.run(inputs)
    place.synchronize()
    for got, wanted in zip(together, alone, strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.parametrize("name", OPERATIONS)
def test_tensors_on_a_device_that_is_not_the_current_one(place: Any, name: str) -> None:
    if place.real and torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    operation = OPERATIONS[name]
    wanted = operation.run(operation.inputs(place, 0))
    elsewhere = replace(place, device=torch.device("cuda", 1)) if place.real else place
    moved = {
        slot: values.detach().to(elsewhere.device).requires_grad_(values.requires_grad)
        for slot, values in operation.inputs(place, 0).items()
    }
    got = operation.run(moved)
    assert all(values.device == elsewhere.device for values in got)
    assert_same_bits([values.to(place.device) for values in got], wanted)
