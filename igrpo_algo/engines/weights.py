"""Weights for an engine: read lazily from a folder, and compared before any is used.

An engine gets all of its weights or none. So names and shapes are compared with those that it
wants before it sees the first tensor. A tied weight may come under any of its names and is handed
on under all of them: engines differ in which one they read.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from igrpo_kernels.checks import describe

Weights = Mapping[str, Tensor]


class FolderWeights(Mapping[str, Tensor]):
    """The tensors of a folder's `*.safetensors` files, each read when it is asked for.

    Raises:
        FileNotFoundError: The folder holds no safetensors file, or not all that its index names.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).resolve()
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = sorted(path.name for path in self.folder.glob("*.safetensors"))
        self.files = [self.folder / name for name in names]
        if not self.files:
            raise FileNotFoundError(f"weights: no safetensors file in {folder}")
        self._home: dict[str, Path] = {}
        self.shapes: dict[str, list[int]] = {}
        for path in self.files:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118
                    self._home[name] = path
                    self.shapes[name] = list(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self._home[name], "pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)


@dataclass(frozen=True)
class WantedWeights:
    """What a model must be given.

    Attributes:
        shapes: Shape of each weight by name, tied ones under all of their names.
        tied: For each further name of a tied weight, the name that it stands for.
    """

    shapes: Mapping[str, list[int]]
    tied: Mapping[str, str]

    @classmethod
    def of_state_dict(cls, own: Weights) -> "WantedWeights":
        """Read them off the weights that a live model has; shared memory means tied."""
        first: dict[tuple[int, torch.Size], str] = {}
        tied = {}
        for name, tensor in own.items():
            twin = first.setdefault((tensor.data_ptr(), tensor.shape), name)
            if twin != name:
                tied[name] = twin
        return cls({name: list(tensor.shape) for name, tensor in own.items()}, tied)

    @classmethod
    def of_model(cls, model: str, config: Any = None) -> "WantedWeights":
        """Read them off a model's files, or off its config where it has no safetensors.

        Args:
            model: A folder, or a repository's name whose files are in the hub's local cache.
            config: The model's `PretrainedConfig`; None reads the one among the files.
        """
        import transformers

        config = transformers.AutoConfig.from_pretrained(model) if config is None else config
        kind = getattr(transformers, config.architectures[0])
        try:
            shapes = dict(FolderWeights(_local_folder(model)).shapes)
        except FileNotFoundError:
            with torch.device("meta"):
                bare = kind(config)
            shapes = {name: list(tensor.shape) for name, tensor in bare.state_dict().items()}
        if not config.get_text_config().tie_word_embeddings:
            return cls(shapes, {})
        tied = {alias: name for alias, name in kind._tied_weights_keys.items() if name in shapes}
        return cls({**shapes, **{alias: shapes[name] for alias, name in tied.items()}}, tied)

    def check(self, new: Weights) -> None:
        """Raise unless `new` holds each weight under at least one of its names, and nothing else.

        Raises:
            ValueError: A weight is missing, unknown or of another shape, or comes under two names
                with different values.
        """
        if unknown := sorted(new.keys() - self.shapes.keys()):
            raise ValueError(f"weights holds {len(unknown)} unknown names: {unknown[:5]}")
        for name, shape in _shapes_of(new).items():
            if shape != self.shapes[name]:
                raise ValueError(
                    f"weights[{name!r}] must have shape {self.shapes[name]}, got {shape}"
                )
        given: dict[str, str] = {}
        for name in sorted(new, key=lambda name: name in self.tied):
            twin = given.setdefault(self.tied.get(name, name), name)
            if twin != name and not torch.equal(new[twin].to(new[name].device), new[name]):
                raise ValueError(f"weights[{twin!r}] and weights[{name!r}] are tied but differ")
        if missing := [name for name in self.shapes if self.tied.get(name, name) not in given]:
            raise ValueError(f"weights lacks {len(missing)} names: {missing[:5]}")

    def absent(self, new: Weights) -> dict[str, str]:
        """Name the tied weights that `new` lacks under one name, and a name that it has."""
        families = [(alias, name) for alias, name in self.tied.items()]
        pairs = [*families, *((name, alias) for alias, name in families)]
        return {lacked: held for lacked, held in pairs if lacked not in new and held in new}

    def complete(self, new: Weights) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight under each of its names."""
        for name in new:
            yield name, new[name].detach()
        for lacked, held in self.absent(new).items():
            yield lacked, new[held].detach()


def open_weights(weights: Weights | str | os.PathLike[str]) -> Weights:
    """Take a state dict as it is, a folder as its tensors.

    Raises:
        TypeError: It is neither, or a value of the state dict is not a whole tensor.
        FileNotFoundError: The folder holds no safetensors file.
    """
    if isinstance(weights, FolderWeights):
        return weights
    if isinstance(weights, Mapping):
        for name, value in weights.items():
            _check_whole(name, value)
        return weights
    if isinstance(weights, str | os.PathLike):
        return FolderWeights(Path(weights))
    raise TypeError(f"weights must be a state dict or a folder, got {type(weights).__name__}")


@contextmanager
def as_folder(wanted: WantedWeights, new: Weights, parent: Path) -> Iterator[Path]:
    """Provide a folder of safetensors that holds each weight under each of its names.

    A complete folder serves as it is. Otherwise a new one is made in `parent` and removed
    afterwards; files of an incomplete folder are linked there, not copied.
    """
    if isinstance(new, FolderWeights) and not wanted.absent(new):
        yield new.folder
        return
    with TemporaryDirectory(prefix=".igrpo-weights-", dir=parent) as name:
        folder = Path(name)
        if isinstance(new, FolderWeights):
            for path in new.files:
                (folder / path.name).symlink_to(path)
            rest = {lacked: new[held] for lacked, held in wanted.absent(new).items()}
            save_file(rest, folder / "tied.safetensors")
        else:
            save_file(_apart(dict(wanted.complete(new))), folder / "model.safetensors")
        folder.chmod(0o755)  # the engine may run as another user
        yield folder


def _check_whole(name: str, value: object) -> None:
    """Raise unless a value is a tensor with all of its numbers in this process."""
    if not isinstance(value, Tensor):
        raise TypeError(f"weights[{name!r}] must be a tensor, got {describe(value)}")
    if hasattr(value, "full_tensor"):  # a DTensor, as FSDP2 leaves it
        raise TypeError(
            f"weights[{name!r}] is sharded: gather it with full_tensor(), or take the state dict "
            "with torch.distributed.checkpoint.state_dict.StateDictOptions(full_state_dict=True)"
        )
    if value.is_meta:
        raise TypeError(f"weights[{name!r}] is on the meta device and has no numbers")


def _apart(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give each tensor memory of its own, as safetensors requires."""
    seen: set[int] = set()
    for name, tensor in weights.items():
        own = tensor.contiguous()
        weights[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return weights


def _shapes_of(new: Weights) -> dict[str, list[int]]:
    if isinstance(new, FolderWeights):
        return new.shapes
    return {name: list(tensor.shape) for name, tensor in new.items()}


def _local_folder(model: str) -> Path:
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model, local_files_only=True))


def memory_folder() -> Path:
    """Return a folder in this machine's memory, or where it has none, its temporary folder."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(gettempdir())
