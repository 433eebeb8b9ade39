"""Trials of every public method on a tiny random model of any family."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

import loopscope
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import circuit_scores
from loopscope.interp.circuits.selection import select_circuit
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.trainer import DictionaryTraining
from loopscope.interp.dictionaries.training import train_dictionary
from loopscope.interp.edit.ablation import Component
from loopscope.interp.exits.exits import TopStable
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import FAMILIES, build

LOOPS = 2
_TRAINING = DictionaryTraining(n_features=7, k=2, steps=2, batch_size=5)


def tiny(family: str) -> LoopedModel:
    """A random model of a family, of the sizes that its config calls tiny, in float64."""
    torch.manual_seed(0)
    model = build(FAMILIES[family][0].tiny(n_loops=LOOPS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.double().requires_grad_(False)


@dataclass(frozen=True)
class TrialInputs:
    """The inputs of all methods: two inputs of three rows, answers, and a metric."""

    model: LoopedModel
    clean: Batch
    corrupted: Batch
    answers: Tensor

    @classmethod
    def of(cls, model: LoopedModel) -> TrialInputs:
        """The arguments for one model."""

        def batch(seed: int) -> Batch:
            tokens = torch.randint(
                1, model.cfg.d_vocab, (3, 5), generator=torch.Generator().manual_seed(seed)
            )
            return Batch(tokens, torch.ones_like(tokens), torch.full((3,), 4))

        return cls(model, batch(0), batch(1), torch.tensor([3, 5, 7]))

    @property
    def vector(self) -> Tensor:
        """A vector for the stream."""
        return torch.ones(self.model.cfg.d_model, dtype=self.model.W_E.dtype, device="cpu")

    @property
    def layer(self) -> int:
        """The first layer that an iteration visits."""
        return min(visit.layer for visit in self.model.schedule(1) if visit.loop is not None)

    @property
    def visit(self) -> str:
        """The first visit of iteration 1."""
        return next(visit.name for visit in self.model.schedule(LOOPS) if visit.loop == 1)

    @property
    def metric(self) -> Callable[[Tensor], Tensor]:
        """The logit of each answer minus that of the answer of the row before."""
        return logit_diff(self.answers, self.answers.roll(1))


def _arguments(x: TrialInputs) -> dict[str, Any]:
    """A value for each argument that a method may have, by the name that all methods give it."""
    model = x.model
    return {
        "model": model, "inputs": x.clean, "clean": x.clean, "corrupted": x.corrupted,
        "other": x.corrupted, "positive": x.clean, "negative": x.corrupted, "n_loops": LOOPS,
        "metric": x.metric, "answers": x.answers, "targets": x.answers[:, None], "names": "**",
        "positions": [2], "position": 2, "sites": _patched(model), "site": "attn_out",
        "loop": 1, "visit": x.visit, "loops": [1], "layer": x.layer, "layers": [x.layer],
        "sender": Sender("attn", visit=x.visit), "receivers": Receiver("readout"),
        "vectors": x.vector, "factor": 0.5, "steps": 2,
        "what": Component("attn", loops=(1,)), "criterion": TopStable(hits=2),
        "threshold": 0.5, "max_new_tokens": 2, "kind": "V", "k": 2, "n_starts": 2,
        "order": ["loops.0", "loops.0"],
        "first": x.clean, "at": 0, "second": x.corrupted,
        "preferred": x.answers > 3, "features": [0],
        "training": _TRAINING, "wanted": -1e6, "krylov": 5,
    }  # fmt: skip


def methods() -> dict[str, Callable[..., Any]]:
    """The public calls that take a model first and ask it something."""
    asking = {
        name: getattr(loopscope, name)
        for name, home in loopscope._HOME.items()
        if home.startswith(("loopscope.interp.", "loopscope.models."))
    }
    return {
        name: call
        for name, call in asking.items()
        if inspect.isfunction(call) and next(iter(inspect.signature(call).parameters)) == "model"
    }


def ask(method: Callable[..., Any], x: TrialInputs) -> Any:
    """Call a method with the arguments that it has. A context is entered around one run, and a
    copy of the model is run.
    """
    with TemporaryDirectory() as folder:
        made = method(**_fitting(_arguments(x) | {"to": folder}, method, x))
        if isinstance(made, AbstractContextManager):
            with made as model:
                return model(x.clean.tokens, n_loops=LOOPS)
        return made(x.clean.tokens) if isinstance(made, nn.Module) else made


def _fitting(known: dict[str, Any], method: Callable[..., Any], x: TrialInputs) -> dict[str, Any]:
    """The arguments that a method has."""
    parameters = inspect.signature(method).parameters
    if "kind" in parameters and parameters["kind"].default is not inspect.Parameter.empty:
        del known["kind"]  # of a probe
    if "visit" in parameters:  # which names a place in place of loop and layer
        known = {name: value for name, value in known.items() if name not in ("loop", "layer")}
    known |= {name: make(x) for name, make in _COMPUTED.items() if name in parameters}
    return {name: known[name] for name in parameters if name in known}


def _circuit(x: TrialInputs) -> Circuit:
    """A few edges."""
    pair = (x.clean, x.corrupted, x.metric, LOOPS)
    scores = circuit_scores(x.model, *pair, method="eap", heads=False)
    return select_circuit(scores, 3, prune=False)


def _dictionary(x: TrialInputs) -> Dictionary:
    """A dictionary of the residual."""
    return train_dictionary(x.model, x.clean, n_loops=LOOPS, training=_TRAINING)


_COMPUTED = {"circuits": _circuit, "scores": _circuit, "dictionary": _dictionary}


def _patched(model: LoopedModel) -> list[str]:
    return (
        ["resid_pre"]
        if any(name.endswith("hook_resid_pre") for name in model.hook_names(1))
        else ["attn_out"]
    )


def refusals(family: str) -> dict[str, str]:
    """Why each method refuses a tiny model of a family; empty where the method runs."""
    inputs = TrialInputs.of(tiny(family))
    return {name: _outcome(partial(ask, method, inputs)) for name, method in methods().items()}


def _outcome(call: Callable[[], Any]) -> str:
    """Why a call refuses; empty where it runs."""
    try:
        call()
    except (ValueError, TypeError) as refusal:
        return str(refusal)
    return ""
