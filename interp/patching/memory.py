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
from loopscope.models.core.attention import Scoring
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import site_of
from loopscope.models.core.hooks import existing_modules

_MLPS, _STREAMS = 3, 16  # tensors of the widths d_mlp and d_model that a visit holds per row
_ATTENTION = 8  # queries, keys, values and outputs, with the lanes' rows put in and without
_SCORES = 6  # scores and pattern, each as they are, masked or capped, and patched
_LOGITS = 3  # those that the head gives, those that are kept, and a metric's


def lane_bytes(
    model: LoopedModel, lanes: Lanes, cells: Sequence[Cell], width: int
) -> Int[Tensor, " lane"]:
    """The bytes of each lane: its rows, its columns in attention, and its logits.

    Args:
        cells: What the lanes patch.
        width: Columns of the inputs.
    """
    once = width * _by_column(model, cells, width) + _LOGITS * model.cfg.d_vocab
    return _size(model) * (lanes.lengths * _row(model) + once)


def answer_bytes(model: LoopedModel, base: Batch) -> int:
    """The bytes of a cell's logits at the readout, which also a cell without a lane has."""
    return _size(model) * len(base) * model.cfg.d_vocab


def run_bytes(model: LoopedModel, base: Batch, cells: Sequence[Cell]) -> int:
    """The bytes of a run of whole sequences, whose logits are made at every position."""
    by_token = _row(model) + _by_column(model, cells, base.tokens.shape[1])
    return _size(model) * base.tokens.numel() * (by_token + _LOGITS * model.cfg.d_vocab)


def _by_column(model: LoopedModel, cells: Sequence[Cell], width: int) -> int:
    """The numbers of attention per column: with the scores, where they are made one by one."""
    patched = any(HEAD_AXIS.get(site_of(name)) == 1 for cell in cells for name in cell.names)
    capped = any(
        isinstance(scoring := getattr(part, "scoring", None), Scoring) and scoring.cap is not None
        for part in existing_modules(model, points=False)
    )
    scores = _SCORES * width if patched or capped else 0
    return model.cfg.n_heads * (_ATTENTION * model.cfg.d_head + scores)


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
