"""Sweeps kept in a folder: to which call the folder belongs, and which record it makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from loopscope.interp.common.cells import Cell
from loopscope.interp.common.fingerprint import described, facts_of_inputs, facts_of_model
from loopscope.interp.common.pairs import Direction, Pair
from loopscope.interp.patching.grouped import Labels, plain_labels
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.work import Results, settings_of
from loopscope.models.core.base import LoopedModel


def sweep_manifest(
    method: str,
    model: LoopedModel,
    pair: Pair,
    cells: Sequence[Cell],
    items: Sequence[Sequence[int]],
    metrics: Mapping[str, object],
    settings: Mapping[str, object],
    direction: Direction,
    labels: Labels | None = None,
) -> Manifest:
    """The manifest of a sweep.

    Args:
        items: The cells, by their index, of each work item.
        settings: The arguments that change values, besides those above.

    Raises:
        ValueError: A metric or a hook holds an object that cannot be told from others.
    """
    plain = None if labels is None else plain_labels(labels)
    return Manifest(
        method=method,
        weights=described(facts_of_model(model)),
        inputs=described(facts_of_inputs([pair.clean, pair.corrupted])),
        settings=settings_of(settings)
        | {f"metric {name}": described(metric) for name, metric in metrics.items()}
        | {"cells": described(repr(tuple(cells))), "direction": direction}
        | {"group_by": described(plain)},
        items=len(items),
        about={
            "cells": [asdict(cell) for cell in cells],
            "items": [list(item) for item in items],
            "metrics": list(metrics),
            "direction": direction,
            "labels": plain,
        },
    )


def sweep_of(
    cells: Sequence[Cell],
    metrics: Sequence[str],
    direction: Direction,
    common: Results,
    found: Sequence[Results],
    labels: Labels | None = None,
) -> Sweep:
    """The record of some cells.

    Args:
        cells: Those of the results, item by item.
        common: "base" and "source", Float[Tensor, "metric batch"], of the two runs without a patch;
            "present", Bool[Tensor, "cell batch"], of these cells.
        found: For each item "values", Float[Tensor, "metric cell batch"].
    """
    none = common["base"][:, None][:, :0]  # of a shard without cells
    values = torch.cat([none, *(each["values"] for each in found)], dim=1)
    high, low = common["source"], common["base"]
    if direction == "noise":
        high, low = low, high
    first, *others = (
        Sweep(
            tuple(cells),
            values[i],
            high[i],
            low[i],
            name,
            direction,
            present=common["present"],
            groups=labels,
        )
        for i, name in enumerate(metrics)
    )
    return replace(first, also={sweep.metric: sweep for sweep in others})


def kept_sweep(manifest: Manifest, common: Results, found: Sequence[Results]) -> Sweep:
    """The record of a whole sweep from its folder."""
    about = manifest.about
    cells = [_cell(each) for each in about["cells"]]
    direction: Direction = about["direction"]
    return sweep_of(cells, about["metrics"], direction, common, found, about["labels"])


def _cell(content: Mapping[str, Any]) -> Cell:
    lists = {name: tuple(content[name]) for name in ("also", "positions")}
    return Cell(**{**content, **lists})
