"""One training step of a whole model through each head and loss: time, memory, longest completion.

    python -m benchmarks.train_step --device cuda --longest   # Qwen3 in the shape of its 0.6B, bf16
    python -m benchmarks.train_step --small                   # tries the machinery on a CPU

A step is the model's forward, the loss from its last hidden states, the backward and AdamW; weights
are random. Before the clock runs, each form's gradient of the head is held against that of all
logits in fp32; then the forms take turns. On a GPU the peak is the allocator's over one step,
weights and the optimizer's state included, and `--longest` seeks the longest completion whose step
still fits.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import peers_linear, results
from benchmarks.batches import ABSENT, Batch, Draw, advantages_and_mask
from benchmarks.cases import DTYPES
from benchmarks.measure import reason, release, seconds_of, spread, synchronize
from benchmarks.models import random_qwen3
from benchmarks.options import add_device, add_dtype, parser_of
from igrpo_kernels import linear_token_logprobs

FORMS: dict[str, Callable[[Batch], Tensor]] = {
    "igrpo": peers_linear.igrpo_loss,
    "TRL": peers_linear.trl_loss,
    "Liger": peers_linear.liger_loss,
    "torch": peers_linear.torch_loss,
}
ALLOWED_ERROR = {"fp32": 1e-3, "bf16": 5e-2}  # of the head's gradient, in the Frobenius norm
STEP = 512  # tokens by which the longest completion is sought


@dataclass(frozen=True)
class Case:
    """A model and a batch of completions under one prompt length; lengths in tokens."""

    sequences: int = 4
    prompt: int = 256
    tokens: int = 2048
    active: float = 1.0
    layers: int = 28
    width: int = 1024
    vocabulary: int = 151936
    dtype: str = "bf16"
    device: str = "cuda"


SMALL = Case(tokens=32, prompt=8, layers=2, width=64, vocabulary=512, dtype="fp32", device="cpu")


class Problem:
    """A model, its optimizer and one batch."""

    def __init__(self, case: Case) -> None:
        device = torch.device(case.device)
        draw = Draw(0, device)
        self.case = case
        self.model = make_model(case)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6)
        shape = (case.sequences, case.prompt + case.tokens)
        self.ids = draw.below(case.vocabulary, *shape)
        self.chosen = advantages_and_mask(case.sequences, case.tokens, case.active, device)
        self.targets = self.ids[:, case.prompt :].contiguous()
        with torch.no_grad():
            self.old_logprobs = linear_token_logprobs(
                self.hidden(), self.model.lm_head.weight, self.targets
            )

    def hidden(self) -> Tensor:
        """Run the model up to the states that predict the completions."""
        states = self.model.get_decoder()(self.ids, use_cache=False).last_hidden_state
        return states[:, self.case.prompt - 1 : -1]

    def loss(self, form: str) -> Tensor:
        """Run the forward, up to the loss."""
        batch = Batch(
            self.targets,
            old_logprobs=self.old_logprobs,
            upstream=ABSENT,
            hidden=self.hidden(),
            weight=self.model.lm_head.weight,
            **self.chosen,
        )
        return FORMS[form](batch)

    def step(self, form: str) -> None:
        """Train on the batch once."""
        self.loss(form).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def make_model(case: Case) -> PreTrainedModel:
    model = random_qwen3(
        width=case.width,
        layers=case.layers,
        vocabulary=case.vocabulary,
        positions=2**17,
        device=case.device,
        dtype=DTYPES[case.dtype],
    )
    # transformers 5.17 has the old name alone, and later versions warn of it
    new, old = "activation_checkpointing_enable", "gradient_checkpointing_enable"
    getattr(model, new if hasattr(model, new) else old)()
    return model.train()


def head_gradient(problem: Problem, form: str) -> Tensor:
    problem.model.zero_grad()
    problem.loss(form).backward()
    grad = problem.model.lm_head.weight.grad.float()
    problem.model.zero_grad()
    return grad


def errors(case: Case) -> dict[str, float | str]:
    """Error of each form's gradient of the head on a short batch, or why it has none."""
    problem = Problem(replace(case, tokens=min(case.tokens, 64)))
    found: dict[str, float | str] = {}
    problem.model.float()
    exact = head_gradient(problem, "torch")
    problem.model.to(DTYPES[case.dtype])
    for form in FORMS:
        try:
            error = ((head_gradient(problem, form) - exact).norm() / exact.norm()).item()
        except Exception as problem_of_form:
            found[form] = reason(problem_of_form)
        else:
            wrong = not error <= ALLOWED_ERROR[case.dtype]
            found[form] = f"wrong gradient: {error:.2g}" if wrong else error
    return found


def times(problem: Problem, forms: list[str], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step of each form in each round, after one to warm up."""
    device = problem.ids.device
    readings: dict[str, list[float]] = {form: [] for form in forms}
    for number in range(rounds + 1):
        for form in forms:
            took = seconds_of(partial(problem.step, form), device)
            if number:
                readings[form].append(1e3 * took)
    return readings


def peak(problem: Problem, form: str) -> int | None:
    """Peak of the allocator over a step; None on a CPU."""
    device = problem.ids.device
    if device.type != "cuda":
        return None
    release()
    torch.cuda.reset_peak_memory_stats(device)
    problem.step(form)
    synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def fits(case: Case, form: str, tokens: int) -> bool:
    """Whether a step over completions of so many tokens runs."""
    release()
    try:
        problem = Problem(replace(case, tokens=tokens))
        problem.step(form)
        problem.step(form)  # now with the optimizer's state
        synchronize(problem.ids.device)
    except torch.OutOfMemoryError:
        return False
    return True


def longest(case: Case, form: str, most: int = 2**16) -> int:
    """The longest completion that fits, in steps of `STEP` tokens; 0 where none does."""
    low, high = 0, STEP
    while high <= most and fits(case, form, high):
        low, high = high, 2 * high
    while high - low > STEP:
        middle = (low + high) // (2 * STEP) * STEP
        low, high = (middle, high) if fits(case, form, middle) else (low, middle)
    return low


def main() -> None:
    sizes = ("sequences", "prompt", "tokens", "layers", "width", "vocabulary")
    parser = parser_of(__doc__, rounds=5, **dict.fromkeys(sizes))
    add_device(parser, "cuda")
    add_dtype(parser, None)
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--longest", action="store_true", help="seek the longest completions")
    parser.add_argument("--active", type=float, choices=[1.0, 0.6, 0.3])
    options = parser.parse_args()
    case = SMALL if options.small else Case(device=options.device)
    given = {name: value for name, value in vars(options).items() if value is not None}
    case = replace(
        case, **{name: given[name] for name in asdict(case).keys() & given.keys() - {"device"}}
    )
    if options.longest and case.device != "cuda":
        parser.error("--longest needs --device cuda: a CPU's memory has no such end")
    record: dict[str, Any] = results.new_record(torch.device(case.device), None)
    path = results.default_path(record)
    path = options.output or path.with_name(f"train-step-{path.name}")
    record |= {"case": asdict(case), "rounds": options.rounds, "figures": {}}
    found = errors(case)
    release()
    problem = Problem(case)
    forms = [form for form, error in found.items() if isinstance(error, float)]
    readings = times(problem, forms, options.rounds)
    for form, error in found.items():
        row: dict[str, Any] = {"not_run": error}
        if form in forms:
            row = {"ms": spread(readings[form]), "peak_bytes": peak(problem, form), "error": error}
        record["figures"][form] = row
        print(f"{form:8} {json.dumps(row)}", flush=True)
        results.write(record, path)
    del problem
    if options.longest:
        for form in forms:
            record["figures"][form]["longest"] = longest(case, form)
            print(f"{form:8} longest completion: {record['figures'][form]['longest']}", flush=True)
            results.write(record, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
