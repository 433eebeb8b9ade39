"""The released pickles of "Loop, Think, & Generalize": weights alone, without a config."""

from __future__ import annotations

from loopscope.checkpoints.contents import Contents
from loopscope.checkpoints.errors import CheckpointError, shown
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
    for name, kind in (("n_heads", int), ("input_injection", bool), ("n_loops", int)):
        recorded = located.card.get(name)
        if type(recorded) not in (kind, type(None)):
            what = "a number" if kind is int else "true or false"
            raise CheckpointError(f"{files.card}: {name} must be {what}, got {shown(recorded)}")
        known = (getattr(given, name), recorded, getattr(files.layout, name))
        merged[name] = next((value for value in known if value is not None), None)
    return ReleaseFacts(**merged)


def _unsaid(located: Located, given: Given) -> tuple[str, ...]:
    """The arguments about questions that the caller does not give and no file says."""
    files = located.files
    known = {
        "readout": given.readout or located.card.get("readout") or files.readout,
        "vocab": given.vocab or files.vocab,
    }
    return tuple(name for name, value in known.items() if not value)


def _open(located: Located, given: Given) -> tuple[LoopedModel, str | None]:
    given.refuse_options(located)
    files = located.files
    tensors = state_dict_of(located.pickle or {}, files.weights)
    facts, unsaid = _facts(located, given.facts), _unsaid(located, given)
    cfg = infer_config(tensors, files.weights, facts, unsaid)
    if files.n_layers not in (None, cfg.n_layers):
        raise CheckpointError(
            f"{files.weights}: the folder name promises {files.n_layers} layers, but the file holds"
            f" {cfg.n_layers}"
        )
    Contents.of(tensors).check_ours(files.weights, cfg.to_dict())
    return build_from(cfg, tensors, key_names(cfg.n_layers), files.weights), files.readout


PAPER = Format(_is_own, lambda located: RecurrentDepthConfig.family, _open)
