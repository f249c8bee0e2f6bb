"""Train two steps as the example does, and write what was sampled and trained to seen.json.

`train_on_cpu.py FOLDER` runs Unsloth's CPU backend, which leaves TRL's trainer as it is.
`train_on_cpu.py FOLDER rewritten` takes the trainer that Unsloth writes for a GPU. Its own switch
for tests starts it without one and then rewrites nothing, so the rewriting is called here.
"""

import importlib.util
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parents[1] / "models"))

REWRITTEN = sys.argv[2:] == ["rewritten"]
if REWRITTEN:
    os.environ |= {"UNSLOTH_ALLOW_CPU": "1", "UNSLOTH_COMPILE_DISABLE": "1"}

import unsloth  # isort: skip
import torch
import trl

if REWRITTEN:
    from unsloth.models.rl import patch_trl_rl_trainers

    patch_trl_rl_trainers()

from tiny_qwen3 import make_model, make_tokenizer

from igrpo_algo import DraftRules, DraftTemplate, TextSplice

theirs = trl.GRPOTrainer
seen: dict[str, Any] = {"trainer": theirs.__name__}
seen |= {"scored": [], "sampled": [], "advantages": [], "trained": []}
generate, score, compute_loss = (
    theirs._generate,
    theirs._generate_and_score_completions,
    theirs.compute_loss,
)


def note_prompts(self: Any, prompts: list[Any], *args: Any) -> Any:
    seen["sampled"].append([prompt[-1]["content"] for prompt in prompts])
    return generate(self, prompts, *args)


def note_advantages(self: Any, inputs: Any) -> Any:
    batch = score(self, inputs)
    seen["advantages"].append(batch["advantages"].tolist())
    return batch


def note_rows(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    rows = zip(inputs["prompt_ids"], inputs["prompt_mask"].bool(), strict=True)
    seen["trained"].append([self.processing_class.decode(ids[keep]) for ids, keep in rows])
    return compute_loss(self, model, inputs, *args, **kwargs)


theirs._generate = note_prompts
theirs._generate_and_score_completions = note_advantages
theirs.compute_loss = note_rows


def letters(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    texts = [completion[0]["content"] for completion in completions]
    rewards = [float(sum(map(ord, text))) for text in texts]
    seen["scored"].append({"texts": texts, "rewards": rewards, "answer": answer})
    return rewards


def main(output: str) -> None:
    path = HERE.parents[2] / "examples" / "unsloth_igrpo.py"
    spec = importlib.util.spec_from_file_location("unsloth_igrpo", path)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    rows = [
        {"prompt": [{"role": "user", "content": f"{n}+{n}?"}], "answer": str(2 * n)}
        for n in range(4)
    ]
    model = make_model()
    if REWRITTEN:  # as its `from_pretrained` does
        for name in ("for_training", "for_inference"):
            setattr(model, name, partial(getattr(unsloth.FastLanguageModel, name), model))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = example.train(
        model,
        make_tokenizer(),
        rows,
        DraftRules(splice=TextSplice(DraftTemplate("[", "]"))),
        reward=letters,
        output_dir=output,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_completion_length=8,
        max_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
    )
    after = trainer.model.state_dict()
    seen["moved"] = any(not torch.equal(before[name], after[name].cpu()) for name in before)
    seen["logged"] = sorted({name for entry in trainer.state.log_history for name in entry})
    (Path(output) / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
