"""A sharded sweep and a collection for processes of their own, which a test kills."""

from __future__ import annotations

from pathlib import Path

import torch

from loopscope import Batch, activation_patch, collect
from loopscope.interp.patching import packed
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.shards import work
from loopscope.interp.store.reading import ActivationStore
from toy import padded, projection, toy

LOOPS = 6


def texts(seed: int) -> Batch:
    """Rows enough for several files."""
    return padded(seed).repeat(8)


def sweep(folder: Path | None = None, shard: tuple[int, int] | None = None) -> Sweep:
    """The sweep; its results are written one group at a time."""
    packed._LEAST, work._EVERY = 200, 0.0
    return activation_patch(
        toy("learned"), texts(1), texts(2), projection(), LOOPS, save_to=folder, shard=shard
    )


def collection(folder: Path, shard: tuple[int, int] | None = None) -> ActivationStore:
    """The collection, in files of one example."""
    return collect(toy("learned"), texts(3), n_loops=LOOPS, to=folder, per_file=1, shard=shard)


def both(folder: Path, shard: tuple[int, int]) -> None:
    """A shard of the sweep and of the collection."""
    torch.set_num_threads(1)
    sweep(folder / "sweep", shard)
    collection(folder / "store", shard)
