"""The values that an ablation writes: zeros, a mean over a reference, or another row's value.

Axes: batch pos d_model head d_head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from loopscope.interp.common.collecting import recorded
from loopscope.interp.common.columns import used_columns
from loopscope.interp.common.inputs import Inputs, in_chunks, reference_batch, rows_at_once
from loopscope.interp.common.precision import widened
from loopscope.models.basis.draws import other_rows
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

How = Literal["zero", "mean", "mean_per_position", "resample"]
Substitute = Callable[[Tensor, str], Tensor]
_CHUNK = 512  # reference rows run at a time


def zeros(value: Tensor, name: str) -> Tensor:
    return torch.zeros_like(value)


def substitute_of(
    model: LoopedModel, how: How, reference: Inputs, names: list[str], n_loops: int, seed: int
) -> Substitute:
    batch = reference_batch(model, reference)
    lengths = batch.mask.sum(1)
    if how != "mean" and bool((lengths != lengths[0]).any()):
        raise ValueError(
            f"how={how!r} needs reference rows of one length, got lengths from {int(lengths.min())}"
            f" to {int(lengths.max())}"
        )
    if how == "resample":
        return _resampled(
            _reference_values(model, batch, names, n_loops),
            other_rows(len(batch), seed).to(model.device),
        )
    if how == "mean":
        return _means(model, batch, names, n_loops)
    values = {
        name: widened(value).mean(0, keepdim=True).to(value.dtype)
        for name, value in _reference_values(model, batch, names, n_loops).items()
    }
    return _resampled(values, torch.zeros(1, dtype=torch.int64, device=model.device))


def _pieces(model: LoopedModel, batch: Batch) -> Iterator[Batch]:
    return in_chunks(batch, rows_at_once(model, batch, _CHUNK), "reference")


def _reference_values(
    model: LoopedModel, batch: Batch, names: list[str], n_loops: int
) -> dict[str, Tensor]:
    pieces = [recorded(model, part, names, n_loops) for part in _pieces(model, batch)]
    return {name: torch.cat([piece[name] for piece in pieces]) for name in names}


def _resampled(values: dict[str, Tensor], rows: Int[Tensor, " row"]) -> Substitute:
    def take(value: Tensor, name: str) -> Tensor:
        source = values[name]
        if source.shape[1:] != value.shape[1:]:
            raise ValueError(
                f"the reference is {source.shape[1]} columns wide, so the runs inside must be too,"
                f" got {value.shape[1]}"
            )
        return source[rows[torch.arange(value.shape[0], device=rows.device) % len(rows)]]

    return take


def _means(model: LoopedModel, batch: Batch, names: list[str], n_loops: int) -> Substitute:
    totals: dict[str, Tensor] = {}
    count = 0
    for part in _pieces(model, batch):
        kept = used_columns(part)
        count += int(kept.sum())
        for name, value in recorded(model, part, names, n_loops).items():
            totals[name] = totals.get(name, 0.0) + widened(value[kept]).sum(0)
    means = {name: total / count for name, total in totals.items()}
    return lambda value, name: means[name].to(value.dtype).expand_as(value)
