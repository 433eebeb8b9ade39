"""Checkpoints of the recursive puzzle solvers: TRM (SamsungSAILMontreal/TinyRecursiveModels) and
HRM (sapientinc/HRM), and their kin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.common.puzzle_solvers import HARMLESS, has_level, names, sizes
from loopscope.checkpoints.config_fields import ConfigFields
from loopscope.checkpoints.table import Table
from loopscope.models.families.hrm import HrmConfig
from loopscope.models.families.trm import TrmConfig


def _trm(fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]) -> TrmConfig:
    fields.unused("H_layers")  # one network makes both states
    return TrmConfig(**sizes(fields, tensors))


def _hrm(fields: ConfigFields, tensors: Mapping[str, Tensor], options: dict[str, Any]) -> HrmConfig:
    return HrmConfig(n_high_layers=fields.layers("H_layers"), **sizes(fields, tensors))


TRM = Table(
    family="trm",
    recognizes=lambda values, keys: has_level(keys, "L") and not has_level(keys, "H"),
    config=_trm,
    names=lambda cfg: names({"L": ("blocks", cfg.n_layers)}),
    harmless=HARMLESS,
    readout=None,
)
HRM = Table(
    family="hrm",
    recognizes=lambda values, keys: has_level(keys, "L") and has_level(keys, "H"),
    config=_hrm,
    names=lambda cfg: names({"L": ("low", cfg.n_layers), "H": ("high", cfg.n_high_layers)}),
    harmless=HARMLESS,
    readout=None,
)
