"""Every public call refuses a count that is no integer and a number that is not finite, by one
sentence that names the argument.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import loopscope
from dictionary_toys import dictionary, states
from family_toys import TOYS
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dictionaries.attribution import FeatureAttribution, feature_attribution
from loopscope.interp.dynamics.states import Dynamics
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.lens.record import Lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.store.reading import ActivationStore
from loopscope.models.basis.numbers import (
    checked_count,
    checked_factor,
    checked_integer,
    checked_number,
)
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import D_MODEL, D_VOCAB, padded, toy

RUN = 2  # iterations
CLEAN, CORRUPTED, METRIC = padded(1), padded(2), logit_diff([3, 5, 7], 2)
ANSWERS, COLOURS = torch.tensor([3, 5, 7]), torch.tensor([0, 1, 0])
PAIR = {"clean": CLEAN, "corrupted": CORRUPTED, "metric": METRIC}
HELD = torch.tensor([False, False, True])
EVEN = replace(CLEAN, mask=torch.ones_like(CLEAN.mask))
GATED = replace(CLEAN, tokens=CLEAN.tokens % 7)


class Own(nn.Module):
    """A looped module of a user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(D_VOCAB, D_MODEL)
        self.blocks = nn.ModuleList([nn.Linear(D_MODEL, D_MODEL)])

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for _ in range(RUN):
            x = self.blocks[0](x)
        return x


@cache
def model() -> RecurrentDepth:
    return toy("none", True)


@cache
def gated() -> LoopedModel:
    return TOYS["ouro"].make()


@cache
def scores() -> Circuit:
    return loopscope.circuit_scores(model(), **PAIR, n_loops=RUN, steps=1, heads=False)


@cache
def sweep() -> Sweep:
    return activation_patch(model(), **PAIR, n_loops=RUN, layers=0)


@cache
def path() -> Dynamics:
    return loopscope.dynamics(model(), CLEAN, 4)


def entered(context: AbstractContextManager[Any]) -> None:
    """Enter a context and leave it."""
    with context:
        pass


def edited(call: Callable[..., AbstractContextManager[Any]]) -> Callable[..., None]:
    return lambda **o: entered(call(model(), **o))


def run(call: Callable[..., object], **given: object) -> Callable[..., object]:
    return lambda **o: call(model(), **{"inputs": CLEAN, "n_loops": RUN, **given, **o})


def made(call: Callable[..., object], **given: object) -> Callable[..., object]:
    return lambda **o: call(**{**given, **o})


def paired(call: Callable[..., object], **given: object) -> Callable[..., object]:
    return lambda **o: call(model(), **{**PAIR, **given, **o})


def told(call: Callable[..., object], **given: object) -> Callable[..., object]:
    """A call about the dictionary of the toy."""
    found = dictionary("shared")
    return lambda **o: call(toy(), found, CLEAN, **{**given, **o})


RECORDS = {"Dynamics": Dynamics, "FeatureAttribution": FeatureAttribution, "Lens": Lens}
# Each call with all that it needs
CALLS: Mapping[str, Callable[..., object]] = {
    "AccelerationBelow": made(loopscope.AccelerationBelow, threshold=1.0),
    "CosineAbove": made(loopscope.CosineAbove),
    "EntropyBelow": made(loopscope.EntropyBelow),
    "KLBelow": made(loopscope.KLBelow),
    "StepBelow": made(loopscope.StepBelow),
    "TopStable": made(loopscope.TopStable),
    "HaltingRule": made(loopscope.HaltingRule),
    "Sampling": made(loopscope.Sampling),
    "DictionaryTraining": made(loopscope.DictionaryTraining),
    "FeatureEdit": made(loopscope.FeatureEdit, features=1),
    "Readout": made(loopscope.Readout, kind="column"),
    "Reading.of": lambda **o: loopscope.Reading.of(model(), **o),
    "Batch.repeat": made(CLEAN.repeat),
    "HaltingRule.while_training": made(loopscope.HaltingRule.while_training),
    "TunedLens.identity": lambda **o: loopscope.TunedLens.identity(model(), **o),
    "TunedLens.lens": lambda **o: loopscope.TunedLens.identity(model(), RUN).lens(
        model(), CLEAN, **o
    ),
    "ablate": edited(lambda m, **o: loopscope.ablate(m, loopscope.Component("mlp"), **o)),
    "activation_patch": paired(activation_patch, n_loops=RUN, layers=0),
    "attention_dynamics": run(loopscope.attention_dynamics),
    "attenuate_input": edited(lambda m, **o: loopscope.attenuate_input(m, **{"factor": 0.5, **o})),
    "attribution_patch": paired(loopscope.attribution_patch, n_loops=RUN, layers=0),
    "basins": run(loopscope.basins, n_starts=2),
    "causal_tracing": lambda **o: loopscope.causal_tracing(
        model(), CLEAN, CORRUPTED, ANSWERS, **{"position": 1, "n_loops": RUN, **o}
    ),
    "check_family": lambda **o: loopscope.check_family(model(), **{"n_loops": RUN, **o}),
    "circuit_scores": paired(loopscope.circuit_scores, n_loops=RUN, heads=False),
    "coda_lens": run(loopscope.coda_lens),
    "compare_scores": lambda sizes: loopscope.compare_scores(scores(), scores(), (sizes,)),
    "decodability": run(loopscope.decodability, targets=ANSWERS[:, None], positions=[1]),
    "denoising_map": lambda **o: loopscope.denoising_map(model(), CLEAN, CORRUPTED, ANSWERS, **o),
    "noising_map": lambda **o: loopscope.noising_map(model(), CLEAN, CORRUPTED, ANSWERS, **o),
    "difference_probe": lambda **o: loopscope.difference_probe(
        model(), CLEAN, CORRUPTED, COLOURS > 0, **{"n_loops": RUN, "held_out": HELD, **o}
    ),
    "direct_logit_attribution": lambda **o: loopscope.direct_logit_attribution(
        toy(), CLEAN, ANSWERS, heads=False, **o
    ),
    "dynamics": run(loopscope.dynamics),
    "Dynamics.period": lambda **o: path().period(**{"max_period": 2, **o}),
    "Dynamics.orbits": lambda **o: path().orbits(**o),
    "edge_attribution": lambda **o: loopscope.edge_attribution(toy(), **PAIR, **o),
    "embedding_alignment": run(loopscope.embedding_alignment),
    "evaluate_circuit": paired(loopscope.evaluate_circuit, circuits=None),
    "exact_scores": paired(loopscope.exact_scores),
    "exits": run(loopscope.exits, criterion=loopscope.TopStable(hits=2)),
    "feature_graph": told(loopscope.feature_graph, metric=METRIC, most=2),
    "FeatureAttribution.top": lambda **o: feature_attribution(
        toy(), dictionary("shared"), CLEAN, METRIC
    ).top(**o),
    "finite_time_exponent": run(loopscope.finite_time_exponent),
    "first_nonfinite": run(loopscope.first_nonfinite),
    "fixed_points": run(loopscope.fixed_points),
    "full_ov": lambda **o: loopscope.full_ov(model(), **{"layer": 0, **o}),
    "full_qk": lambda **o: loopscope.full_qk(model(), **{"layer": 0, **o}),
    "ov_circuit": lambda **o: loopscope.ov_circuit(model(), **{"layer": 0, **o}),
    "qk_circuit": lambda **o: loopscope.qk_circuit(model(), **{"layer": 0, **o}),
    "generate": run(loopscope.generate, max_new_tokens=1),
    "gradients": run(loopscope.gradients, metric=METRIC, names="hook_embed"),
    "halting": run(loopscope.halting),
    "inference_stages": run(loopscope.inference_stages),
    "input_dependence": lambda **o: loopscope.input_dependence(
        model(), CLEAN, CORRUPTED, **{"n_loops": RUN, **o}
    ),
    "jacobian_spectrum": run(loopscope.jacobian_spectrum, loop=1, krylov=2),
    "layer_dynamics": run(loopscope.layer_dynamics),
    "Lens.top": lambda **o: logit_lens(model(), CLEAN, RUN).top(**o),
    "logit_lens": run(logit_lens),
    "loop_states": run(loopscope.loop_states),
    "lyapunov_spectrum": run(loopscope.lyapunov_spectrum, k=1),
    "path_independence": run(loopscope.path_independence, inputs=EVEN),
    "path_patch": paired(
        loopscope.path_patch,
        n_loops=RUN,
        sender=loopscope.Sender("mlp", 0, 0),
        receivers=loopscope.Receiver("readout"),
    ),
    "path_patch_sweep": paired(
        loopscope.path_patch_sweep,
        n_loops=RUN,
        senders=[loopscope.Sender("mlp", 0, 0)],
        receivers=loopscope.Receiver("readout"),
    ),
    "pca_dictionary": lambda **o: loopscope.pca_dictionary(
        states(), dictionary("shared").reading, **o
    ),
    "perturbation_growth": run(loopscope.perturbation_growth),
    "probe": run(loopscope.probe, targets=COLOURS, held_out=HELD, control=False),
    "random_dictionary": lambda **o: loopscope.random_dictionary(
        states(), dictionary("shared").reading, **{"n_features": 5, "k": 1, **o}
    ),
    "readout_at_threshold": run(loopscope.readout_at_threshold, threshold=0.5),
    "readout_lens": run(readout_lens),
    "readout_mixture": run(loopscope.readout_mixture),
    "gate_logits": lambda **o: loopscope.gate_logits(gated(), GATED, **{"n_loops": RUN, **o}),
    "realign": edited(lambda m, **o: loopscope.realign(m, **{"at": 0, **o})),
    "restart_vote": run(loopscope.restart_vote, n_starts=2),
    "schedule_edit": edited(
        lambda m, **o: loopscope.schedule_edit(m, ["loops.0.blocks.0"], **{"n_loops": RUN, **o})
    ),
    "search_circuit": lambda **o: loopscope.search_circuit(
        model(), **PAIR, scores=scores(), **{"threshold": 1e9, **o}
    ),
    "select_circuit": lambda **o: loopscope.select_circuit(scores(), **o),
    "set_to": edited(
        lambda m, **o: loopscope.set_to(m, torch.zeros(D_MODEL), loops=0, layers=0, **o)
    ),
    "steer": edited(
        lambda m, **o: loopscope.steer(m, torch.zeros(D_MODEL), loops=0, layers=0, **o)
    ),
    "smallest_circuit": paired(loopscope.smallest_circuit, wanted=-1e9),
    "steering_vector": lambda **o: loopscope.steering_vector(
        model(), CLEAN, CORRUPTED, "resid_pre", **{"loop": 0, "layer": 0, "n_loops": RUN, **o}
    ),
    "Sweep.bootstrap": lambda **o: sweep().bootstrap(**{"resamples": 5, **o}),
    "Sweep.by_group": lambda **o: sweep().by_group("abcdefg", **{"resamples": 5, **o}),
    "swap_input": edited(lambda m, **o: loopscope.swap_input(m, CORRUPTED, **o)),
    "top_examples": told(loopscope.top_examples, features=[1]),
    "train_dictionary": run(
        loopscope.train_dictionary, training=loopscope.DictionaryTraining(8, 2, steps=1)
    ),
    "train_tuned_lens": run(loopscope.train_tuned_lens, steps=1, batch_size=2),
    "transfer_matrix": run(loopscope.transfer_matrix, targets=COLOURS, held_out=HELD),
    "tuned_lens_kl": run(loopscope.tuned_lens_kl),
    "unrolled": lambda **o: loopscope.unrolled(toy(), **o),
    "untied": lambda **o: loopscope.untied(model(), **o),
    "wrap": lambda **o: loopscope.wrap(Own(), "blocks", **{"n_loops": RUN, **o}),
}
# Calls of which a number is asked for elsewhere, by where
ELSEWHERE = {
    "ActivationStore": "below",
    "collect": "below",
    "export_dataset": "below",
    "save_release": "below",
    "Batch": "holds tensors only",
    "Cell": "is made by sweeps",
    "Circuit": "is made by circuit_scores",
    "Reading": "is made by Reading.of",
    "Dictionary": "a `Coder` checks k",
    "LoopCache": "is made by runs",
    "Receiver": "`in_range` looks at places when they are resolved in a run",
    "Sender": "the same",
    "Sweep": "is made by sweeps",
    "TunedLens": "is made by training",
    "load": "fields of a config, `models.basis.fields`",
}
KINDS = {"int": {"int", "int | None"}, "float": {"float", "float | None", "float | int"}}
KINDS["float"] |= {"float | int | None", "HeldOut"}
SEVERAL = {"compare_scores": "sizes"}


def signature_of(name: str) -> inspect.Signature:
    owner, _, method = name.partition(".")
    found = RECORDS.get(owner) or getattr(loopscope, owner)
    return inspect.signature(getattr(found, method) if method else found)


def numbers(name: str, kind: str) -> list[str]:
    """The arguments of a call that are counts, or real numbers."""
    extra = [SEVERAL[name]] if name in SEVERAL and kind == "int" else []
    given = signature_of(name).parameters.values()
    return [each.name for each in given if each.annotation in KINDS[kind]] + extra


def asked(kind: str) -> Iterator[tuple[str, str]]:
    for name in CALLS:
        for argument in numbers(name, kind):
            yield name, argument


def with_circuit(name: str, given: dict[str, object]) -> dict[str, object]:
    """The arguments with a circuit, which is not made before tests run."""
    where = {"evaluate_circuit": "circuits", "exact_scores": "scores", "smallest_circuit": "scores"}
    return {where[name]: scores(), **given} if name in where else given


def refused(name: str, argument: str, value: object, error: type[Exception]) -> None:
    said = "a seed" if argument == "seed" else re.escape(argument)
    said = "a size" if name in SEVERAL else said
    with pytest.raises(error, match=f"{said}s? must be"):
        CALLS[name](**with_circuit(name, {argument: value}))


@pytest.mark.parametrize(("name", "argument"), list(asked("int")))
def test_a_count_is_an_integer(name: str, argument: str) -> None:
    for value in (2.5, 2.0, True, np.bool_(True), torch.tensor(True), torch.tensor(2.0), "2"):
        refused(name, argument, value, TypeError)


@pytest.mark.parametrize(("name", "argument"), [each for each in asked("int") if each[1] != "seed"])
def test_a_count_is_not_negative(name: str, argument: str) -> None:
    refused(name, argument, -1, ValueError)


UNBOUNDED = {  # a threshold may be one that is never met, or always
    ("search_circuit", "threshold"),
    ("smallest_circuit", "wanted"),
    ("HaltingRule", "kl"),
    ("HaltingRule", "entropy"),
    *((name, "threshold") for name in CALLS if name.endswith(("Below", "Above"))),
}


@pytest.mark.parametrize(("name", "argument"), sorted(UNBOUNDED))
def test_a_threshold_may_be_infinite(name: str, argument: str) -> None:
    CALLS[name](**with_circuit(name, {argument: -math.inf if argument == "wanted" else math.inf}))


def test_a_scale_may_be_a_tensor_of_finite_numbers() -> None:
    checked_factor(torch.tensor([0.0, 2.0]), "scale")
    checked_factor(torch.tensor(2.0), "scale")
    with pytest.raises(ValueError, match="scale must be finite, got "):
        checked_factor(torch.tensor([0.0, math.nan]), "scale")
    with pytest.raises(TypeError, match="scale must be a number, got str"):
        checked_factor("2", "scale")


@pytest.mark.parametrize(("name", "argument"), list(asked("float")))
def test_a_number_is_finite(name: str, argument: str) -> None:
    endless = () if (name, argument) in UNBOUNDED else (math.inf, -math.inf)
    for value in (math.nan, torch.tensor(math.nan), *endless):
        refused(name, argument, value, ValueError)
    for other in (True, np.bool_(True), "0.5", 1j):
        refused(name, argument, other, TypeError)


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("Sampling", "top_p", 1.5),
        ("Sampling", "temperature", -0.1),
        ("DictionaryTraining", "lr", 0.0),
        ("DictionaryTraining", "sparsity", -1.0),
        ("DictionaryTraining", "bandwidth", 0.0),
        ("Dynamics.period", "tol", -0.1),
        ("basins", "tol", 0.0),
        ("basins", "scale", 0.0),
        ("fixed_points", "tol", -1.0),
        ("perturbation_growth", "scale", -1.0),
        ("probe", "strength", 0.0),
        ("probe", "held_out", 1.5),
        ("transfer_matrix", "held_out", -0.5),
        ("readout_at_threshold", "threshold", 1.1),
        ("realign", "weight", 1.1),
        ("search_circuit", "threshold", -1.0),
        ("Sweep.bootstrap", "level", 1.0),
        ("Sweep.by_group", "level", 0.0),
        ("train_tuned_lens", "lr", 0.0),
        ("train_tuned_lens", "weight_decay", -0.1),
    ],
)
def test_a_number_is_within_its_bounds(name: str, argument: str, value: float) -> None:
    refused(name, argument, value, ValueError)


def test_every_public_call_is_asked() -> None:
    left = {
        name
        for name in loopscope.__all__
        if callable(getattr(loopscope, name)) and not name.startswith("_")
        if any(numbers(name, kind) for kind in KINDS)
    }
    assert left - set(CALLS) - set(ELSEWHERE) == set()


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("Batch.repeat", "times", 2),
        ("Lens.top", "k", 3),
        ("Sampling", "top_k", 3),
        ("TopStable", "hits", 2),
        ("activation_patch", "window", 2),
        ("attribution_patch", "steps", 1),
        ("circuit_scores", "steps", 1),
        ("fixed_points", "max_period", 1),
        ("generate", "max_new_tokens", 1),
        ("jacobian_spectrum", "krylov", 2),
        ("qk_circuit", "head", 1),
        ("select_circuit", "n_edges", 2),
    ],
)
def test_integers_of_numpy_and_tensors_count(name: str, argument: str, value: int) -> None:
    for number in (np.int64(value), torch.tensor(value)):
        assert CALLS[name](**{argument: number}) is not None


def test_a_store_counts(tmp_path: Path) -> None:
    for argument in ("batch_size", "per_file", "max_bytes"):
        with pytest.raises(TypeError, match=f"{argument} must be an integer, got float"):
            loopscope.collect(model(), CLEAN, n_loops=RUN, to=tmp_path / "no", **{argument: 2.5})
    assert not (tmp_path / "no").exists()
    store: ActivationStore = loopscope.collect(model(), CLEAN, n_loops=RUN, to=tmp_path / "made")
    for given in ({"size": True}, {"size": 2, "buffer": 1e6}):
        with pytest.raises(TypeError, match="must be an integer"):
            next(store.batches(**given))
    several = {"context": 2, "loop": 0, "layer": 0}
    for more in ({"context": 2.5}, several | {"loop": 0.0}, several | {"layer": True}):
        with pytest.raises(TypeError, match="must be an integer"):
            loopscope.export_dataset(store, tmp_path / "out", **more)
    with pytest.raises(TypeError, match="epoch must be an integer, got bool"):
        loopscope.save_release(toy(), tmp_path / "x.pt", True)


def test_the_checked_number_is_pythons() -> None:
    assert checked_integer(np.int8(-3), "x") == -3
    assert type(checked_count(torch.tensor(4), "x")) is int
    assert type(checked_number(np.float32(0.5), "x", above=0, most=0.5)) is float
    assert checked_number(torch.tensor(2), "x", least=2, below=3) == 2.0
    for number, words in ((0.0, "got 0.0"), (math.nan, "got nan"), (10**400, "must be a number")):
        with pytest.raises((TypeError, ValueError), match=words):
            checked_number(number, "x", above=0, below=1)
    with pytest.raises(ValueError, match=r"x must be finite and above 0 and at most 1, got 2\.0"):
        checked_number(2, "x", above=0, most=1)
    with pytest.raises(ValueError, match="x must be finite, got inf"):
        checked_number(math.inf, "x")
    with pytest.raises(ValueError, match="x must be at least 3, got 2"):
        checked_count(2, "x", least=3)


def test_what_is_asked_of_a_model_is_whole() -> None:
    own, tokens = toy(), CLEAN.tokens
    end = own.advance(own.begin(tokens, n_loops=RUN))
    for positions in (1.5, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])):
        with pytest.raises(TypeError, match="positions must be an integer tensor"):
            own.readout(end, positions)
    assert torch.equal(own.readout(end, [1, 2, 3]), own.readout(end, torch.tensor([1, 2, 3])))
    _, cache = own.run_with_cache(tokens, n_loops=RUN)
    for key in (("resid_post", True, 0), ("resid_post", 1.0, 0), ("resid_post", 1, False)):
        with pytest.raises(TypeError, match="a coordinate of a key must be an integer"):
            cache[key]
        assert key not in cache
    assert torch.equal(cache["resid_post", np.int64(1), 0], cache["resid_post", 1, 0])
    with pytest.raises(TypeError, match="stop_at must be a token id"):
        loopscope.generate(own, CLEAN, 1, RUN, stop_at=True)
    with pytest.raises(TypeError, match=r"shard must be two integers \(i, n\)"):
        logit_lens(own, CLEAN, RUN, shard=(0, True))
    with pytest.raises(TypeError, match="the calls of 'blocks' must be an integer, got float"):
        loopscope.wrap(Own(), {"blocks": ("blocks", 2.0)}, RUN)


def test_a_seed_of_numpy_is_a_seed() -> None:
    drawing = TOYS["huginn"].make()
    tokens = CLEAN.tokens % 7
    with torch.no_grad():
        expected = drawing(tokens, n_loops=RUN, seed=3)
        assert torch.equal(drawing(tokens, n_loops=RUN, seed=np.int64(3)), expected)
    for seed in (True, 2.5):
        with pytest.raises(TypeError, match="seed must be an integer"):
            drawing(tokens, n_loops=RUN, seed=seed)


def test_a_scale_with_a_gradient_keeps_it() -> None:
    own, vector = toy(), torch.ones(D_MODEL, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    with loopscope.steer(own, vector, loops=0, layers=0, scale=scale, n_loops=RUN):
        own(CLEAN.tokens, n_loops=RUN).sum().backward()
    assert scale.grad is not None
    assert scale.grad != 0
