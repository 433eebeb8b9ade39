"""The project's own format: model.safetensors with a config.json that names the family."""

from __future__ import annotations

from loopscope.checkpoints.contents import Contents
from loopscope.checkpoints.errors import CheckpointError, config_errors, shown
from loopscope.checkpoints.fill import build_from
from loopscope.checkpoints.formats.base import Format, Given, Located, with_loops
from loopscope.checkpoints.weight_files import read_tensors
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import FAMILIES, config_from_dict


def _is_own(located: Located) -> bool:
    config = located.config
    return (
        located.files.weights.suffix == ".safetensors" and config is not None and "family" in config
    )


def _open(located: Located, given: Given) -> tuple[LoopedModel, str | None]:
    given.refuse_options(located)
    weights = located.files.weights
    config_file = weights.with_name("config.json")
    values, tensors = located.config or {}, read_tensors(weights)
    Contents.of(tensors).check_ours(config_file, values)
    with config_errors(config_file):
        cfg = config_from_dict({**values, "family": _family(located)})
    for name in ("n_heads", "input_injection"):
        told, recorded = getattr(given.facts, name), getattr(cfg, name, None)
        if told not in (None, recorded):
            raise CheckpointError(f"{config_file} says {name}={recorded}, but {told} was passed")
    return build_from(with_loops(cfg, given.facts.n_loops), tensors, None, weights), None


def _family(located: Located) -> str:
    name = (located.config or {})["family"]
    if not isinstance(name, str):
        path = located.files.weights.with_name("config.json")
        raise CheckpointError(
            f"{path}: the family must be one of {sorted(FAMILIES)}, got {shown(name)}"
        )
    return name


OWN = Format(_is_own, _family, _open)
