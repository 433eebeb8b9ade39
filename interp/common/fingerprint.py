"""A fingerprint of all that a result depends on, so that a file made for another model or call is
refused."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from loopscope.interp.common.cells import Cell
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.tokens import Batch


def fingerprint(
    model: LoopedModel, cells: Sequence[Cell], batches: Sequence[Batch], options: tuple[object, ...]
) -> str:
    """What decides a sweep's values: weights, configuration, cells, inputs and options."""
    digest = hashlib.sha256(repr((model.cfg, tuple(cells), options)).encode())
    given = [value for batch in batches for value in batch.options.values()]
    digest.update(repr([value for value in given if not isinstance(value, Tensor)]).encode())
    inputs = [x for batch in batches for x in (batch.tokens, batch.mask, batch.readout)]
    for tensor in (
        *model.state_dict().values(),
        *inputs,
        *(value for value in given if isinstance(value, Tensor)),
    ):
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
