"""What every op refuses by the argument's name: masks, numbers and tensors without values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from igrpo_kernels import (
    K3,
    Cispo,
    Clip,
    FixedLength,
    SequenceMean,
    Sum,
    TokenMean,
    clipped_policy_loss,
    linear_policy_loss,
    linear_token_logprobs,
    token_logprobs,
)
from igrpo_kernels.loss_from_logprobs import policy_loss
from igrpo_kernels.surrogates import Vespo

LOSS: dict[str, Any] = {"surrogate": Clip(), "aggregate": TokenMean()}


def logits_op(**options: Any) -> object:
    given = {"logits": torch.randn(2, 3, 5), "targets": torch.zeros(2, 3, dtype=torch.long)}
    return token_logprobs(**{**given, **options})


def head_inputs() -> dict[str, Any]:
    targets = torch.zeros(2, 3, dtype=torch.long)
    return {"hidden": torch.randn(2, 3, 4), "weight": torch.randn(5, 4), "targets": targets}


def head_op(**options: Any) -> object:
    return linear_token_logprobs(**{**head_inputs(), **options})


def fused_op(**options: Any) -> object:
    return linear_policy_loss(**{**head_inputs(), "advantages": torch.ones(2), **LOSS, **options})


def loss_op(**options: Any) -> object:
    given = {"logprobs": -torch.rand(2, 3), "advantages": torch.ones(2)}
    return policy_loss(**{**given, **LOSS, **options})


def clipped_op(**options: Any) -> object:
    given = {"logprobs": -torch.rand(2, 3), "advantages": torch.ones(2)}
    return clipped_policy_loss(**{**given, **options})


Op = Callable[..., object]
OPS: list[Op] = [logits_op, head_op, fused_op, loss_op, clipped_op]
each_op = pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__)


@each_op
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.long, torch.float, torch.half])
def test_masks_of_ones_and_zeros_in_any_dtype(op: Op, dtype: torch.dtype) -> None:
    ones = torch.tensor([[1, 1, 0], [1, 0, 1]])
    results = []
    for mask in (ones.to(dtype), ones.bool()):
        torch.manual_seed(0)
        results.append(op(mask=mask))
    value, expected = results
    if isinstance(value, tuple):
        value, expected = value[0], expected[0]
    torch.testing.assert_close(value, expected, rtol=0, atol=0)


@each_op
@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0.0, 0.0, -torch.inf], [0.0, 0.0, 0.0]]),  # additive: means the opposite
        torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]),
        torch.tensor([[1, 2, 0], [1, 1, 1]]),
        torch.tensor([[1, -1, 0], [1, 1, 1]]),
        torch.tensor([[1.0, torch.nan, 0.0], [1.0, 1.0, 1.0]]),
    ],
    ids=["additive", "weights", "counts", "signs", "nan"],
)
def test_other_masks_are_refused(op: Op, mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask must hold booleans, or ones and zeros"):
        op(mask=mask)


@pytest.mark.parametrize("op", [logits_op, head_op, fused_op], ids=lambda op: op.__name__)
@pytest.mark.parametrize("temperature", [1e-39, 5e-324, 1e39, 1e308])
def test_temperatures_beyond_float32(op: Op, temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be"):
        op(temperature=temperature)
    per_row = torch.full((2, 3), 1.0, dtype=torch.float64)
    per_row[1, 2] = temperature
    with pytest.raises(ValueError, match=r"temperature must be >= 1\.18e-38 and finite"):
        op(temperature=per_row)
    op(temperature=per_row, mask=torch.tensor([[1, 1, 1], [1, 1, 0]]))


@pytest.mark.parametrize("op", [loss_op, fused_op], ids=lambda op: op.__name__)
def test_a_negative_kl_coef_is_refused(op: Op) -> None:
    ref_logprobs = -torch.rand(2, 3)
    with pytest.raises(ValueError, match=r"kl_coef must be >= 0, got -0\.1"):
        op(kl_coef=-0.1, kl=K3(), ref_logprobs=ref_logprobs)


@pytest.mark.parametrize("number", [1e308, -1e308, 3.5e38])
@pytest.mark.parametrize(
    "make",
    [
        lambda x: fused_op(softcap=abs(x)),
        lambda x: fused_op(logit_scale=x),
        lambda x: head_op(logit_scale=x),
        lambda x: loss_op(entropy_coef=x, entropy=torch.ones(2, 3)),
        lambda x: loss_op(kl_coef=abs(x), ref_logprobs=-torch.rand(2, 3)),
        lambda x: Clip(high=abs(x)),
        lambda x: Cispo(max_ratio=abs(x)),
        lambda x: Vespo(k_positive=abs(x)),
        lambda x: SequenceMean(denominator=abs(x)),
        lambda x: clipped_op(clip_low=abs(x)),
    ],
)
def test_numbers_beyond_float32_name_their_argument(
    make: Callable[[float], object], number: float
) -> None:
    names = (
        "softcap|logit_scale|entropy_coef|kl_coef|high|max_ratio|k_positive|denominator|clip_low"
    )
    with pytest.raises(ValueError, match=rf"^({names}) must be in the range of float32, got"):
        make(number)


@pytest.mark.parametrize("number", [10**30, 2**63, 10**5000], ids=["30", "63", "5000"])
def test_integers_beyond_64_bits_name_their_argument(number: int) -> None:
    for name, make in {
        "high": lambda: Clip(high=number),
        "max_ratio": lambda: Cispo(max_ratio=number),
        "denominator": lambda: Sum(denominator=number),
        "length": lambda: FixedLength(number),
        "logit_scale": lambda: head_op(logit_scale=number),
        "temperature": lambda: logits_op(temperature=number),
        "chunk_bytes": lambda: head_op(chunk_bytes=number),
    }.items():
        with pytest.raises(ValueError, match=rf"^{name} must fit 64 bits"):
            make()


@pytest.mark.parametrize("value", [0, -1])
def test_a_budget_below_one_byte(value: int) -> None:
    for op in (head_op, fused_op):
        with pytest.raises(ValueError, match=f"chunk_bytes must be >= 1, got {value}"):
            op(chunk_bytes=value)
        op(chunk_bytes=1)  # below one row: a chunk holds one


@pytest.mark.parametrize(
    ("op", "names"),
    [
        (logits_op, ["logits", "targets", "mask"]),
        (head_op, ["hidden", "weight", "bias", "targets"]),
        (fused_op, ["hidden", "advantages", "old_logprobs", "importance_weights"]),
        (loss_op, ["logprobs", "advantages", "mask", "ref_logprobs", "entropy"]),
        (clipped_op, ["logprobs", "old_logprobs"]),
    ],
    ids=["logits", "hidden", "fused", "loss", "clipped"],
)
def test_tensors_on_the_meta_device(op: Op, names: list[str]) -> None:
    shapes = {"logits": (2, 3, 5), "hidden": (2, 3, 4), "weight": (5, 4), "bias": (5,)}
    for name in names:
        dtype = torch.long if name == "targets" else torch.float32
        shape = shapes.get(name, (2, 3))
        with pytest.raises(TypeError, match=f"^{name} must hold values, got .* meta device"):
            op(**{name: torch.empty(shape, dtype=dtype, device="meta")})


@pytest.mark.parametrize(
    ("op", "name", "shape"),
    [
        (logits_op, "targets", (2, 3)),
        (head_op, "weight", (5, 4)),
        (head_op, "targets", (2, 3)),
        (head_op, "bias", (5,)),
        (fused_op, "advantages", (2,)),
        (loss_op, "old_logprobs", (2, 3)),
        (clipped_op, "advantages", (2,)),
    ],
)
def test_a_tensor_on_another_device(op: Op, name: str, shape: tuple[int, ...]) -> None:
    with FakeTensorMode():  # a CUDA tensor without a GPU
        dtype = torch.long if name == "targets" else torch.float32
        values = torch.zeros(shape, dtype=dtype, device="cuda")
    with pytest.raises(ValueError, match=f"^{name} must be on cpu, got a .* on cuda:0$"):
        op(**{name: values})
