"""What stands in for a GPU under verl: a client that samples on the CPU, a reward, rules."""

import asyncio
import json
import os
from itertools import count
from pathlib import Path
from typing import Any

from tiny_qwen3 import make_model
from transformers import AutoTokenizer
from verl.workers.rollout.replica import TokenOutput

from igrpo_algo import DraftRules, DraftTemplate, TextSplice
from igrpo_algo.engines.transformers import TransformersSampler

RULES = DraftRules(splice=TextSplice(DraftTemplate("[", "]")))


def compute_score(solution_str: str, ground_truth: str, **_: Any) -> float:
    """Graded and deterministic."""
    assert ground_truth == "7"
    return sum(map(ord, solution_str)) / 1000


class Client:
    """In the place of verl's client of LLM servers; writes down what each worker asked for."""

    def __init__(self, record: Path, model: Path) -> None:
        self.record = record
        self.model = model
        self._numbers = count()
        self._sampler: TransformersSampler | None = None

    async def generate(
        self, request_id: str, prompt_ids: list[int], sampling_params: dict[str, Any], **_: Any
    ) -> TokenOutput:
        if self._sampler is None:
            tokenizer = AutoTokenizer.from_pretrained(self.model)
            self._sampler = TransformersSampler(make_model(), tokenizer, max_new_tokens=8)
        seed = 1000 * os.getpid() + next(self._numbers)
        await asyncio.sleep(0)
        ((drawn,),) = self._sampler.sample([prompt_ids], 1, seed=seed)
        tokenizer = self._sampler.tokenizer
        with (self.record / f"{os.getpid()}.jsonl").open("a") as file:
            print(json.dumps([tokenizer.decode(prompt_ids), drawn.text, prompt_ids]), file=file)
        return TokenOutput(token_ids=drawn.token_ids, log_probs=drawn.logprobs)
