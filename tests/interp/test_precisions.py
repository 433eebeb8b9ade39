"""Every method on every family in every dtype, to its frame and its picture: statistics are float32
or wider.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from torch import Tensor

from family_toys import LOOPS, TOYS, padded
from loopscope.interp.dynamics.attractors import fixed_points
from loopscope.interp.dynamics.basins import basins, restart_vote
from loopscope.interp.dynamics.growth import finite_time_exponent, perturbation_growth
from loopscope.interp.dynamics.inference_stages import inference_stages
from loopscope.interp.dynamics.input_dependence import InputDependence, input_dependence
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.path_independence import path_independence
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.dynamics.statistics import effective_rank
from loopscope.interp.edit.realignment import realign
from loopscope.interp.exits.exit_gate import (
    ExitDistribution,
    exit_distribution,
    gate_logits,
    readout_mixture,
)
from loopscope.interp.exits.exits import AccelerationBelow, TopStable, exits
from loopscope.interp.exits.halting import halting
from loopscope.interp.generation import Sampling, generate
from loopscope.interp.lens.alignment import embedding_alignment
from loopscope.interp.lens.decoding import decodability, rank_trajectory
from loopscope.interp.lens.lens import coda_lens, logit_lens, readout_lens
from loopscope.interp.lens.tuned_training import train_tuned_lens, tuned_lens_kl
from loopscope.interp.probes.differences import difference_probe
from loopscope.interp.probes.probe import probe
from loopscope.interp.probes.transfer import transfer_matrix
from loopscope.interp.weights.circuits import composition_scores, full_ov, ov_circuit, qk_circuit
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

ANSWERS = torch.tensor([5, 3, 2])
FAMILIES = [
    "albert",
    "dory",
    "hrm_text",
    "huginn",
    "hyperloop",
    "melt",
    "nanbeige",
    "nanbeige_mhc",
    "ouro",
    "parcae",
    "retrofit_llama",
    "retrofit_olmo",
    "smollm",
    "spiral",
    "training_free",
    "training_free_gpt2",
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FOUR_KINDS = ("huginn", "hrm_text", "melt", "training_free")  # which other dtypes are tried on
Found = pd.DataFrame | Tensor


def drawn(found: ExitDistribution) -> ExitDistribution:
    """An exit distribution of which a picture has been made."""
    assert len(found.plot().data) == 2
    return found


class Pictured(Protocol):
    """A record with a frame and a picture."""

    def frame(self, *answers: Tensor) -> pd.DataFrame: ...

    def plot(self) -> go.Figure: ...


def pictured(record: Pictured, *answers: Tensor) -> pd.DataFrame:
    """The frame of a record that has been drawn, with numbers that JSON can hold."""
    assert len(json.loads(record.plot().to_json())["data"]) > 0
    return record.frame(*answers)


def other(model: LoopedModel, batch: Batch) -> Batch:
    """Other tokens in the same places."""
    return replace(batch, tokens=(batch.tokens + 1) % model.cfg.d_vocab)


def moved(found: InputDependence) -> Tensor:
    """The distances of a mixed run that has been drawn; whether runs meet depends on rounding."""
    assert len(found.plot().data) == 4
    assert len(found.frame()) == found.to_input.numel()
    return found.to_input


def realigned(model: LoopedModel, batch: Batch) -> pd.DataFrame:
    """The lens of a run whose states are rescaled after the first iteration."""
    with realign(model, 0, how="rescale", n_loops=LOOPS):
        return logit_lens(model, batch, LOOPS).frame(ANSWERS)


METHODS: Mapping[str, Callable[[LoopedModel, Batch], Found]] = {
    "logit_lens": lambda m, b: pictured(logit_lens(m, b, LOOPS), ANSWERS),
    "readout_lens": lambda m, b: pictured(readout_lens(m, b, LOOPS), ANSWERS),
    "rank_trajectory": lambda m, b: pictured(
        rank_trajectory(readout_lens(m, b, LOOPS), ANSWERS[:, None])
    ),
    "decodability": lambda m, b: pictured(decodability(m, b, ANSWERS[:, None], [2], LOOPS)),
    "tuned_lens": lambda m, b: pictured(train_tuned_lens(m, b, LOOPS, steps=2, batch_size=2)),
    "tuned_lens.lens": lambda m, b: pictured(
        train_tuned_lens(m, b, LOOPS, steps=1, batch_size=2).lens(m, b), ANSWERS
    ),
    "halting": lambda m, b: pictured(halting(m, b, n_loops=LOOPS), ANSWERS),
    "exits": lambda m, b: pictured(exits(m, b, TopStable(hits=2), LOOPS), ANSWERS),
    "exits of states": lambda m, b: pictured(exits(m, b, AccelerationBelow(1.0), LOOPS), ANSWERS),
    "coda_lens": lambda m, b: pictured(coda_lens(m, b, LOOPS), ANSWERS),
    "tuned_lens_kl": lambda m, b: pictured(tuned_lens_kl(m, b, n_loops=LOOPS)),
    "embedding_alignment": lambda m, b: pictured(embedding_alignment(m, b, LOOPS)),
    "probe": lambda m, b: pictured(
        probe(m, b, ANSWERS, n_loops=LOOPS, types=ANSWERS, permutations=2)
    ),
    "transfer_matrix": lambda m, b: pictured(transfer_matrix(m, b, ANSWERS, LOOPS)),
    "difference_probe": lambda m, b: pictured(
        difference_probe(m, b, other(m, b), ANSWERS > 2, n_loops=LOOPS, held_out=ANSWERS == 3)
    ),
    "inference_stages": lambda m, b: pictured(inference_stages(m, b, LOOPS)),
    "input_dependence": lambda m, b: moved(input_dependence(m, b, other(m, b), LOOPS)),
    "realign": lambda m, b: realigned(m, b),
    "dynamics": lambda m, b: pictured(dynamics(m, b, LOOPS)),
    "dynamics.effective_rank": lambda m, b: dynamics(m, b, LOOPS).effective_rank(),
    "dynamics.period": lambda m, b: dynamics(m, b, LOOPS).period(max_period=2),
    "orbits": lambda m, b: pictured(dynamics(m, b, LOOPS).orbits()),
    "layer_dynamics": lambda m, b: pictured(layer_dynamics(m, b, LOOPS)),
    "layers.between": lambda m, b: layer_dynamics(m, b, LOOPS).between_layers(relative=True),
    "attention_dynamics": lambda m, b: pictured(attention_dynamics(m, b, LOOPS)),
    "jacobian_spectrum": lambda m, b: pictured(jacobian_spectrum(m, b, 1, LOOPS, krylov=3)),
    "lyapunov_spectrum": lambda m, b: pictured(lyapunov_spectrum(m, b, 2, LOOPS)),
    "finite_time_exponent": lambda m, b: pictured(finite_time_exponent(m, b, LOOPS)),
    "separation": lambda m, b: finite_time_exponent(m, b, LOOPS).separation(ANSWERS).frame(),
    "perturbation_growth": lambda m, b: pictured(perturbation_growth(m, b, LOOPS, scale=0.1)),
    "fixed_points": lambda m, b: fixed_points(m, b, LOOPS, tol=1e-9).residual,
    "basins": lambda m, b: pictured(basins(m, b, 3, 0.2, LOOPS)),
    "restart_vote": lambda m, b: pictured(restart_vote(m, b, 3, 0.2, LOOPS)),
    "path_independence": lambda m, b: pictured(path_independence(m, b, LOOPS)),
    "gate_logits": lambda m, b: gate_logits(m, b, LOOPS),
    "exit_distribution": lambda m, b: drawn(exit_distribution(gate_logits(m, b, LOOPS))).pdf,
    "readout_mixture": lambda m, b: readout_mixture(m, b, LOOPS).logits,
    "qk_circuit": lambda m, b: qk_circuit(m, layer_of(m)).AB,
    "ov_circuit": lambda m, b: ov_circuit(m, layer_of(m)).AB,
    "full_ov": lambda m, b: full_ov(m, layer_of(m)).AB,
    "composition_scores": lambda m, b: pictured(composition_scores(m, "K")),
    "generate": lambda m, b: generate(m, b, 2, LOOPS).new,
    "sampling": lambda m, b: generate(m, b, 1, LOOPS, sampling=Sampling(0.7, 5, 0.9)).new,
}
WIDE = (torch.float32, torch.float64, torch.int64)


def layer_of(model: LoopedModel) -> int:
    """A layer that every iteration visits."""
    return next(visit.layer for visit in model.schedule(1) if visit.loop is not None)


@functools.cache
def subject(family: str, dtype: torch.dtype) -> tuple[LoopedModel, Batch]:
    toy = TOYS[family]
    model = toy.make()
    batch = padded(toy, model)
    options = {
        name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in batch.options.items()
    }
    return model.to(dtype), Batch(batch.tokens, batch.mask, batch.readout, options)


@functools.cache
def in_float64(family: str, method: str) -> Found | str:
    """A method's result in float64, or the sentence with which it refuses the family."""
    return outcome(method, *subject(family, torch.float64))


def outcome(method: str, model: LoopedModel, batch: Batch) -> Found | str:
    try:
        return METHODS[method](model, batch)
    except ValueError as refusal:
        return str(refusal)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        (family, dtype)
        for family in FAMILIES
        for dtype in (DTYPES if family in FOUR_KINDS else ("bf16",))
    ],
)
def test_every_method_reaches_its_frame(family: str, dtype: str) -> None:
    for method in METHODS:
        expected, found = (
            in_float64(family, method),
            outcome(method, *subject(family, DTYPES[dtype])),
        )
        if isinstance(expected, str):
            assert found == expected
            continue
        assert not isinstance(found, str), (method, found)
        assert found.shape == expected.shape, method
        if isinstance(found, Tensor):
            assert found.dtype in WIDE, method
            continue
        assert isinstance(expected, pd.DataFrame)
        assert found.isna().equals(expected.isna()), method
        assert found.dtypes.astype(str).isin(["float16", "bfloat16"]).sum() == 0, method


def test_a_gate_and_a_rank_are_computed_in_float32() -> None:
    logits = torch.linspace(-3.0, 3.0, 7)[:, None]
    narrow = exit_distribution(logits.bfloat16())
    assert narrow.pdf.dtype == narrow.cdf.dtype == torch.float32
    assert narrow.pdf.sum(0).item() == pytest.approx(1.0, abs=1e-6)
    rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert effective_rank(rows) == effective_rank(rows.float())
    assert effective_rank(rows.half()) != effective_rank(rows.double()[:6])
