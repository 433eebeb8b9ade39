"""Fair timing on a noisy machine: candidates take turns, and the minimum counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import RecurrentDepthConfig


def interleaved(candidates: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each candidate: the minimum over `rounds`, after one warm-up of each, in turns."""
    for run in candidates.values():
        run()
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def paper_size(
    d_model: int = 768, n_layers: int = 4, n_heads: int = 12, d_vocab: int = 217
) -> LoopedModel:
    """A NoPE model of the multi-hop releases' size with random weights."""
    torch.manual_seed(0)
    return build(
        RecurrentDepthConfig(
            n_layers=n_layers, d_model=d_model, n_heads=n_heads, d_mlp=4 * d_model, d_vocab=d_vocab
        )
    )
