"""A training step of `IGRPOTrainer` beside one of TRL's `GRPOTrainer`, both with GRPO's settings.

    python -m benchmarks.trainer_step            # a small Qwen3 on a CPU, two minutes

Both get the same configuration (`num_drafts=0`), weights and completions, which are given: sampling
is not timed. The loss is its forward and backward; the step adds rewards, advantages, TRL's batch
and AdamW. Before the clock runs, the gradients of the heads are held against each other; then the
trainers take turns. Where half of the groups have equal rewards, ours leaves them out. Times are
the processor's, since other work on the machine changes those by the clock.
"""

import json
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from trl import GRPOTrainer

from benchmarks import results
from benchmarks.measure import spread
from benchmarks.models import random_qwen3
from benchmarks.options import parser_of
from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer

TRAINERS = {"igrpo": IGRPOTrainer, "TRL": GRPOTrainer}
ALLOWED_ERROR = 1e-3  # between two heads' gradients in float32, in the Frobenius norm


@dataclass(frozen=True)
class Case:
    """P prompts with G completions each, and a model; lengths in tokens."""

    prompts: int = 4
    refinements: int = 4
    prompt: int = 32
    tokens: int = 96
    layers: int = 4
    width: int = 256
    vocabulary: int = 16384


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """A word for each token: w0, w1 and so on."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w0", eos_token="w1", padding_side="left"
    )


class Problem:
    """A trainer, and one batch whose completions are given."""

    def __init__(self, case: Case, name: str, folder: str) -> None:
        draw = torch.Generator().manual_seed(0)
        words = torch.randint(2, case.vocabulary, (case.prompts, case.prompt), generator=draw)
        prompts = [" ".join(f"w{word}" for word in row) for row in words.tolist()]
        rows, shape = case.prompts * case.refinements, (case.tokens,)
        completions = [
            torch.randint(2, case.vocabulary, shape, generator=draw).tolist() for _ in range(rows)
        ]
        self.rewards = torch.rand(case.prompts, case.refinements, generator=draw)
        args = IGRPOConfig(
            folder,
            num_drafts=0,
            num_generations=case.refinements,
            per_device_train_batch_size=rows,
            max_completion_length=case.tokens,
            learning_rate=1e-6,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            report_to="none",
        )
        dataset = Dataset.from_dict({"prompt": prompts})
        self.trainer = TRAINERS[name](
            model=random_qwen3(
                width=case.width,
                layers=case.layers,
                vocabulary=case.vocabulary,
                positions=case.prompt + case.tokens,
                device="cpu",
                dtype=torch.float32,
            ),
            reward_funcs=self.reward,
            args=args,
            train_dataset=dataset,
            processing_class=make_tokenizer(case.vocabulary),
        )
        self.trainer._generate_single_turn = lambda *_, **__: (completions, None)
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self.optimizer = torch.optim.AdamW(self.trainer.model.parameters(), lr=1e-6)
        self.rows = [dataset[row // case.refinements] for row in range(rows)]
        self.equal = 0

    def reward(self, completions: list[Any], **columns: Any) -> list[float]:
        """The rewards of the batch, the first `equal` groups all alike."""
        rewards = self.rewards.clone()
        rewards[: self.equal] = 1.0
        return rewards.flatten().tolist()

    def step(self, equal: int) -> tuple[float, float, Tensor]:
        """Train once: milliseconds of the loss and of the step, and the head's gradient."""
        self.equal = equal
        began = time.process_time()
        batch = self.trainer._prepare_inputs(self.rows)
        batched = time.process_time()
        self.trainer._compute_loss(self.trainer.model, batch).backward()
        differentiated = time.process_time()
        gradient = self.trainer.model.lm_head.weight.grad
        self.optimizer.step()
        self.optimizer.zero_grad()
        ended = time.process_time()
        return 1e3 * (differentiated - batched), 1e3 * (ended - began), gradient


def compare(case: Case, rounds: int, folder: str) -> list[dict[str, Any]]:
    """Time both trainers in turns, on groups that all differ and on groups half of which do."""
    problems = {name: Problem(case, name, folder) for name in TRAINERS}
    figures = []
    for equal in (0, case.prompts // 2):
        readings: dict[str, list[tuple[float, float]]] = {name: [] for name in problems}
        for number in range(rounds + 1):
            gradients = {}
            for name, problem in problems.items():
                loss, step, gradients[name] = problem.step(equal)
                if number:
                    readings[name].append((loss, step))
            if number == 0:
                exact = gradients["TRL"]
                error = float((gradients["igrpo"] - exact).norm() / exact.norm())
                if not error <= ALLOWED_ERROR:
                    raise ArithmeticError(f"the heads' gradients differ by {error:.2g}")
        for name, found in readings.items():
            loss, step = ([*each] for each in zip(*found, strict=True))
            figures.append(
                {
                    "trainer": name,
                    "equal_groups": equal,
                    "loss_ms": spread(loss),
                    "step_ms": spread(step),
                    "error": error,
                }
            )
    return figures


def main() -> None:
    sizes = asdict(Case())
    options = parser_of(__doc__, rounds=5, **sizes).parse_args()
    case = Case(**{name: getattr(options, name) for name in sizes})
    warnings.simplefilter("ignore")
    record = results.new_record(torch.device("cpu"), None)
    path = results.default_path(record)
    path = options.output or path.with_name(f"{path.stem}-trainer-step.json")
    with tempfile.TemporaryDirectory() as folder:
        figures = compare(case, options.rounds, folder)
    record |= {"case": asdict(case), "rounds": options.rounds, "threads": torch.get_num_threads()}
    record |= {"figures": figures, "finished": True}
    for figure in figures:
        print(json.dumps(figure))
    results.write(record, path)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
