# Copied word for word from nemo_rl/distributed/batched_data_dict.py of NeMo-RL 0.6.0 at 7ea279abf6, without docstrings and without
# what is not compared. Copyright (c) 2025, NVIDIA CORPORATION. Licensed under the Apache License,
# Version 2.0: see LICENSE.
from __future__ import annotations

from collections import UserDict
from copy import deepcopy
from typing import Any, Generic, Mapping, NamedTuple, Optional, TypeVar, Union

import torch
from torch import Tensor
from typing_extensions import Self

DictT = TypeVar("DictT", bound=Mapping[str, Any])
MetadataT = TypeVar("MetadataT")


class PackedTensor:
    pass  # images, which no test has


class BatchedDataDict(UserDict, Generic[DictT]):

    def repeat_interleave(
        self,
        num_repeats: int,
        *,
        share_immutable_media: bool = False,
    ) -> Self:
        repeated_batch: Self = type(self)()
        for k, v in self.data.items():
            if torch.is_tensor(v):
                # For tensors, use repeat_interleave to repeat each element
                repeated_batch[k] = v.repeat_interleave(num_repeats, dim=0)
            elif isinstance(v, PackedTensor):
                raise NotImplementedError(
                    "PackedTensor does not currently support repeat_interleave"
                )
            else:
                # For lists or other sequences, use a list comprehension to repeat each element
                repeated_items = []
                for item in v:
                    shared_leaves = (
                        _prepare_multimodal_sharing(
                            item,
                            media_context=k in NATIVE_MULTIMODAL_KEYS,
                        )
                        if share_immutable_media
                        else {}
                    )
                    repeated_items.extend(
                        deepcopy(item, dict(shared_leaves)) for _ in range(num_repeats)
                    )
                repeated_batch[k] = repeated_items
        return repeated_batch

    @property
    def size(self) -> int:
        # Get the first key and use its size as the batch size
        # This assumes all keys have the same batch size
        if not self.data:
            return 0
        key = next(iter(self.data))
        if not torch.is_tensor(self.data[key]):
            return len(self.data[key])
        return self.data[key].shape[0]  # type: ignore # it's a tensor here

    def select_indices(self, indices: Union[list[int], torch.Tensor]) -> Self:
        selected_batch: Self = type(self)()
        for k, v in self.data.items():
            if torch.is_tensor(v):
                selected_batch[k] = v[indices]
            elif isinstance(v, PackedTensor):
                selected_batch[k] = v.slice(indices)
            elif isinstance(v, list):
                selected_batch[k] = [v[i] for i in indices]
            else:
                # Handle other potential types if necessary, or raise error
                raise TypeError(
                    f"Unsupported type {type(v)} for index selection in BatchedDataDict"
                )
        return selected_batch


class EnvironmentReturn(NamedTuple, Generic[MetadataT]):

    observations: list[dict[str, str]]
    metadata: list[MetadataT]
    next_stop_strings: list[list[str] | None] | list[None]
    rewards: (
        Tensor | dict[str, Tensor]
    )  ## Tensor[B] for single-reward, dict of {name: Tensor[B]} for multi-reward (e.g. GDPO)
    terminateds: Tensor
    answers: list[str | None] | None
