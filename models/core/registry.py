"""The families that can be built and loaded: one decorator each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig

FAMILIES: dict[str, tuple[type[LoopedConfig], type[LoopedModel]]] = {}


Model = TypeVar("Model", bound=type[LoopedModel])


def family(config: type[LoopedConfig]) -> Callable[[Model], Model]:
    """Register a model class under its config's family name."""

    def register(model: Model) -> Model:
        FAMILIES[config.family] = (config, model)
        return model

    return register


def config_from_dict(values: Mapping[str, Any]) -> LoopedConfig:
    """The config of the family that `values["family"]` names; ValueError for an unknown family."""
    name = values.get("family")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"the family must be one of {sorted(FAMILIES)}, got {name!r}")
    return FAMILIES[name][0].from_dict(values)


def build(cfg: LoopedConfig) -> LoopedModel:
    """A model of the config's family with freshly initialised weights, in eval mode."""
    return FAMILIES[cfg.family][1](cfg).eval()
