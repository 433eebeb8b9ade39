"""Fair timing on a noisy machine, where candidates take turns and the minimum counts; and the most
memory that a call holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import RecurrentDepthConfig

GIB = 2**30


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


@dataclass(frozen=True)
class Measured:
    """The result of a call, its seconds, and the GiB that it held at most beyond the start."""

    result: Any
    seconds: float
    peak: float


def measured(job: Callable[[], object]) -> Measured:
    """Run a call; the peak is that of the process's resident memory, as Linux counts it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start, started = _resident("VmRSS"), time.perf_counter()
    result = job()
    seconds = time.perf_counter() - started
    return Measured(result, seconds, _resident("VmHWM") - start)


def _resident(field: str) -> float:
    """A field of the process's status in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = [each for each in lines if each.startswith(f"{field}:")]
    return int(line.split()[1]) * 1024 / GIB
