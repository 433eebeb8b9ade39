"""Checkpoints of the Hierarchical Reasoning Model (sapientinc/HRM and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.puzzle_solvers import HARMLESS, has_level, names, sizes
from loopscope.models.families.hrm import HrmConfig


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> HrmConfig:
    return HrmConfig(n_high_layers=fields.layers("H_layers"), **sizes(fields, tensors))


TABLE = Table(
    family="hrm",
    recognizes=lambda values, keys: has_level(keys, "L") and has_level(keys, "H"),
    config=_config,
    names=lambda cfg: names({"L": ("low", cfg.n_layers), "H": ("high", cfg.n_high_layers)}),
    harmless=HARMLESS,
    readout=None,
)
