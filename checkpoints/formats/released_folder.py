"""A released folder of a known family: config.json with safetensors or a pickle of tensors."""

from __future__ import annotations

from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.formats.base import Format, Given, Located, with_loops
from loopscope.checkpoints.pickles import read_pickle
from loopscope.checkpoints.table import Release, load_by, recognize
from loopscope.checkpoints.tables import TABLES
from loopscope.checkpoints.weight_files import plain_weights, read_tensors
from loopscope.models.core.base import LoopedModel


def open_release(
    located: Located, release: Release, given: Given
) -> tuple[LoopedModel, str | None]:
    """A model from a release's config and tensors, by the table of its family."""
    weights, facts = located.files.weights, given.facts
    table = recognize(release, TABLES, weights.with_name("config.json"))
    told = {"n_heads": facts.n_heads, "input_injection": facts.input_injection}
    options = {name: value for name, value in told.items() if value is not None}
    model = load_by(table, release, weights, {**options, **given.options}, given.ignore)
    model.cfg = with_loops(model.cfg, facts.n_loops)
    return model, table.readout


def family_of(located: Located, release: Release) -> str:
    """The family of a release."""
    return recognize(release, TABLES, located.files.weights.with_name("config.json")).family


def _is_own(located: Located) -> bool:
    return located.config is not None and "family" not in located.config


def _release(located: Located) -> Release:
    weights, values = located.files.weights, located.config or {}
    if weights.suffix in (".safetensors", ".json"):
        return values, read_tensors(weights)
    content = read_pickle(weights)
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{weights} must hold tensors by name, got {shown(sorted(map(str, content)))}"
        )
    return values, plain_weights(content, weights)


RELEASED_FOLDER = Format(
    _is_own,
    lambda located: family_of(located, _release(located)),
    lambda located, given: open_release(located, _release(located), given),
)
