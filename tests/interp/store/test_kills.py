"""Processes that are killed at random moments lose nothing and leave nothing wrong."""

from __future__ import annotations

import multiprocessing
import random
import time
from pathlib import Path

import pytest
import torch

from killed_work import both, collection, sweep
from loopscope import ActivationStore, merge
from loopscope.interp.patching.sweep import Sweep

KILLS = 20


def written(folder: Path) -> int:
    """The files with results."""
    return len(list(folder.rglob("*.safetensors")))


@pytest.mark.slow
def test_twenty_kills_of_a_sweep_and_a_collection_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopscope.interp.patching.packed._LEAST", 200)
    context, moments, cut = multiprocessing.get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(["killed_work"])
    folder, left = tmp_path / "killed", []
    for kill in range(KILLS):
        process = context.Process(target=both, args=(folder, (kill % 2, 2)))
        process.start()
        if kill % 4:  # after it has written something, however slow the machine is
            while process.is_alive() and written(folder) == (left[-1] if left else 0):
                time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.005 if kill % 4 else 0.3))
        process.kill()
        process.join()
        cut += process.exitcode == -9
        left.append(written(folder))
    for shard in range(2):
        process = context.Process(target=both, args=(folder, (shard, 2)))
        process.start()
        process.join()
        assert process.exitcode == 0
    assert cut >= KILLS // 2
    assert len(set(left)) > 2  # some of them had written something
    merged, whole = merge(folder / "sweep"), sweep()
    assert isinstance(merged, Sweep)
    assert merged.cells == whole.cells
    assert torch.equal(merged.values, whole.values)
    store, alone = ActivationStore(folder / "store"), collection(tmp_path / "alone")
    assert torch.equal(store.read().values, alone.read().values)
    assert torch.equal(store.tokens, alone.tokens)
