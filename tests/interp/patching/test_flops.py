"""What a sweep needs and executes, by hand and on a shipped checkpoint."""

from __future__ import annotations

import pytest
import torch

from benchmarks.flops import causal_cone, executed
from loopscope.checkpoints.load import load
from loopscope.interp.common.cells import Cell
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_MLP, D_MODEL, LAYERS, random_tokens

ROW = 2 * (4 * D_MODEL**2 + 2 * D_MODEL * D_MLP)
KEY = 4 * D_MODEL


def cell(name: str, position: int) -> Cell:
    return Cell(name, "site", 0, 0, position, None)


@pytest.mark.parametrize(
    ("name", "position", "expected"),
    [
        (
            "loops.1.blocks.1.hook_resid_pre",
            3,
            ROW + 6 * KEY,
        ),  # the last visit: the row that is read
        ("loops.1.blocks.0.hook_resid_pre", 4, (ROW + 5 * KEY) + 2 * (ROW + 6 * KEY)),
        ("loops.1.blocks.0.hook_resid_pre", 5, 2 * (ROW + 6 * KEY)),
        ("loops.1.blocks.0.hook_resid_pre", 6, 0),  # to the right of the readout
        ("ln_final.hook_normalized", 5, 0),
    ],
)
def test_causal_cone_by_hand(
    name: str, position: int, expected: int, plain: RecurrentDepth
) -> None:
    assert causal_cone(plain, [cell(name, position)], 2, readout=5) == expected
    assert causal_cone(plain, [cell(name, position)] * 3, 2, readout=5) == 3 * expected


def test_executed_operations_of_a_forward(plain: RecurrentDepth) -> None:
    tokens = random_tokens(batch=1, pos=6)
    head = 2 * 6 * D_MODEL * plain.cfg.d_vocab
    with torch.no_grad():
        assert executed(lambda: plain(tokens, n_loops=2)) == 2 * LAYERS * 6 * (ROW + 6 * KEY) + head


@pytest.mark.parametrize(("site", "heads"), [("resid_pre", None), ("z", "all")])
@pytest.mark.slow
def test_a_sweep_executes_at_most_a_quarter_more_than_it_needs(
    site: str, heads: str | None
) -> None:
    model, hops = load("mini/multi_hop/r_dyn"), 10
    tokens = torch.randint(
        1, model.cfg.d_vocab, (2, hops + 1), generator=torch.Generator().manual_seed(0)
    )
    clean, corrupted = (
        Batch(row[None], torch.ones_like(row[None]), torch.tensor([hops])) for row in tokens
    )
    metric = logit_diff(torch.tensor([3]), torch.tensor([5]))
    cells = activation_patch(model, clean, corrupted, metric, 8, sites=site, heads=heads).cells
    done = executed(
        lambda: activation_patch(model, clean, corrupted, metric, 8, sites=site, heads=heads)
    )
    assert 1.0 < done / causal_cone(model, cells, 8, hops) <= 1.25
