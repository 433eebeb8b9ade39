"""Floating-point operations of a patching sweep: what it needs, and what was executed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from loopscope.interp.common.cells import Cell
from loopscope.models.core.base import LoopedModel

_SDPA = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def causal_cone(model: LoopedModel, cells: Sequence[Cell], n_loops: int, readout: int) -> int:
    """What a sweep needs at least: for each cell every visit from the patched one and every row
    from the patched one to the readout.

    A row costs the projections and the MLP, 2 (4 d^2 + 2 d d_mlp), and attention to the keys up to
    its own, 4 d keys; of the last visit only the readout's row counts. A patch after the last
    visit, or to the right of the readout, costs nothing.

    Args:
        readout: The column at which answers are read.
    """
    cfg = model.cfg
    row = 2 * (4 * cfg.d_model**2 + 2 * cfg.d_model * cfg.d_mlp)
    visit_of = {
        name: visit.index for visit in model.schedule(n_loops) for name in visit.hook_names()
    }
    last = len(model.schedule(n_loops)) - 1
    total = 0
    for cell in cells:
        first, start = visit_of.get(cell.name, last + 1), min(cell.columns)
        if start > readout or first > last:
            continue
        whole = sum(row + 4 * cfg.d_model * (column + 1) for column in range(start, readout + 1))
        total += (last - first) * whole + row + 4 * cfg.d_model * (readout + 1)
    return total


def executed(run: Callable[[], object]) -> int:
    """What a call executes in matrix products and attention, from the shapes of every operation."""
    with FlopCounterMode(display=False, custom_mapping={_SDPA: _attention}) as counter:
        run()
    return int(counter.get_total_flops())


def _attention(
    query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any
) -> int:
    batch, heads, queries, d_head = query
    return 4 * batch * heads * queries * key[2] * d_head
