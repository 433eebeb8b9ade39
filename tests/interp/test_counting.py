"""One way to count in the frames of lenses, exits and dynamics.

Coordinates count from 0, and amounts are called by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pandas as pd
import pytest
import torch

import family_toys
from loopscope.interp.dynamics.inference_stages import inference_stages
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.exits.exits import TopStable, exits
from loopscope.interp.exits.halting import halting
from loopscope.interp.lens.alignment import embedding_alignment
from loopscope.interp.lens.decoding import decodability, rank_trajectory
from loopscope.interp.lens.lens import coda_lens, logit_lens, readout_lens
from loopscope.interp.lens.tuned_training import train_tuned_lens
from loopscope.interp.probes.probe import probe
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import coordinate

LOOPS = 3
ANSWERS = torch.tensor([5, 3, 2])
Frames = Mapping[str, Callable[[LoopedModel, Batch], pd.DataFrame]]
OF_VISITS: Frames = {
    "logit_lens": lambda m, b: logit_lens(m, b, LOOPS).frame(ANSWERS),
    "readout_lens": lambda m, b: readout_lens(m, b, LOOPS).frame(ANSWERS),
    "rank_trajectory": lambda m, b: rank_trajectory(
        logit_lens(m, b, LOOPS), ANSWERS[:, None]
    ).frame(),
    "decodability": lambda m, b: decodability(m, b, ANSWERS[:, None], [2], LOOPS).frame(),
    "tuned_lens": lambda m, b: train_tuned_lens(m, b, LOOPS, steps=2, batch_size=2).frame(),
    "attention_dynamics": lambda m, b: attention_dynamics(m, b, LOOPS).frame(),
    "coda_lens": lambda m, b: coda_lens(m, b, LOOPS).frame(ANSWERS),
    "embedding_alignment": lambda m, b: embedding_alignment(m, b, LOOPS).frame(),
    "inference_stages": lambda m, b: inference_stages(m, b, LOOPS).frame(),
    "probe": lambda m, b: probe(m, b, ANSWERS, n_loops=LOOPS, types=ANSWERS).frame(),
}
OF_AMOUNTS: Frames = {
    "dynamics": lambda m, b: dynamics(m, b, LOOPS).frame(),
    "orbits": lambda m, b: dynamics(m, b, LOOPS).orbits().frame(),
    "layer_dynamics": lambda m, b: layer_dynamics(m, b, LOOPS).frame(),
    "halting": lambda m, b: halting(m, b, n_loops=LOOPS).frame(),
    "exits": lambda m, b: exits(m, b, TopStable(hits=2), LOOPS).frame(),
}


@pytest.fixture(scope="module", params=["hrm_text", "huginn"])
def subject(request: pytest.FixtureRequest) -> tuple[LoopedModel, Batch]:
    toy = family_toys.TOYS[request.param]
    model = toy.make()
    return model, family_toys.padded(toy, model)


@pytest.mark.parametrize("name", OF_VISITS)
def test_a_visit_is_named_and_placed_as_in_its_hook_names(
    name: str, subject: tuple[LoopedModel, Batch]
) -> None:
    frame = OF_VISITS[name](*subject)
    assert {"visit", "loop", "layer"} <= set(frame.columns)
    assert "iteration" not in frame.columns
    assert set(frame["loop"].dropna()) == set(range(LOOPS))
    for visit, loop, layer in set(zip(frame["visit"], frame["loop"], frame["layer"], strict=True)):
        if name == "readout_lens":
            assert (visit, pd.isna(layer)) == (f"loops.{loop}", True)
            continue
        place = coordinate(f"{visit}.hook_resid_post")
        assert layer == place[-1]
        assert loop == place[0] if isinstance(place[0], int) else pd.isna(loop)
    for column in {"rank", "step", "head", "example", "position", "target"} & set(frame.columns):
        assert frame[column].min() >= 0
    for column in {"step", "head", "example", "target"} & set(frame.columns):
        assert frame[column].min() == 0
    if "depth" in frame:
        assert frame["depth"].max() == frame["visit"].nunique()


def test_rank_0_is_the_top_token(subject: tuple[LoopedModel, Batch]) -> None:
    lens = readout_lens(*subject, LOOPS)
    frame = lens.frame(lens.top(1).tokens[-1, :, 0])
    assert frame.loc[frame["loop"] == LOOPS - 1, "rank"].tolist() == [0] * 3


@pytest.mark.parametrize("name", OF_AMOUNTS)
def test_an_amount_of_iterations_is_called_iterations(
    name: str, subject: tuple[LoopedModel, Batch]
) -> None:
    frame = OF_AMOUNTS[name](*subject)
    assert not {"iteration", "loop", "loops"} & set(frame.columns)
    least = 0 if name in ("dynamics", "orbits") else 1
    assert set(frame["iterations"]) <= set(range(least, LOOPS + 1))
    if "halted" not in frame:
        assert set(frame["iterations"]) == set(range(least, LOOPS + 1))
    else:
        assert (frame.loc[~frame["halted"], "iterations"] == LOOPS).all()


def test_the_spectrum_of_a_loop_has_its_coordinate(subject: tuple[LoopedModel, Batch]) -> None:
    found = jacobian_spectrum(*subject, 2, LOOPS, krylov=2)
    assert found.frame()["loop"].tolist() == [2] * 3
