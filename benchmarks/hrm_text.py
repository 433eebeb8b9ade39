"""A random HRM-Text of transformers, and this library's model of the same weights."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from loopscope.checkpoints.load import load
from loopscope.models.core.base import LoopedModel


def random_pair(high: int, low: int, **sizes: int) -> tuple[Any, LoopedModel]:
    """Both models with `high` cycles of `low` runs of the low stack and one of the high stack.

    Args:
        sizes: Further fields of transformers' config.
    """
    from transformers import HrmTextConfig, HrmTextForCausalLM

    torch.manual_seed(0)
    config = HrmTextConfig(
        **sizes, max_position_embeddings=32, H_cycles=high, L_cycles=low, initializer_range=0.2
    )
    theirs = HrmTextForCausalLM(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, load(folder)
