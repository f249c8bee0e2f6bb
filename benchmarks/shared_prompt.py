"""Stage 2 trained with its prompt shared, beside the same step on a padded and on a packed batch.

    python -m benchmarks.shared_prompt    # minutes; --quick for a look, --device cuda
    python -m benchmarks.shared_prompt --prompts 32 --refinements 4 --tokens 64

times forward and backward of a small Qwen3 over P prompts, q' = question + draft, and the G
completions of each, up to the gradients of all weights, through `linear_policy_loss` in every form:

    shared  each q' once, its completions after it, all in one row
    padded  P G sequences side by side through transformers' "sdpa", which needs no mask for them
    packed  P G sequences in one row, each attended to by itself: what a varlen kernel computes
            (transformers' own packed rows need a dense [S, S] mask where there is no such kernel)

Times are medians over rounds in which the forms take turns, with quartiles; ratios are medians over
the rounds. The peak memory is what a step takes above weights and gradients, on a CPU in a fresh
process. All completions are equally long, so that the padded form has no padding; `--spread` varies
them.
"""

import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.options import add_device, add_dtype, parser_of, positive
from benchmarks.resident import in_fresh_process, peak_during
from benchmarks.shared_prompt_forms import FORMS, Case, Problem, make_problem

if TYPE_CHECKING:
    from benchmarks.draw import Bar

TITLES = (
    "time over the other batch's (left of 1: sharing is faster)",
    "peak memory over the other's",
)


def step(form: str, problem: Problem) -> None:
    """Forward and backward; the gradients are added to those that are there."""
    FORMS[form](problem).backward()
    if problem.model.device.type == "cuda":
        torch.cuda.synchronize()


def gradient(form: str, problem: Problem) -> Tensor:
    problem.model.zero_grad()
    step(form, problem)
    grads = [weight.grad for weight in problem.model.parameters() if weight.grad is not None]
    return torch.cat([grad.flatten() for grad in grads]).double()


def times(case: Case, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of each form in each round."""
    problem = make_problem(case)
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for number in range(rounds + 1):  # the first one warms up
        for form in FORMS:
            start = time.perf_counter()
            step(form, problem)
            if number:
                seconds[form].append(time.perf_counter() - start)
    return seconds


def error(case: Case) -> float:
    """Largest relative difference, in the Frobenius norm, of a form's gradient from `padded`."""
    problem = make_problem(case)
    exact = gradient("padded", problem)
    others = [gradient(form, problem) for form in FORMS if form != "padded"]
    return max(((other - exact).norm() / exact.norm()).item() for other in others)


def peak_bytes(form: str, case: Case) -> int:
    """Peak memory of a step above weights and gradients; on the CPU, of a fresh process."""
    if case.device == "cuda":
        problem = make_problem(case)
        step(form, problem)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(form, problem)
        return torch.cuda.max_memory_allocated() - before
    return in_fresh_process(_peak, form, case, preload=["benchmarks.shared_prompt_forms"])


def _peak(form: str, case: Case) -> int:
    torch.set_num_threads(case.threads)
    problem = make_problem(case)
    groups = [[[1, 2]] * case.refinements] * case.prompts
    small = replace(problem, prompts=[[1, 2]] * case.prompts, completions=groups)
    step(form, small)  # so that imports, thread pools and gradients do not count in the peak
    return peak_during(lambda: step(form, problem))


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """One row of the results: the case, and each form's time, memory and what sharing saves."""
    seconds = times(case, rounds)
    peaks = {form: peak_bytes(form, case) for form in FORMS}
    row: dict[str, Any] = {**asdict(case), "gradient_error": error(case), "forms": {}}
    for form, values in seconds.items():
        over = [other / own for other, own in zip(values, seconds["shared"], strict=True)]
        row["forms"][form] = {
            "seconds": quartiles(values),
            "peak_bytes": peaks[form],
            "speedup_of_shared": quartiles(over),
            "memory_over_shared": peaks[form] / peaks["shared"],
        }
    return row


def quartiles(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": low, "q3": high}


def bars(record: results.Record) -> "Iterator[Bar]":
    """The shared row over the padded and the packed batch."""
    from benchmarks.draw import Bar  # matplotlib may be missing where one case is measured

    for row in record["rows"]:
        label = f"G={row['refinements']}, draft {row['draft']:g} of T={row['tokens']:,}"
        if row.get("prompts", 1) > 1:
            label = f"P={row['prompts']}, " + label
        for form, result in row["forms"].items():
            if form != "shared":
                ratios = result["speedup_of_shared"]["median"], result["memory_over_shared"]
                yield Bar(f"over {form}", label, 1 / ratios[0], memory=1 / ratios[1])


def main() -> None:
    sizes = {name: getattr(Case, name) for name in ("prompts", "tokens", "width", "layers")}
    parser = parser_of(
        __doc__, rounds=5, threads=os.cpu_count(), vocabulary=Case.vocabulary, **sizes
    )
    add_device(parser)
    add_dtype(parser)
    parser.add_argument("--refinements", type=positive, nargs="+", default=[4, 8, 16])
    parser.add_argument("--drafts", type=float, nargs="+", default=[0.25, 0.5, 1.0, 2.0])
    parser.add_argument("--quick", action="store_true", help="one small case, three rounds")
    parser.add_argument("--spread", type=float, default=Case.spread)
    options = parser.parse_args()
    sizes, drafts, rounds = options.refinements, options.drafts, options.rounds
    case = Case(
        **{name: getattr(options, name) for name in Case.__annotations__.keys() & vars(options)}
        | {"refinements": 8}
    )
    if options.quick:
        sizes, drafts, rounds, case = [8], [1.0], 3, replace(case, tokens=64, layers=2)
    torch.set_num_threads(case.threads)
    record = results.about(torch.device(case.device), "igrpo_algo", "igrpo_kernels")
    record |= {"rounds": rounds, "rows": []}
    name = f"{record['date']}-shared-prompt-{case.device}.json"
    output = options.output or results.RESULTS / name
    for size in sizes:
        for draft in drafts:
            row = measure(replace(case, refinements=size, draft=draft), rounds)
            record["rows"].append(row)
            print(f"G={size} draft={draft}: gradient error {row['gradient_error']:.1e}")
            for form, result in row["forms"].items():
                ratio, mib = result["speedup_of_shared"], result["peak_bytes"] / 2**20
                print(
                    f"  {form:7} {result['seconds']['median']:8.3f} s {mib:7.0f} MiB, over shared: "
                    f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f}) in time, "
                    f"{result['memory_over_shared']:.2f} in memory",
                    flush=True,
                )
            results.write(record, output)
    if len(record["rows"]) > 1:
        title = f"Stage 2 with its prompt shared: {record['hardware']['name']}, {record['date']}"
        from benchmarks.draw import draw_bars

        draw_bars(list(bars(record)), title, output.with_suffix(".png"), TITLES)


if __name__ == "__main__":
    main()
