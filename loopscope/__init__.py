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
    from checkpoints.download import fetch as fetch
    from checkpoints.load import load as load
    from checkpoints.load import save as save
    from checkpoints.release import save_release as save_release
    from interp.ablation import Component as Component
    from interp.ablation import ablate as ablate
    from interp.attribution import attribution_patch as attribution_patch
    from interp.attribution import edge_attribution as edge_attribution
    from interp.cells import Cell as Cell
    from interp.circuits import composition_scores as composition_scores
    from interp.circuits import full_ov as full_ov
    from interp.circuits import full_qk as full_qk
    from interp.circuits import ov_circuit as ov_circuit
    from interp.circuits import qk_circuit as qk_circuit
    from interp.decoding import decodability as decodability
    from interp.decoding import rank_trajectory as rank_trajectory
    from interp.direct_logit import direct_logit_attribution as direct_logit_attribution
    from interp.dynamics import dynamics as dynamics
    from interp.dynamics import effective_rank as effective_rank
    from interp.exit_gate import exit_distribution as exit_distribution
    from interp.exit_gate import gate_logits as gate_logits
    from interp.exit_gate import readout_at_threshold as readout_at_threshold
    from interp.exit_gate import readout_mixture as readout_mixture
    from interp.exits import AccelerationBelow as AccelerationBelow
    from interp.exits import CosineAbove as CosineAbove
    from interp.exits import EntropyBelow as EntropyBelow
    from interp.exits import KLBelow as KLBelow
    from interp.exits import StepBelow as StepBelow
    from interp.exits import TopStable as TopStable
    from interp.exits import apply_criterion as apply_criterion
    from interp.exits import exits as exits
    from interp.generation import Generated as Generated
    from interp.generation import Sampling as Sampling
    from interp.generation import generate as generate
    from interp.gradients import gradients as gradients
    from interp.halting import HaltingRule as HaltingRule
    from interp.halting import halting as halting
    from interp.jacobian import jacobian_spectrum as jacobian_spectrum
    from interp.layer_dynamics import attention_dynamics as attention_dynamics
    from interp.layer_dynamics import layer_dynamics as layer_dynamics
    from interp.lens import logit_lens as logit_lens
    from interp.lens import readout_lens as readout_lens
    from interp.metrics import logit_diff as logit_diff
    from interp.metrics import logit_margin as logit_margin
    from interp.patching import activation_patch as activation_patch
    from interp.path_patching import Receiver as Receiver
    from interp.path_patching import Sender as Sender
    from interp.path_patching import path_patch as path_patch
    from interp.path_patching import path_patch_sweep as path_patch_sweep
    from interp.steering import attenuate_input as attenuate_input
    from interp.steering import set_to as set_to
    from interp.steering import steer as steer
    from interp.steering import steering_vector as steering_vector
    from interp.steering import swap_input as swap_input
    from interp.sweep import Sweep as Sweep
    from interp.tracing import causal_tracing as causal_tracing
    from interp.tracing import denoising_map as denoising_map
    from interp.tracing import noising_map as noising_map
    from interp.tuned_lens import TunedLens as TunedLens
    from interp.tuned_lens import train_tuned_lens as train_tuned_lens
    from models.cache import LoopCache as LoopCache
    from models.tokens import Batch as Batch
    from models.tokens import Readout as Readout
    from models.views import unrolled as unrolled
    from models.views import untied as untied
    from training.trainer import train as train

_HOME = {
    "available": "checkpoints.catalog",
    "fetch": "checkpoints.download",
    "load": "checkpoints.load",
    "save": "checkpoints.load",
    "save_release": "checkpoints.release",
    "Component": "interp.ablation",
    "ablate": "interp.ablation",
    "attribution_patch": "interp.attribution",
    "edge_attribution": "interp.attribution",
    "Cell": "interp.cells",
    "composition_scores": "interp.circuits",
    "full_ov": "interp.circuits",
    "full_qk": "interp.circuits",
    "ov_circuit": "interp.circuits",
    "qk_circuit": "interp.circuits",
    "decodability": "interp.decoding",
    "rank_trajectory": "interp.decoding",
    "direct_logit_attribution": "interp.direct_logit",
    "dynamics": "interp.dynamics",
    "effective_rank": "interp.dynamics",
    "AccelerationBelow": "interp.exits",
    "CosineAbove": "interp.exits",
    "EntropyBelow": "interp.exits",
    "KLBelow": "interp.exits",
    "StepBelow": "interp.exits",
    "TopStable": "interp.exits",
    "apply_criterion": "interp.exits",
    "exit_distribution": "interp.exit_gate",
    "exits": "interp.exits",
    "readout_at_threshold": "interp.exit_gate",
    "readout_mixture": "interp.exit_gate",
    "gate_logits": "interp.exit_gate",
    "Generated": "interp.generation",
    "Sampling": "interp.generation",
    "generate": "interp.generation",
    "gradients": "interp.gradients",
    "HaltingRule": "interp.halting",
    "halting": "interp.halting",
    "jacobian_spectrum": "interp.jacobian",
    "attention_dynamics": "interp.layer_dynamics",
    "layer_dynamics": "interp.layer_dynamics",
    "logit_lens": "interp.lens",
    "readout_lens": "interp.lens",
    "logit_diff": "interp.metrics",
    "logit_margin": "interp.metrics",
    "activation_patch": "interp.patching",
    "Receiver": "interp.path_patching",
    "Sender": "interp.path_patching",
    "path_patch": "interp.path_patching",
    "path_patch_sweep": "interp.path_patching",
    "attenuate_input": "interp.steering",
    "set_to": "interp.steering",
    "steer": "interp.steering",
    "steering_vector": "interp.steering",
    "swap_input": "interp.steering",
    "Sweep": "interp.sweep",
    "causal_tracing": "interp.tracing",
    "denoising_map": "interp.tracing",
    "noising_map": "interp.tracing",
    "TunedLens": "interp.tuned_lens",
    "train_tuned_lens": "interp.tuned_lens",
    "LoopCache": "models.cache",
    "Batch": "models.tokens",
    "Readout": "models.tokens",
    "unrolled": "models.views",
    "untied": "models.views",
    "train": "training.trainer",
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
