"""The project's own format: model.safetensors with a config.json that names the family."""

from __future__ import annotations

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fill import build_from
from loopscope.checkpoints.formats.base import Format, Given, Located, with_loops
from loopscope.checkpoints.weight_files import read_tensors
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import config_from_dict


def _is_own(located: Located) -> bool:
    config = located.config
    return (
        located.files.weights.suffix == ".safetensors" and config is not None and "family" in config
    )


def _open(located: Located, given: Given) -> tuple[LoopedModel, str | None]:
    given.refuse_options(located)
    weights = located.files.weights
    config_file = weights.with_name("config.json")
    try:
        cfg = config_from_dict(located.config or {})
    except ValueError as error:
        raise CheckpointError(f"{config_file}: {error}") from None
    for name in ("n_heads", "input_injection"):
        told, recorded = getattr(given.facts, name), getattr(cfg, name, None)
        if told not in (None, recorded):
            raise CheckpointError(f"{config_file} says {name}={recorded}, but {told} was passed")
    tensors = read_tensors(weights)
    return build_from(with_loops(cfg, given.facts.n_loops), tensors, None, weights), None


OWN = Format(_is_own, lambda located: str((located.config or {})["family"]), _open)
