"""Checkpoints of the Tiny Recursive Model (SamsungSAILMontreal/TinyRecursiveModels and its kin)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.checkpoints.tables.puzzle_solvers import HARMLESS, has_level, names, sizes
from loopscope.models.families.trm import TrmConfig


def _config(
    fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]
) -> TrmConfig:
    fields.unused("H_layers")  # one network makes both states
    return TrmConfig(**sizes(fields, tensors))


TABLE = Table(
    family="trm",
    recognizes=lambda values, keys: has_level(keys, "L") and not has_level(keys, "H"),
    config=_config,
    names=lambda cfg: names({"L": ("blocks", cfg.n_layers)}),
    harmless=HARMLESS,
    readout=None,
)
