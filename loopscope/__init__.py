"""Mechanistic interpretability of looped transformers, with the iteration as an axis.

from loopscope import load, logit_lens
model = load("ltg_trained")
lens = logit_lens(model, ["<e_24><r_0><r_7>"], n_loops=8)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from loopscope._siblings import check_siblings

if TYPE_CHECKING:
    from checkpoints.catalog import available as available
    from checkpoints.load import load as load
    from checkpoints.load import save as save
    from checkpoints.release import save_release as save_release
    from interp.gradients import gradients as gradients
    from interp.halting import HaltingRule as HaltingRule
    from interp.halting import halting as halting
    from interp.lens import logit_lens as logit_lens
    from interp.lens import readout_lens as readout_lens
    from interp.metrics import logit_diff as logit_diff
    from interp.metrics import logit_margin as logit_margin
    from interp.patching import activation_patch as activation_patch
    from models.cache import LoopCache as LoopCache
    from models.tokens import Batch as Batch
    from models.tokens import Readout as Readout
    from models.views import unrolled as unrolled
    from models.views import untied as untied

_HOME = {
    "available": "checkpoints.catalog",
    "load": "checkpoints.load",
    "save": "checkpoints.load",
    "save_release": "checkpoints.release",
    "gradients": "interp.gradients",
    "HaltingRule": "interp.halting",
    "halting": "interp.halting",
    "logit_lens": "interp.lens",
    "readout_lens": "interp.lens",
    "logit_diff": "interp.metrics",
    "logit_margin": "interp.metrics",
    "activation_patch": "interp.patching",
    "LoopCache": "models.cache",
    "Batch": "models.tokens",
    "Readout": "models.tokens",
    "unrolled": "models.views",
    "untied": "models.views",
}
__all__ = sorted(_HOME)

check_siblings()


def __getattr__(name: str) -> object:
    """Import a public call when it is first used, so that `loopscope --help` does not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'loopscope' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
