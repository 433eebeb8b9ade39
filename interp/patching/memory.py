"""How much memory patched runs take, which decides how many of them run side by side.

These are upper estimates of what a run holds at once. The two runs without a patch come on top:
they are kept for all cells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.interp.common.cells import HEAD_AXIS, Cell
from loopscope.interp.patching.lanes import Lanes
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of

_MLPS, _STREAMS = 3, 16  # tensors of the widths d_mlp and d_model that a visit holds per row
_ATTENTION = 8  # queries, keys, values and outputs, with the lanes' rows put in and without
_SCORES = 4  # scores and pattern, each as they are and patched
_LOGITS = 3  # those that the head gives, those that are kept, and a metric's


def lane_bytes(
    model: LoopedModel, lanes: Lanes, cells: Sequence[Cell], width: int
) -> Int[Tensor, " lane"]:
    """The bytes of each lane: its rows, its columns in attention, and its logits.

    Args:
        cells: What the lanes patch.
        width: Columns of the inputs.
    """
    cfg = model.cfg
    by_column = _ATTENTION * cfg.n_heads * cfg.d_head
    if any(HEAD_AXIS.get(site_of(name)) == 1 for cell in cells for name in cell.names):
        by_column += _SCORES * cfg.n_heads * width
    once = width * by_column + _LOGITS * cfg.d_vocab
    return _size(model) * (lanes.lengths * _row(model) + once)


def run_bytes(model: LoopedModel, base: Batch) -> int:
    """The bytes of a run of whole sequences, whose logits are made at every position."""
    return _size(model) * base.tokens.numel() * (_row(model) + _LOGITS * model.cfg.d_vocab)


def cut(costs: Int[Tensor, " lane"], most: int) -> Iterator[slice]:
    """Pieces that cost at most `most`, but have at least one entry."""
    ends = costs.cumsum(0).cpu()
    first = 0
    while first < len(costs):
        done = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(torch.searchsorted(ends, done + most, right=True)))
        yield slice(first, last)
        first = last


def _row(model: LoopedModel) -> int:
    return _MLPS * model.cfg.d_mlp + _STREAMS * model.cfg.d_model


def _size(model: LoopedModel) -> int:
    return next(model.parameters()).element_size()
