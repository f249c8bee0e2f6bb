"""iGRPO inside ms-swift's own command: two steps of a tiny Qwen3, on one rank and on two."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import swift
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from igrpo_algo import DraftRules
from igrpo_algo.drafts.rules import Fallback
from igrpo_algo.trainers.swift import _check_options, use_igrpo

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from contract import Group
from differences import note

EXAMPLE = HERE.parents[2] / "examples" / "swift_plugin.py"
COMMAND = Path(swift.__path__[0]) / "cli" / "rlhf.py"
G = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and a data set, as files."""
    folder = tmp_path_factory.mktemp("swift")
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    characters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {token: index for index, token in enumerate(special + characters)}
    core = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    core.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": False}
    ids = {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": None}
    config = Qwen3Config(vocab_size=len(vocabulary), **size, **heads, **ids)
    Qwen3ForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}+{n}?"}], "solution": str(2 * n)}
        for n in range(8)
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def train(
    folder: Path, record: Path, *, ranks: int = 1, drafts: int | None = None
) -> list[list[dict[str, Any]]]:
    """Run the command and return what the plugin wrote on each rank; the example sets up iGRPO
    where no number of drafts is given."""
    record.mkdir()
    options = {
        "rlhf_type": "grpo", "model": "model", "model_type": "qwen3",
        "template": "qwen3_nothinking", "use_vllm": "false", "use_hf": "true",
        "reward_funcs": "letters",
        "dataset": "data.jsonl", "num_generations": G,
        "per_device_train_batch_size": G // ranks, "gradient_accumulation_steps": 1,
        "max_completion_length": 8, "max_steps": 2, "torch_dtype": "float32", "use_cpu": "true",
        "bf16": "false", "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "split_dataset_ratio": 0, "output_dir": record / "out", "tuner_type": "full",
        "loss_type": "grpo", "beta": 0, "eval_strategy": "no", "seed": 1,
    }  # fmt: skip
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {
        **os.environ,
        "IGRPO_RECORD": str(record),
        "IGRPO_DRAFTS": str(drafts or ""),
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    flat = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flat += ["--external_plugins", *map(str, ([] if drafts else [EXAMPLE]) + [HERE / "plugin.py"])]
    done = subprocess.run(
        [*launch, str(COMMAND), *flat],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    for name in ("igrpo/draft_reward", "igrpo/uplift", "igrpo/refinement_zero_std"):
        assert name in done.stdout + done.stderr
    files = [record / f"rank{rank}.jsonl" for rank in range(ranks)]
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


@pytest.mark.parametrize(("ranks", "drafts"), [(1, 4), (2, 2)])
def test_each_group_is_trained_under_its_best_draft_by_a_loss_that_is_ours(
    folder: Path, tmp_path: Path, ranks: int, drafts: int
) -> None:
    records = train(folder, tmp_path / "record", ranks=ranks, drafts=drafts)
    scored = [[entry for entry in entries if "scored" in entry] for entries in records]
    trained = [[e["trained"] for e in entries if "trained" in e] for entries in records]
    for step in range(2):
        first, second = ([s[2 * step + stage] for s in scored] for stage in range(2))
        texts = [text for entry in first for text in entry["scored"]]
        rewards = [reward for entry in first for reward in entry["rewards"]]
        assert len(texts) == drafts
        best = texts[rewards.index(max(rewards))]
        assert sum(len(entry["scored"]) for entry in second) == G
        prompts = [prompt for rank in trained for prompt in rank[step]]
        question = prompts[0].partition("?")[0]
        assert re.fullmatch(r"(\d)\+\1", question)
        Group(f"{question}?", texts, best.strip(), prompts, prompts).check(drafts, G)
    losses = [entry for entries in records for entry in entries if "loss" in entry]
    assert len(losses) == 2 * ranks
    for entry in losses:
        theirs, ours = entry["loss"]
        note("ms-swift", "loss inside its trainer, one rank and two", abs(theirs - ours))
        note("ms-swift", "gradient inside its trainer, one rank and two", entry["gradient_gap"])
        assert abs(theirs - ours) <= 1e-6
        assert entry["gradient_gap"] <= 1e-6


def test_the_plugin_of_the_examples_trains_under_its_best_draft(
    folder: Path, tmp_path: Path
) -> None:
    (entries,) = train(folder, tmp_path / "record")
    scored = [entry for entry in entries if "scored" in entry]
    trained = [entry["trained"] for entry in entries if "trained" in entry]
    assert len(trained) == 2
    for step, prompts in enumerate(trained):
        drafts, refinements = scored[2 * step : 2 * step + 2]
        assert (len(drafts["scored"]), len(refinements["scored"])) == (4, G)
        best = drafts["scored"][drafts["rewards"].index(max(drafts["rewards"]))].strip()
        (prompt,) = set(prompts)
        assert re.match(r"(\d)\+\1\?\n", prompt)
        assert best in prompt


@pytest.mark.parametrize(
    ("name", "settings", "state"),
    [
        ("multi_turn_scheduler", {"multi_turn_scheduler": "math_tip_trick"}, {}),
        ("multi_turn_scheduler", {}, {"enable_server_multi_turn": True}),
        ("use_gym_env", {}, {"use_gym_env": True}),
        ("async_generate", {"async_generate": True}, {}),
    ],
)
def test_options_that_contradict_drafts_are_refused(
    name: str, settings: dict[str, Any], state: dict[str, Any]
) -> None:
    settings = {"multi_turn_scheduler": None, "async_generate": False} | settings
    state = {"enable_server_multi_turn": False, "use_gym_env": False} | state
    with pytest.raises(ValueError, match=f"{name} must be off"):
        _check_options(SimpleNamespace(args=SimpleNamespace(**settings), **state))


def test_bad_arguments_are_refused() -> None:
    skipping = DraftRules(failed_below=1.0, when_failed=Fallback.SKIP)
    with pytest.raises(ValueError, match=r"when_failed must not be Fallback\.SKIP"):
        use_igrpo(rules=skipping)
    with pytest.raises(ValueError, match="selection_score must be None"):
        use_igrpo(rules=DraftRules(selection_score=len))
    with pytest.raises(ValueError, match="num_drafts"):
        use_igrpo(num_drafts=0)
