"""Processes that are killed at random moments lose nothing and leave nothing wrong."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from killed_work import collection, sweep
from loopscope import merge
from loopscope.interp.patching.sweep import Sweep
from paths import HELPERS

KILLS = 20


def started(folder: Path, shard: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(HELPERS / "killed_work.py"), str(folder), str(shard), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.slow
def test_twenty_kills_of_a_sweep_and_a_collection_change_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopscope.interp.patching.packed._LEAST", 200)
    moments, cut = random.Random(0), 0
    for kill in range(KILLS):
        process = started(tmp_path / "killed", kill % 2)
        time.sleep(moments.uniform(0.0, 0.25))
        process.kill()
        cut += process.wait() == -9
        assert process.stdout is not None
        process.stdout.close()
    for shard in range(2):
        with started(tmp_path / "killed", shard) as process:
            assert process.stdout is not None
            assert process.stdout.read() == "done\n"
    assert cut >= KILLS // 2
    merged, whole = merge(tmp_path / "killed" / "sweep"), sweep()
    assert isinstance(merged, Sweep)
    assert merged.cells == whole.cells
    assert torch.equal(merged.values, whole.values)
    store, alone = merge(tmp_path / "killed" / "store"), collection(tmp_path / "alone")
    assert torch.equal(store.read().values, alone.read().values)  # type: ignore[union-attr]
    assert torch.equal(store.tokens, alone.tokens)  # type: ignore[union-attr]
