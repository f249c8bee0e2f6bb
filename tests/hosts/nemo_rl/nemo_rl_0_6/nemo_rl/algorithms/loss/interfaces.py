# Copied word for word from nemo_rl/algorithms/loss/interfaces.py of NeMo-RL 0.6.0 at 7ea279abf6, without docstrings and without
# what is not compared. Copyright (c) 2025, NVIDIA CORPORATION. Licensed under the Apache License,
# Version 2.0: see LICENSE.
from __future__ import annotations

import enum


class LossType(enum.Enum):
    TOKEN_LEVEL = "token_level"
    SEQUENCE_LEVEL = "sequence_level"


class MetricNormalizer(enum.Enum):

    TOKENS = "tokens"  # divided by global_valid_toks
    SEQUENCES = "sequences"  # divided by global_valid_seqs
    NONE = "none"  # not normalized: raw counts, local means, min/max


class LossInputType(enum.Enum):
    LOGIT = "logit"
    LOGPROB = "logprob"
    DISTILLATION = "distillation"
    DISTILLATION_CROSS_TOKENIZER = "distillation_cross_tokenizer"
    DRAFT = "draft"
