"""The memory of a sweep's patched runs stays below `max_bytes`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loopscope.interp.common.cells import Selection, choose
from loopscope.interp.patching.lanes import lanes_of
from loopscope.interp.patching.memory import answer_bytes, cut, lane_bytes
from loopscope.interp.patching.packed import packed_groups
from paths import ROOT
from toy import LAYERS, padded, toy

LIMITS = [1 << 20, 8 << 20, 1 << 30]
CASES = {
    "attention": (20, 217, {"sites": ["z"], "heads": "all", "positions": [46]}),
    "rows": (8, 217, {"sites": ["mlp_out"], "positions": [0, 10, 20]}),
    "logits": (12, 20_000, {"positions": [45, 46]}),
    "answers": (12, 20_000, {"positions": list(range(24)), "visits": ["loops.1.blocks.1"]}),
}
MEASURE = """
import ctypes, json, sys, torch
from benchmarks.scale import inputs
from benchmarks.timing import measured, paper_size
from loopscope import activation_patch, logit_diff
from loopscope.interp.patching import packed

torch.set_num_threads(1)
packed._GROUPS = 1  # the memory alone decides how many cells run side by side
cases, limits = map(json.loads, sys.argv[1:])
found = {}
for name, (pairs, vocab, options) in cases.items():
    model = paper_size(d_model=128, n_layers=2, n_heads=4, d_vocab=vocab)
    clean, corrupted = inputs(pairs, 48, 0), inputs(pairs, 48, 1)
    metric = logit_diff(torch.full((pairs,), 3), torch.full((pairs,), 5))
    activation_patch(model, clean, corrupted, metric, 2, layers=[1], positions=[46])  # imports
    for limit in limits:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        given = model, clean, corrupted, metric, 2
        run = lambda: activation_patch(*given, max_bytes=limit, **options)
        found.setdefault(name, []).append(measured(run).peak * 2**30)
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read on Linux")
def test_patched_runs_take_no_more_than_max_bytes() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(CASES), json.dumps(LIMITS)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    print(done.stdout)
    for least, limited, free in json.loads(done.stdout).values():
        assert limited - least < LIMITS[1]
        assert free - least > LIMITS[1]  # without the limit the runs take more


@pytest.mark.parametrize("site", ["resid_pre", "pattern"])
def test_cells_run_side_by_side_as_far_as_their_lanes_fit(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loopscope.interp.patching.packed._LEAST", 1 << 30)
    model, batch = toy(), padded()
    cells = choose(model, 2, batch.tokens.shape[1], Selection(sites=[site]))
    lanes = lanes_of(model, batch, cells, 2)
    costs = lane_bytes(model, lanes, cells, batch.tokens.shape[1])
    own = costs.new_full((len(cells),), answer_bytes(model, batch)).index_add(0, lanes.cell, costs)
    most = int(own.max()) + int(own.max()) // 2
    groups = packed_groups(model, batch, cells, 2, most)
    assert [index for group in groups for index in group] == list(range(len(cells)))
    sizes = [int(own[group].sum()) for group in groups]
    assert max(sizes) <= most
    following = [int(own[group[0]]) for group in groups[1:]]
    assert all(size + more > most for size, more in zip(sizes, following, strict=False))
    assert len(packed_groups(model, batch, cells, 2, 1)) == len(cells)
    assert len(cells) == 2 * LAYERS * batch.tokens.shape[1]


def test_pieces_cost_at_most_so_much_and_are_never_empty() -> None:
    costs = torch.tensor([3, 4, 9, 1, 1, 5])
    assert [costs[part].tolist() for part in cut(costs, 7)] == [[3, 4], [9], [1, 1, 5]]
    assert list(cut(costs[:0], 7)) == []
