"""`docs/speed.md`: every recorded figure as tables. `speed_table` writes it."""

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.cases import Case
from benchmarks.compare import by_case, number
from benchmarks.ops import OURS
from benchmarks.results import Record

HEAD = """# Speed

Written by `python -m benchmarks.speed_table` from the records in `benchmarks/results/`.

Every op beside its peers. A cell holds milliseconds, in brackets our time over the peer's (below 1:
igrpo is faster), and the peak memory in MiB above the inputs. Times are medians, and the peers take
turns, so that a change of the clock rate hits all of them. Every output is compared with float64
before it is timed; *error* is our largest. 30 % active: 60 % of the rows are unmasked, and half of
the groups have advantage zero. What changed after a run's commit is not in its figures.

Not yet measured on a GPU: torch's linear cross entropy, Liger's CuTe and QuACK's kernels, the
FlexAttention under shared prompts (the H100's row below is of the attention before it), and every
commit after the one that a table names.
"""
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "quack-kernels")


def page(
    runs: Mapping[str, tuple[str, Record]],
    steps: Sequence[tuple[str, Record]],
    trainers: Sequence[tuple[str, Record]],
    shared: Sequence[tuple[str, Record]],
) -> str:
    """The page: kernels by device, then training steps, then shared prompts.

    Args:
        runs: Name of the file and record of a run, by kind of device.
        steps: The same of whole training steps.
        trainers: The same of steps of TRL's trainer and ours.
        shared: The same of steps whose prompt is shared.
    """
    parts = [HEAD]
    for kind, (name, record) in runs.items():
        parts.append(f"## {record['hardware']['name']}\n\n{source(name, record)}\n")
        parts.append(f"![Our time and memory over the fastest peer's](images/speed-{kind}.png)\n")
        parts += [f"### {op}\n\n{table(lines)}" for op, lines in kernels(record).items()]
        parts.append(notes(record))
    parts.append("## A whole training step\n\n" + STEP)
    for name, record in steps:
        parts.append(f"{source(name, record)}, {batch(record)}:\n\n{table(train_step(record))}")
    parts.append("## A step of the trainer\n\n" + TRAINER)
    for name, record in trainers:
        parts.append(f"{source(name, record)}, {groups(record)}:\n\n{table(trainer_step(record))}")
    parts.append("## Stage 2 with its prompt shared\n\n" + SHARED)
    for name, record in shared:
        parts.append(f"{source(name, record)}:\n\n{table(shared_prompt(record))}")
    return "\n".join(parts)


STEP = """\
Forward, loss, backward and AdamW of a model with random weights and checkpointed layers, through
each head and loss (`python -m benchmarks.train_step`). Peak: of the whole step, weights included.
"""
TRAINER = """\
`IGRPOTrainer` as plain GRPO beside TRL's `GRPOTrainer` on a CPU, with the same configuration,
weights and completions (`python -m benchmarks.trainer_step`): processor milliseconds of the loss,
forward and backward, and of the step without its sampling. Not yet measured on a GPU.
"""
SHARED = """\
Forward and backward of a small Qwen3 over a prompt, question and draft, and its G completions of T
tokens (`python -m benchmarks.shared_prompt`): time and peak memory of the padded and of the packed
batch over those of the shared row. Above 1, sharing is better.
"""


def table(lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table, the first line its head."""
    head, *body = lines
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ["---"] * len(head), *body))


def where(record: Record) -> str:
    """Hardware, versions and date of a run."""
    hardware, versions = record["hardware"], record["versions"]
    text = hardware["name"]
    if "cores" in hardware:
        text += f", {hardware['cores']} cores, {hardware['threads']} threads"
    names = (f"{name} {versions[name]}" for name in PACKAGES if versions.get(name))
    return f"{text}; {', '.join(names)}; {record['date'][:10]}"


def source(name: str, record: Record) -> str:
    text = f"{where(record)}, commit {record['commit']}, `benchmarks/results/{name}`"
    if ceilings := record.get("ceilings"):
        rate = max(ceilings["operations_per_second"].values()) / 1e12
        copied = ceilings["copy_bytes_per_second"] / 1e9
        text += f"; measured {number(rate)} TFLOP/s and {number(copied)} GB/s copied"
    return text


def size(case: Case) -> str:
    named = {"T": case.tokens, "H": case.width, "V": case.vocabulary}
    numbers = " ".join(f"{name}={value}" for name, value in named.items() if value)
    return f"{case.dtype}, {numbers}" + f", {case.active:.0%} active" * (case.active != 1.0)


def kernels(record: Record) -> dict[str, list[list[str]]]:
    """By op: a line for each size, and a column for each peer that ran at all."""
    found: dict[str, dict[Case, dict[str, Record]]] = {}
    for case, figures in by_case(record).items():
        found.setdefault(f"`{case.op}`, {case.passes}", {})[case] = figures
    return {op: list(sizes(measured)) for op, measured in found.items()}


def sizes(measured: Mapping[Case, dict[str, Record]]) -> Iterator[list[str]]:
    """The lines of one op."""
    named = dict.fromkeys(peer for figures in measured.values() for peer in figures)
    peers = [peer for peer in named if any(runs(f[peer]) for f in measured.values() if peer in f)]
    yield ["size", *peers, "error"]
    for case, figures in measured.items():
        ours = figures[OURS]
        cells = [cell(figures[peer], ours) if peer in figures else "" for peer in peers]
        error = f"{max(ours['errors'].values()):.0e}" if ours["errors"] else ""
        yield [size(case), *cells, error]


def runs(figure: Record) -> bool:
    return figure["not_run"] is None


def cell(figure: Record, ours: Record) -> str:
    """A peer's milliseconds with our share of them, and its peak memory."""
    if not runs(figure):
        return "not run"
    text = number(figure["ms"]["median"])
    if figure is not ours and runs(ours):
        text += f" ({ours['ms']['median'] / figure['ms']['median']:.2f})"
    if figure["peak_bytes"] is not None:
        text += f", {number(figure['peak_bytes'] / 2**20)}"
    return text + ("*" if figure["computes"] else "")


def notes(record: Record) -> str:
    """What peers compute in the op's place, and what was not run."""
    figures = record["figures"]
    lines = [f"*{f['peer']}: {f['computes']}." for f in figures if f["computes"] and runs(f)]
    lines += [f"{f['peer']} did not run: {why(f)}." for f in figures if not runs(f)]
    if record["left_out"]:
        lines.append(f"{len(record['left_out'])} more cases had no time.")
    return "".join(f"\n{line}\n" for line in dict.fromkeys(lines))


def why(figure: Record) -> str:
    """The first sentence of the reason why a peer did not run."""
    return figure["not_run"].partition(". ")[0].rstrip(".")


def batch(record: Record) -> str:
    case = record["case"]
    return (
        f"{case['sequences']} sequences of {case['prompt']} + {case['tokens']} tokens, "
        f"{case['layers']} layers of {case['width']}, V={case['vocabulary']}, {case['dtype']}"
    )


def groups(record: Record) -> str:
    case = record["case"]
    return (
        f"{case['prompts']} groups of {case['refinements']} completions of {case['prompt']} + "
        f"{case['tokens']} tokens, {case['layers']} layers of {case['width']}, "
        f"V={case['vocabulary']}, fp32"
    )


def trainer_step(record: Record) -> Iterator[list[str]]:
    yield ["groups of equal rewards", "trainer", "loss", "igrpo's share", "step", "igrpo's share"]
    for figure in record["figures"]:
        equal = [f for f in record["figures"] if f["equal_groups"] == figure["equal_groups"]]
        (ours,) = (f for f in equal if f["trainer"] == OURS)
        line = [str(figure["equal_groups"]), figure["trainer"]]
        for part in ("loss_ms", "step_ms"):
            median = figure[part]["median"]
            share = "" if figure is ours else f"{ours[part]['median'] / median:.2f}"
            line += [number(median), share]
        yield line


def train_step(record: Record) -> Iterator[list[str]]:
    yield ["head and loss", "ms", "igrpo's share of it", "peak GiB"]
    ours = record["figures"][OURS]
    for form, figure in record["figures"].items():
        if "ms" not in figure:
            yield [form, f"not run: {figure['not_run']}", "", ""]
            continue
        median, peak = figure["ms"]["median"], figure["peak_bytes"]
        share = "" if form == OURS else f"{ours['ms']['median'] / median:.2f}"
        yield [form, number(median), share, number(peak / 2**30) if peak else ""]


def shared_prompt(record: Record) -> Iterator[list[str]]:
    yield ["P", "G", "draft / T", "T", "model", "padded: time, memory", "packed: time, memory"]
    for row in record["rows"]:
        forms = (row["forms"][form] for form in ("padded", "packed"))
        ratios = [
            f"{form['speedup_of_shared']['median']:.2f}, {form['memory_over_shared']:.2f}"
            for form in forms
        ]
        model = f"{row['layers']} layers of {row['width']}, {row['dtype']}"
        sizes = (row.get("prompts", 1), row["refinements"], row["draft"], row["tokens"])
        yield [*map(str, sizes), model, *ratios]
