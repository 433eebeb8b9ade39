"""Work that two processes share: a sweep, a lens, a recurrence grid; each process runs all of it
and says how much it computed itself.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from loopscope.analyses.figures.answers import recurrence
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.lens.lens import Lens, logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.base import LoopedModel
from toy import BatchCentred, odd_one, padded, projection, toy

SHORT = 2
LENSES = ("logit", "readout", "single", "dependent", "resampled")


def everything() -> dict[str, dict[str, Any]]:
    """What this process finds, and how much of it the process computed itself."""
    return {
        name: method()
        for name, method in {
            "sweep": sweep,
            "one cell": one_cell,
            "grid": grid,
            "own": own_questions,
            **LENS_OF,
        }.items()
    }


def sweep() -> dict[str, Any]:
    return _sweep(sites=["resid_pre", "z"], heads=[0, 3], positions=[2, 3])


def one_cell() -> dict[str, Any]:
    return _sweep(sites=["resid_pre"], loops=[1], layers=[1], positions=[3])


def _sweep(**places: Any) -> dict[str, Any]:
    measured: list[int] = []
    metric = projection()

    def counted(logits: Tensor) -> Tensor:
        measured.append(len(logits))
        return metric(logits)

    found = activation_patch(toy("learned"), padded(1), padded(2), counted, SHORT, **places)
    return {
        "cells": found.cells,
        "values": [found.values, found.clean, found.corrupted],
        "own": len(measured) - 2,
    }


def own_questions() -> dict[str, Any]:
    """Each process asks questions of its own, with a metric of its own."""
    rank = int(os.environ.get("RANK", "0"))
    return {"sweep": questions_of(rank, 0), "metric": questions_of(0, rank)}


def questions_of(inputs: int, metric: int) -> list[Tensor]:
    """A sweep and a lens of some inputs."""
    clean, corrupted = padded(4 * inputs), padded(4 * inputs + 1)
    found = activation_patch(toy(), clean, corrupted, projection(metric), SHORT, positions=[1, 3])
    return [found.values, found.clean, logit_lens(toy(), clean, SHORT).heads_input]


def grid() -> dict[str, Any]:
    """Five questions of each hop count, of which the two processes run two and three."""
    begin, rows = LoopedModel.begin, []

    def counted(model: LoopedModel, tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(tokens))
        return begin(model, tokens, *arguments, **options)

    LoopedModel.begin = counted
    try:
        found = recurrence.run(
            recurrence.RecurrenceConfig(checkpoint="ltg_trained", n_loops=6, per_hop=5)
        )
    finally:
        LoopedModel.begin = begin
    return {
        "values": [found.accuracy, found.halted, found.halted_loops],
        "sizes": (found.hops, found.questions),
        "own": rows,
    }


def _lens(model: LoopedModel, read: Callable[[LoopedModel], Lens]) -> dict[str, Any]:
    begin, rows = model.begin, []

    def counted(tokens: Tensor, *arguments: Any, **options: Any) -> Any:
        rows.append(len(tokens))
        return begin(tokens, *arguments, **options)

    model.begin = counted
    lens = read(model)
    return {
        "values": [lens.heads_input, lens.logits, lens.entropy()],
        "reads": torch.stack([lens.example, lens.position]),
        "own": rows,
    }


def resampled(model: LoopedModel) -> Lens:
    """A hook that gives each row the value of a reference row, and so must see all of them."""
    with ablate(model, Component("mlp"), how="resample", reference=padded(3, (7, 7, 7))):
        return logit_lens(model, padded(1), keep_logits=True)


LENS_OF: dict[str, Callable[[], dict[str, Any]]] = {
    "logit": lambda: _lens(
        toy(), lambda model: logit_lens(model, padded(1), positions="all", keep_logits=True)
    ),
    "readout": lambda: _lens(
        toy(injection=True),
        lambda model: readout_lens(model, padded(1), keep_logits=True, batch_size=1),
    ),
    "single": lambda: _lens(
        toy(), lambda model: readout_lens(model, padded(1, (5,)), keep_logits=True)
    ),
    "dependent": lambda: _lens(
        odd_one(BatchCentred), lambda model: logit_lens(model, padded(1), keep_logits=True)
    ),
    "resampled": lambda: _lens(toy(), resampled),
}
