"""Ways to call methods: in train mode, in inference mode, in pieces of any size, with lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.finite import first_nonfinite
from loopscope.interp.common.inputs import rows_at_once
from loopscope.interp.dynamics.attractors import fixed_points
from loopscope.interp.dynamics.basins import basins
from loopscope.interp.dynamics.growth import finite_time_exponent, perturbation_growth
from loopscope.interp.dynamics.inference_stages import inference_stages
from loopscope.interp.dynamics.jacobian import jacobian_spectrum
from loopscope.interp.dynamics.layers import attention_dynamics, layer_dynamics
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.dynamics.statistics import effective_rank
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.steering import steer
from loopscope.interp.exits.exits import TopStable, exits
from loopscope.interp.exits.halting import HaltingRule, halting
from loopscope.interp.generation import generate
from loopscope.interp.lens.alignment import embedding_alignment
from loopscope.interp.lens.decoding import decodability, rank_trajectory
from loopscope.interp.lens.lens import coda_lens, logit_lens, readout_lens
from loopscope.interp.lens.tuned_lens import TunedLens
from loopscope.interp.lens.tuned_training import train_tuned_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.path_ends import Receiver
from loopscope.interp.patching.paths import path_patch_sweep
from loopscope.interp.probes.probe import probe
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.hooks import by_rows
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import BatchCentred, full, odd_one, padded, projection, toy

LOOPS = 3
ANSWERS = [1, 2, 3]
TARGETS = [[1, 4], [2, 4], [3, 4]]


def tuned(model: RecurrentDepth, **options: Any) -> Tensor:
    lens = train_tuned_lens(model, padded(), LOOPS, steps=2, batch_size=2)
    return lens.lens(model, padded(), **options).prob(ANSWERS)


METHODS: Mapping[str, Callable[..., Any]] = {
    "logit_lens": lambda m, **o: logit_lens(m, padded(), LOOPS, **o).prob(ANSWERS),
    "readout_lens": lambda m, **o: readout_lens(m, padded(), LOOPS, **o).prob(ANSWERS),
    "coda_lens": lambda m, **o: coda_lens(m, padded(), LOOPS, **o).prob(ANSWERS),
    "embedding_alignment": lambda m, **o: embedding_alignment(m, padded(), LOOPS, **o).cosine,
    "inference_stages": lambda m, **o: inference_stages(m, padded(), LOOPS, **o).mixing,
    "probe": lambda m, **o: (
        probe(m, padded(), torch.tensor(ANSWERS), n_loops=LOOPS, control=False, **o).maps[2].weight
    ),
    "train_tuned_lens": tuned,
    "decodability": lambda m, **o: (
        decodability(m, padded(), TARGETS, [0, 2], LOOPS, **o).mean_reciprocal_rank
    ),
    "dynamics": lambda m, **o: dynamics(m, padded(), LOOPS, **o).states.nan_to_num(),
    "layer_dynamics": lambda m, **o: (
        layer_dynamics(m, padded(), LOOPS, **o).layers[1].states.nan_to_num()
    ),
    "attention_dynamics": lambda m, **o: attention_dynamics(m, padded(), LOOPS, **o).entropy,
    "jacobian_spectrum": lambda m, **o: (
        jacobian_spectrum(m, padded(), 1, LOOPS, krylov=3, **o).radius
    ),
    "lyapunov_spectrum": lambda m, **o: lyapunov_spectrum(m, padded(), 2, LOOPS, **o).exponents,
    "finite_time_exponent": lambda m, **o: finite_time_exponent(m, padded(), LOOPS, **o).exponent,
    "perturbation_growth": lambda m, **o: perturbation_growth(m, padded(), LOOPS, **o).distance,
    "fixed_points": lambda m, **o: fixed_points(m, padded(), LOOPS, **o).residual,
    "basins": lambda m, **o: basins(m, padded(), 2, 0.1, LOOPS, **o).distance,
}
OF_ONE_ROW = {
    "jacobian_spectrum",
    "lyapunov_spectrum",
    "finite_time_exponent",
    "perturbation_growth",
    "basins",
}
OF_ONE_BATCH: Mapping[str, Callable[[RecurrentDepth], Any]] = {
    "halting": lambda m: halting(m, padded(), HaltingRule(None, None), LOOPS).logits,
    "exits": lambda m: exits(m, padded(), TopStable(hits=LOOPS), LOOPS).logits,
    "generate": lambda m: generate(m, padded(), 2, LOOPS).logits,
}


@pytest.fixture(scope="module")
def dropping() -> RecurrentDepth:
    return toy(dropout=0.5).eval()


@pytest.mark.parametrize("name", [*METHODS, *OF_ONE_BATCH])
def test_dropout_is_off_and_the_mode_is_put_back(name: str, dropping: RecurrentDepth) -> None:
    method = (METHODS | OF_ONE_BATCH)[name]
    expected = method(dropping)
    dropping.train()
    dropping.blocks[1].eval()
    try:
        torch.testing.assert_close(method(dropping), expected, rtol=0, atol=0)
        assert dropping.training
        assert dropping.blocks[0].training
        assert not dropping.blocks[1].training
    finally:
        dropping.eval()


def test_a_hook_in_train_mode_sees_no_dropout(dropping: RecurrentDepth) -> None:
    dropping.train()
    try:
        assert first_nonfinite(dropping, padded(), LOOPS) is None
        assert dropping.training
    finally:
        dropping.eval()


@pytest.mark.parametrize("name", [*METHODS, *OF_ONE_BATCH])
def test_inference_mode_changes_nothing(name: str, dropping: RecurrentDepth) -> None:
    method = (METHODS | OF_ONE_BATCH)[name]
    with torch.inference_mode():
        found = method(dropping)
    torch.testing.assert_close(found, method(dropping), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_pieces_have_at_least_one_row(name: str, dropping: RecurrentDepth) -> None:
    whole = METHODS[name](dropping)
    torch.testing.assert_close(METHODS[name](dropping, batch_size=np.int64(2)), whole)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        METHODS[name](dropping, batch_size=0)
    with pytest.raises(TypeError, match="batch_size must be an integer, got float"):
        METHODS[name](dropping, batch_size=2.0)


@pytest.mark.parametrize("name", METHODS)
def test_rows_that_depend_on_one_another_stay_together(name: str) -> None:
    centred = odd_one(BatchCentred)
    if name in OF_ONE_ROW:
        with pytest.raises(ValueError, match="depend on one another"):
            METHODS[name](centred)
    else:
        torch.testing.assert_close(METHODS[name](centred, batch_size=2), METHODS[name](centred))


# A caller's hook that tells rows apart

HOOKED = "loops.1.blocks.0.hook_resid_pre"
OTHER = padded(1)
SUMS: Mapping[str, Callable[[RecurrentDepth, Batch, Batch], Tensor]] = {
    "activation_patch": lambda m, one, other: activation_patch(
        m, one, other, projection(), LOOPS
    ).values.sum(1),
    "attribution_patch": lambda m, one, other: attribution_patch(
        m, one, other, projection(), LOOPS, steps=3
    ).values.sum(1),
    "path_patch_sweep": lambda m, one, other: (
        len(one)
        * torch.tensor(
            path_patch_sweep(m, one, other, projection(), Receiver("readout"), LOOPS)[
                "value"
            ].tolist()
        )
    ),
    "perturbation_growth": lambda m, one, other: perturbation_growth(
        m, one, LOOPS, n_directions=3
    ).distance.sum(1),
    "lyapunov_spectrum": lambda m, one, other: lyapunov_spectrum(m, one, 2, LOOPS).exponents.sum(1),
}


def larger(value: Tensor, hook: object) -> Tensor:
    return 1.7 * value


def first_row_larger(value: Tensor, hook: object) -> None:
    value[0] *= 1.7


@pytest.mark.parametrize("name", METHODS)
def test_rows_stay_together_where_a_hook_tells_them_apart(name: str, plain: RecurrentDepth) -> None:
    with plain.hooks([(HOOKED, first_row_larger)], n_loops=LOOPS):
        whole = METHODS[name](plain)
        torch.testing.assert_close(METHODS[name](plain, batch_size=1), whole)
    assert not torch.equal(METHODS[name](plain).nan_to_num(), whole.nan_to_num())


@pytest.mark.parametrize("name", SUMS)
def test_a_hook_finds_its_row_where_runs_could_stand_side_by_side(
    name: str, plain: RecurrentDepth
) -> None:
    first, others = (
        [batch[rows] for batch in (padded(), OTHER)] for rows in (slice(1), slice(1, 3))
    )
    with plain.hooks([(HOOKED, by_rows(larger))], n_loops=LOOPS):
        expected = SUMS[name](plain, *first)
    expected = expected + SUMS[name](plain, *others)
    with plain.hooks([(HOOKED, first_row_larger)], n_loops=LOOPS):
        torch.testing.assert_close(SUMS[name](plain, padded(), OTHER), expected)


def test_interventions_that_take_each_row_by_itself_leave_pieces_small(
    plain: RecurrentDepth,
) -> None:
    vector, batch = torch.ones(plain.cfg.d_model), padded()
    with (
        steer(plain, vector, loops=1, layers=0, n_loops=LOOPS),
        ablate(plain, Component("head", heads=1), n_loops=LOOPS),
    ):
        assert rows_at_once(plain, batch, 2) == 2
    with ablate(plain, Component("visit", loops=1, layers=0), n_loops=LOOPS):
        assert rows_at_once(plain, batch, 2) == 2
    with ablate(plain, Component("mlp"), how="resample", reference=full(), n_loops=LOOPS):
        assert rows_at_once(plain, batch, 2) == 3


# Lists and numpy's numbers


def test_lists_are_as_good_as_tensors(plain: RecurrentDepth) -> None:
    lens = readout_lens(plain, padded(), LOOPS)
    answers = torch.tensor(ANSWERS)
    for name in ("margin", "rank", "prob", "correct", "first_hit"):
        ask = getattr(lens, name)
        torch.testing.assert_close(ask(ANSWERS), ask(answers), equal_nan=True)
    stops = halting(plain, padded(), HaltingRule(None, None), LOOPS)
    assert torch.equal(stops.correct(ANSWERS), stops.correct(answers))
    found = rank_trajectory(lens, TARGETS)
    assert torch.equal(found.rank, rank_trajectory(lens, torch.tensor(TARGETS)).rank)
    assert effective_rank([[1.0, 0.0], [0.0, 1.0]]) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda lens: lens.rank([0.5, 1.0, 2.0]), TypeError, "tokens must be integers"),
        (lambda lens: lens.rank([1, 2]), ValueError, "one token per read is needed"),
        (lambda lens: lens.rank([1, 2, 99]), ValueError, r"tokens must be in 0\.\.28"),
        (
            lambda lens: rank_trajectory(lens, ANSWERS),
            ValueError,
            "at least one target token",
        ),
        (
            lambda lens: rank_trajectory(lens, [[], [], []]),
            ValueError,
            "at least one target token",
        ),
        (lambda lens: rank_trajectory(lens, [[0.5]] * 3), TypeError, "tokens must be integers"),
        (lambda lens: lens.top(30), ValueError, r"k must be in 1\.\.29"),
        (lambda lens: lens.top(0), ValueError, r"k must be in 1\.\.29"),
    ],
)
def test_other_targets_are_refused(
    ask: Callable[[Any], object],
    error: type[Exception],
    words: str,
    plain: RecurrentDepth,
) -> None:
    lens = readout_lens(plain, padded(), LOOPS)
    with pytest.raises(
        (error, TypeError) if words == "one row of|integers" else error, match=words
    ):
        ask(lens)


def test_a_model_made_inside_inference_mode_has_no_gradients() -> None:
    with torch.inference_mode():
        model = toy()
    with pytest.raises(ValueError, match=r"train_tuned_lens needs gradients, but this model was"):
        train_tuned_lens(model, padded(), LOOPS, steps=2)


@pytest.mark.parametrize("lr", [float("nan"), float("inf")])
def test_a_learning_rate_is_finite(lr: float, plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="lr must be finite and above 0"):
        train_tuned_lens(plain, padded(), LOOPS, steps=2, lr=lr)


def test_a_krylov_space_has_a_dimension(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="krylov must be at least 1, got 0"):
        jacobian_spectrum(plain, padded(), 1, LOOPS, krylov=0)


def test_a_tuned_lens_reads_in_pieces_of_any_size(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match="batch_size must be at least 1, got -1"):
        TunedLens.identity(plain, 2).lens(plain, padded(), batch_size=-1)
