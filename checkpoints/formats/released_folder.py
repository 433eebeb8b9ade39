"""A released folder of a known family: config.json with safetensors or a pickle of tensors."""

from __future__ import annotations

from loopscope.checkpoints.formats.base import Format, Given, Located, with_loops
from loopscope.checkpoints.table import Release, load_by, recognize
from loopscope.checkpoints.tables import TABLES
from loopscope.checkpoints.weight_files import config_file, read_tensors
from loopscope.checkpoints.weights.adapters import merged
from loopscope.models.core.base import LoopedModel


def open_release(
    located: Located, release: Release, given: Given
) -> tuple[LoopedModel, str | None]:
    """A model from a release's config and tensors, by the table of its family."""
    weights, facts = located.files.weights, given.facts
    table = recognize(release, TABLES, config_file(weights))
    if given.adapter is not None:
        changed = merged(release[1], given.adapter, table.is_input_first)
        release = release[0], changed
    told = {"n_heads": facts.n_heads, "input_injection": facts.input_injection}
    options = {name: value for name, value in told.items() if value is not None}
    model = load_by(table, release, weights, {**options, **given.options}, given.ignore)
    model.cfg = with_loops(model.cfg, facts.n_loops)
    return model, table.readout


def family_of(located: Located, release: Release) -> str:
    """The family of a release."""
    return recognize(release, TABLES, config_file(located.files.weights)).family


def _is_own(located: Located) -> bool:
    return located.config is not None and "family" not in located.config


def _release(located: Located) -> Release:
    return located.config or {}, read_tensors(located.files.weights)


RELEASED_FOLDER = Format(
    _is_own,
    lambda located: family_of(located, _release(located)),
    lambda located, given: open_release(located, _release(located), given),
)
