"""A plugin of pytest: `IGRPOTrainer` and `IGRPOConfig` where TRL's tests name its own.

Loaded by `run.py`, with the working directory at the stand-ins. IGRPO_SUITE=trl leaves TRL's own.
"""

import os

import pytest
import torch
from trl import import_utils  # the installed one, before the clone's folder comes on the path

from igrpo_algo.trainers.trl import IGRPOConfig, IGRPOTrainer

if not torch.cuda.is_available():
    # Liger puts its Triton layers into the models' classes, for every test that comes later.
    import_utils.is_liger_kernel_available = lambda *_, **__: False


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ["IGRPO_SUITE"] == "trl":
        return
    for module in {item.module for item in session.items if isinstance(item, pytest.Function)}:
        module.GRPOTrainer, module.GRPOConfig = IGRPOTrainer, IGRPOConfig
