"""What a sweep can do besides single cells: several places at once, several metrics, statistics,
partial results, both engines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.interp.attribution.direct_logit import direct_logit_attribution
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.cells import Cell
from loopscope.interp.common.fingerprint import fingerprint
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.packed import packable
from loopscope.interp.patching.path_ends import Receiver
from loopscope.interp.patching.paths import path_patch_sweep
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    LAYERS,
    LOOPS,
    POS,
    Bidirectional,
    assert_close,
    cached,
    full,
    odd_one,
    padded,
    projection,
    put,
    run_hooked,
    site_of,
    toy,
)

CLEAN, CORRUPTED = padded(seed=1), padded(seed=2)


def naive(model: LoopedModel, cell: Cell, n_loops: int) -> Tensor:
    """The metric with every place of a cell patched, in one run with one hook for each."""
    values = cached(model, CLEAN, list(cell.names), n_loops)
    hooks = []
    for name in cell.names:
        for column in cell.columns:
            index: tuple[slice | int, ...] = (slice(None), column)
            if site_of(name) == "attn.hook_pattern":
                index = (slice(None), slice(None) if cell.head is None else cell.head, column)
            elif cell.head is not None:
                index = (*index, cell.head)
            hooks.append((name, put(values[name], index)))
    logits = model.run_with_hooks(
        CORRUPTED.tokens, n_loops=n_loops, mask=CORRUPTED.mask, fwd_hooks=hooks
    )
    return projection()(logits[torch.arange(BATCH), CORRUPTED.readout])


# Several places at once


@pytest.mark.shapes
@pytest.mark.parametrize("injection", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"together": "loops", "sites": ["resid_mid", "state_in", "z"], "positions": [0, 4]},
        {
            "together": "positions",
            "sites": ["resid_pre", "embed", "pattern", "ln_final.normalized"],
            "positions": [1, 3, 5],
        },
        {"together": ("loops", "positions"), "sites": ["mlp_out", "pattern"], "heads": [2]},
        {"window": 2, "sites": ["attn_out"], "positions": [2]},
        {"window": 2, "loops": [0, 2, 3], "sites": ["z"], "positions": [2], "heads": [0, 3]},
    ],
    ids=str,
)
def test_each_cell_equals_one_run_with_all_its_places_patched(
    options: dict, injection: bool
) -> None:
    model = toy("sinusoidal" if injection else "none", injection)
    sweep = activation_patch(model, CLEAN, CORRUPTED, projection(), LOOPS, **options)
    for cell, value in zip(sweep.cells, sweep.values, strict=True):
        assert_close(value, naive(model, cell, LOOPS))


def test_cells_of_several_places(plain: RecurrentDepth) -> None:
    loops = activation_patch(
        plain,
        CLEAN,
        CORRUPTED,
        projection(),
        LOOPS,
        sites="resid_pre",
        positions=[3],
        together="loops",
    )
    assert [(cell.loop, cell.layer, cell.position, len(cell.names)) for cell in loops.cells] == [
        (None, 0, 3, 4),
        (None, 1, 3, 4),
    ]
    positions = activation_patch(
        plain, CLEAN, CORRUPTED, projection(), 1, sites="resid_pre", together="positions"
    )
    assert [(cell.position, cell.columns) for cell in positions.cells] == [
        (None, tuple(range(POS)))
    ] * LAYERS
    windows = activation_patch(
        plain, CLEAN, CORRUPTED, projection(), LOOPS, sites="state_in", positions=[0], window=3
    )
    assert [(cell.loop, cell.names) for cell in windows.cells] == [
        (0, tuple(f"loops.{t}.hook_state_in" for t in (0, 1, 2))),
        (1, tuple(f"loops.{t}.hook_state_in" for t in (1, 2, 3))),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 2, "together": "loops"}, "only one of the two can be given, got 2"),
    ],
)
def test_groups_that_make_no_sense_are_refused(
    options: dict, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        activation_patch(plain, CLEAN, CORRUPTED, projection(), 2, **options)


# Metrics and statistics


def second(logits: Tensor) -> Tensor:
    return logits[:, 2] - logits[:, 5]


def test_more_metrics_of_the_same_runs(plain: RecurrentDepth) -> None:
    both = activation_patch(plain, CLEAN, CORRUPTED, projection(), 2, also={"second": second})
    alone = activation_patch(plain, CLEAN, CORRUPTED, second, 2)
    assert both.also["second"].metric == alone.metric == "second"
    assert_close(both.also["second"].values, alone.values)
    assert_close(both.also["second"].clean, alone.clean)
    assert_close(both.values, activation_patch(plain, CLEAN, CORRUPTED, projection(), 2).values)
    assert list(both.frame()["metric"].unique()) == ["projection", "second"]
    with pytest.raises(
        ValueError,
        match="each metric needs a name of its own, but the first one is called 'second'",
    ):
        activation_patch(plain, CLEAN, CORRUPTED, second, 2, also={"second": second})


def by_hand() -> Sweep:
    cells = tuple(Cell("loops.0.hook_state_in", "state_in", 0, None, i, None) for i in range(2))
    values = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    clean, corrupted = (
        torch.full((3,), 8.0, dtype=torch.float64),
        torch.zeros(3, dtype=torch.float64),
    )
    return Sweep(cells, values, clean, corrupted, "margin", "denoise")


@pytest.mark.shapes
def test_standard_error_by_hand() -> None:
    sweep = by_hand()
    assert sweep.standard_error().tolist() == pytest.approx([(7 / 3) ** 0.5, 0.0])
    assert sweep.frame()["standard_error"].tolist() == pytest.approx([(7 / 3) ** 0.5, 0.0])
    one = replace(
        sweep, values=sweep.values[:, :1], clean=sweep.clean[:1], corrupted=sweep.corrupted[:1]
    )
    assert one.standard_error().isnan().all()


def test_bootstrap_intervals_hold_the_mean_and_are_those_of_the_seed() -> None:
    sweep = by_hand()
    low, high = sweep.bootstrap(resamples=4000)
    assert (low <= sweep.normalized()).all()
    assert (sweep.normalized() <= high).all()
    assert (low[1], high[1]) == (0.5, 0.5)
    assert (float(low[0]), float(high[0])) == (
        0.125,
        0.75,
    )  # all three draws the smallest, or the largest: 1 in 27 each
    wide, narrow = sweep.bootstrap(level=0.99), sweep.bootstrap(level=0.5)
    assert narrow.high[0] - narrow.low[0] < wide.high[0] - wide.low[0]
    assert torch.equal(sweep.bootstrap().low, sweep.bootstrap().low)
    with pytest.raises(ValueError, match="level must be finite and above 0 and below 1"):
        sweep.bootstrap(level=1.0)


@pytest.mark.shapes
def test_resamples_are_means_over_drawn_examples() -> None:
    count, generator = 2000, torch.Generator().manual_seed(4)
    values, clean, corrupted = torch.randn(
        (3, count), generator=generator, dtype=torch.float64
    ) + torch.tensor([[1.0], [5.0], [0.0]], dtype=torch.float64)
    sweep = Sweep(by_hand().cells[:1], values[None], clean, corrupted, "margin", "denoise")
    draws = torch.randint(count, (1000, count), generator=torch.Generator().manual_seed(3))
    effects = (values - corrupted)[draws].mean(1) / (clean - corrupted)[draws].mean(1)
    low, high = sweep.bootstrap(level=0.9, seed=3)
    edges = torch.tensor([0.05, 0.95], dtype=torch.float64)
    assert_close(torch.stack([low[0], high[0]]), effects.quantile(edges))


def test_one_example_has_no_interval() -> None:
    one = activation_patch(toy(), padded(1, (5,)), padded(2, (5,)), projection(), 2)
    with pytest.raises(ValueError, match="at least two examples, but this sweep has one example"):
        one.bootstrap()
    assert one.frame()["standard_error"].isna().all()


def test_questions_that_do_not_have_a_place_do_not_count(plain: RecurrentDepth) -> None:
    sweep = activation_patch(plain, CLEAN, CORRUPTED, projection(), 2)
    each = [
        activation_patch(plain, CLEAN[row], CORRUPTED[row], projection(), 2)
        for row in (slice(i, i + 1) for i in range(BATCH))
    ]
    count = [sum(read >= position for read in CLEAN.readout) for position in range(POS)]
    assert count == [3, 3, 3, 3, 2, 1, 1]
    frame, normalized = sweep.frame(), sweep.normalized()
    for i, cell in enumerate(sweep.cells):
        has = [row for row in range(BATCH) if CLEAN.readout[row] >= cell.position]
        values = torch.stack([each[row].values[i, 0] for row in has])
        scale = (sweep.clean - sweep.corrupted)[has].mean()
        share = (values - sweep.corrupted[has]).mean() / scale
        assert frame["value"][i] == pytest.approx(values.mean().item(), rel=1e-9)
        assert frame["examples"][i] == len(has) == count[cell.position]
        assert normalized[i].item() == pytest.approx(share.item(), rel=1e-9)
        if len(has) > 1:
            error = values.std() / len(has) ** 0.5
            assert frame["standard_error"][i] == pytest.approx(error.item(), rel=1e-9)
    low, high = sweep.bootstrap(resamples=50)
    assert (low <= high)[sweep.examples() > 1].all()


def test_columns_after_the_readout_count_where_a_model_reads_them() -> None:
    model = odd_one(Bidirectional)
    sweep = activation_patch(model, full(1, 3), full(2, 3), projection(), 2, sites="embed")
    assert sweep.examples().tolist() == [BATCH] * POS
    masked = activation_patch(model, CLEAN, CORRUPTED, projection(), 2, sites="embed")
    assert masked.examples().tolist() == [3, 3, 3, 3, 2, 1, 1]
    together = activation_patch(
        model,
        CLEAN,
        CORRUPTED,
        projection(),
        2,
        sites="embed",
        positions=[4, 6],
        together="positions",
    )
    assert together.examples().tolist() == [2]


def test_a_place_that_no_question_has_is_missing(plain: RecurrentDepth) -> None:
    clean, corrupted = padded(1, (3, 4)), padded(2, (3, 4))
    frame = activation_patch(plain, clean, corrupted, projection(), 2, positions=[3, 5]).frame()
    assert frame["examples"].tolist() == [1, 0] * 4
    assert frame["value"].isna().tolist() == [False, True] * 4


def test_a_window_longer_than_the_iterations_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"at most the number of chosen iterations, which is 2 at"):
        activation_patch(plain, CLEAN, CORRUPTED, projection(), 3, loops=[0, 2], window=3)


def test_positions_count_once(plain: RecurrentDepth) -> None:
    def cells(**options: Any) -> tuple[Cell, ...]:
        return activation_patch(plain, CLEAN, CORRUPTED, projection(), 2, **options).cells

    assert cells(positions=[2, 2, 1]) == cells(positions=np.array([2, 1]))
    assert cells(positions=3) == cells(positions=[3])
    assert cells(loops=1, layers=np.int64(0)) == cells(loops=[1], layers=[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: activation_patch(m, CLEAN, CORRUPTED, projection(), max_bytes=0), "max_bytes"),
        (
            lambda m: attribution_patch(m, CLEAN, CORRUPTED, projection(), batch_size=0, steps=2),
            "batch_size must be at least 1, got 0",
        ),
        (
            lambda m: direct_logit_attribution(m, CLEAN, 3, batch_size=-1),
            "batch_size must be at least 1, got -1",
        ),
        (
            lambda m: path_patch_sweep(
                m, CLEAN, CORRUPTED, projection(), Receiver("readout"), batch_size=0
            ),
            "batch_size must be at least 1, got 0",
        ),
    ],
)
def test_sizes_of_nothing_are_refused(
    call: Callable[[LoopedModel], object], message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        call(plain)


def test_a_grid_has_named_axes(plain: RecurrentDepth) -> None:
    sweep = activation_patch(
        plain,
        CLEAN,
        CORRUPTED,
        projection(),
        3,
        sites=["z", "embed"],
        positions=[1, 4],
        heads=[0, 2],
        loops=None,
    )
    grid = sweep.grid("z")
    assert grid.values.shape == (3, LAYERS, 2, 2)
    assert (grid.loops, grid.layers, grid.positions, grid.heads) == (
        (0, 1, 2),
        (0, 1),
        (1, 4),
        (0, 2),
    )
    shares = dict(zip(sweep.cells, sweep.normalized(), strict=True))
    wanted = Cell("loops.2.blocks.1.attn.hook_z", "z", 2, 1, 4, 2)
    assert grid.values[2, 1, 1, 1] == shares[wanted]
    embed = sweep.grid("embed", normalized=False)
    assert (embed.values.shape, embed.loops, embed.heads) == ((1, 1, 2, 1), (None,), (None,))
    with pytest.raises(
        ValueError, match="this sweep has the sites embed, z; name one of them, got None"
    ):
        sweep.grid()


# Engines


def test_both_engines_agree(model: RecurrentDepth) -> None:
    sites = ["resid_pre", "z", "pattern", "embed", "ln_final.scale", "mlp.post"]
    packed = activation_patch(model, CLEAN, CORRUPTED, projection(), 2, sites=sites)
    assert packable(model, padded())
    with model.hooks([("hook_embed", lambda value, hook: None)], n_loops=2):
        assert not packable(model, padded())
        continued = activation_patch(
            model, CLEAN, CORRUPTED, projection(), 2, sites=sites, max_bytes=100_000
        )
    assert packed.cells == continued.cells
    assert_close(packed.values, continued.values)


def test_models_whose_rows_are_not_alone_are_continued_whole(odd_model: LoopedModel) -> None:
    sweep = activation_patch(
        odd_model, full(1), full(2), projection(), 2, sites=["resid_mid"], positions=[2]
    )
    values = cached(odd_model, full(1), [cell.name for cell in sweep.cells], 2)
    for cell, value in zip(sweep.cells, sweep.values, strict=True):
        logits = run_hooked(
            odd_model, full(2), cell.name, put(values[cell.name], (slice(None), 2)), 2
        )
        assert_close(value, projection()(logits[torch.arange(BATCH), full(2).readout]))
    assert packable(odd_model, padded()) == (odd_model.causal and odd_model.batch_independent)


def test_gradients_can_be_on_outside_and_nothing_escapes(plain: RecurrentDepth) -> None:
    assert not activation_patch(plain, CLEAN, CORRUPTED, projection(), 2).values.requires_grad
    assert torch.is_grad_enabled()


def test_a_function_counts_with_the_globals_that_it_reads(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key() -> str:
        return fingerprint(plain, (), (), (reads_a_global,))

    before = key()
    assert key() == before
    monkeypatch.setitem(globals(), "WEIGHT", torch.tensor(3.0))
    assert key() != before


WEIGHT = torch.tensor(2.0)


def reads_a_global(logits: Tensor) -> Tensor:
    return WEIGHT * logits.sum(-1)
