"""The families that can be built and loaded: one decorator each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig

FAMILIES: dict[str, tuple[type[LoopedConfig], type[LoopedModel]]] = {}
REQUIRED = ("plan", "edge_sites", "embed", "unembed")
FACTS = ("causal", "prefix_readout", "batch_independent", "rowwise", "additive_residual")


Model = TypeVar("Model", bound=type[LoopedModel])


def register(config: type[LoopedConfig]) -> Callable[[Model], Model]:
    """Make a model class a family: a class decorator that registers it under the family name of its
    config.

    A registered family is built, saved and loaded by its name, and every method takes its models.
    `check_family` tests the facts that the class declares.

    Args:
        config: The config of the family: a frozen dataclass that extends `LoopedConfig`.

    Returns:
        The decorator, which returns the class unchanged.

    Raises:
        TypeError: The config or the class lacks something that a family must have.
        ValueError: The family name is empty, or another family has it.
    """

    def add(model: Model) -> Model:
        _check_declared(config, model)
        FAMILIES[config.family] = (config, model)
        return model

    return add


family = register  # how the project's own families call it


def _check_declared(config: type[LoopedConfig], model: type[LoopedModel]) -> None:
    """Raise where a config or a class lacks what a family must have."""
    for kind, base in ((config, LoopedConfig), (model, LoopedModel)):
        if not (isinstance(kind, type) and issubclass(kind, base)):
            raise TypeError(f"a family needs a class that extends {base.__name__}, got {kind!r}")
    _check_name(config, model)
    missing = [name for name in REQUIRED if getattr(model, name) is getattr(LoopedModel, name)]
    if missing:
        raise TypeError(f"a family must define {', '.join(missing)}, which {model.__name__} lacks")
    for fact in FACTS:
        value = getattr(model, fact)
        if not isinstance(value, bool | property):
            raise TypeError(f"{model.__name__}.{fact} must be True or False, got {value!r}")


def _check_name(config: type[LoopedConfig], model: type[LoopedModel]) -> None:
    """Raise where a family's name is empty or another family's."""
    if not config.family:
        raise ValueError(
            f"{config.__name__} must name its family; add `family: ClassVar[str] = ...` to it"
        )
    known = FAMILIES.get(config.family)
    if known is not None and known[1].__qualname__ != model.__qualname__:
        raise ValueError(
            f"a family's name must be its own, but {config.family!r} is {known[1].__name__}; give"
            f" {config.__name__} another `family`"
        )


def config_from_dict(values: Mapping[str, Any]) -> LoopedConfig:
    """The config of the family that `values["family"]` names; ValueError for an unknown family."""
    name = values.get("family")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"the family must be one of {sorted(FAMILIES)}, got {name!r}")
    return FAMILIES[name][0].from_dict(values)


def build(cfg: LoopedConfig) -> LoopedModel:
    """A model of the config's family with freshly initialised weights, in eval mode; ValueError for
    a config whose family is not registered (that of a wrapped module is none).
    """
    if cfg.family not in FAMILIES:
        raise ValueError(
            f"a model that is built or saved needs a registered family, got {cfg.family!r};"
            " register its class with loopscope.register"
        )
    return FAMILIES[cfg.family][1](cfg).eval()
