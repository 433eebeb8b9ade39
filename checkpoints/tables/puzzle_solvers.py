"""Checkpoints of the recursive puzzle solvers: TRM (SamsungSAILMontreal/TinyRecursiveModels) and
HRM (sapientinc/HRM), and their kin.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.checkpoints.fields.puzzle_solvers import HARMLESS, has_level, names, sizes
from loopscope.checkpoints.table import Table
from loopscope.models.families.puzzle_solvers.hrm import HrmConfig
from loopscope.models.families.puzzle_solvers.trm import TrmConfig


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
    releases=(
        ("Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-mlp", "81 cells; an MLP along positions"),
        ("Sanjin2024/TinyRecursiveModels-Sudoku-Extreme-att", "81 cells; attention"),
        ("Sanjin2024/TinyRecursiveModel-Maze-Hard", "mazes of 30 x 30 cells"),
        ("Sanjin2024/TinyRecursiveModels-ARC-AGI-1", "1.8 GB, most of it puzzle vectors"),
        ("Sanjin2024/TinyRecursiveModels-ARC-AGI-2", "2.5 GB, most of it puzzle vectors"),
        ("arcprize/trm_arc_prize_verification", "folders arc_v1_public and arc_v2_public"),
    ),
)
HRM = Table(
    family="hrm",
    recognizes=lambda values, keys: has_level(keys, "L") and has_level(keys, "H"),
    config=_hrm,
    names=lambda cfg: names({"L": ("low", cfg.n_layers), "H": ("high", cfg.n_high_layers)}),
    harmless=HARMLESS,
    readout=None,
    releases=(
        ("sapientinc/HRM-checkpoint-sudoku-extreme", "81 cells"),
        ("sapientinc/HRM-checkpoint-maze-30x30-hard", "mazes of 30 x 30 cells"),
        ("sapientinc/HRM-checkpoint-ARC-2", "grids of ARC-AGI-2"),
    ),
)
