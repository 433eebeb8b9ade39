"""The released pickles of "Loop, Think, & Generalize": weights alone, without a config."""

from __future__ import annotations

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.fill import build_from
from loopscope.checkpoints.formats.base import Format, Given, Located
from loopscope.checkpoints.formats.whole_pickle import unpacked
from loopscope.checkpoints.release import ReleaseFacts, infer_config, key_names, state_dict_of
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepthConfig


def _is_own(located: Located) -> bool:
    return located.pickle is not None and unpacked(located) is None


def _facts(located: Located, given: ReleaseFacts) -> ReleaseFacts:
    """The facts that the caller gave, completed by the card and by the names of the folders."""
    files, merged = located.files, {}
    for name in ("n_heads", "input_injection", "n_loops"):
        known = (getattr(given, name), located.card.get(name), getattr(files.layout, name))
        merged[name] = next((value for value in known if value is not None), None)
        if not isinstance(merged[name], int | None):
            raise CheckpointError(f"{files.card}: {name} must be a number, got {merged[name]!r}")
    return ReleaseFacts(**merged)


def _open(located: Located, given: Given) -> tuple[LoopedModel, str | None]:
    given.refuse_options(located)
    files = located.files
    tensors = state_dict_of(located.pickle or {}, files.weights)
    cfg = infer_config(tensors, files.weights, _facts(located, given.facts))
    if files.n_layers not in (None, cfg.n_layers):
        raise CheckpointError(
            f"{files.weights}: the folder name promises {files.n_layers} layers, but the file holds"
            f" {cfg.n_layers}"
        )
    return build_from(cfg, tensors, key_names(cfg.n_layers), files.weights), files.readout


PAPER = Format(_is_own, lambda located: RecurrentDepthConfig.family, _open)
