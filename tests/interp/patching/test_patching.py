"""Activation patching: what a sweep holds, what it computes, and what it refuses."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from loopscope.interp.common.cells import Cell
from loopscope.interp.common.metrics import logit_diff, logit_margin
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_VOCAB,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    assert_close,
    full,
    padded,
    projection,
    random_tokens,
    toy,
    with_words,
)

CHANGED = 3


def one_token_apart() -> tuple[Batch, Batch]:
    """A clean and a corrupted batch that differ at one column only."""
    clean = full(seed=1)
    tokens = clean.tokens.clone()
    tokens[:, CHANGED] = tokens[:, CHANGED] % (D_VOCAB - 1) + 1
    return clean, replace(clean, tokens=tokens)


def sweep_of(values: list[list[float]], clean: list[float], corrupted: list[float]) -> Sweep:
    cells = tuple(
        Cell(f"loops.{i}.hook_state_in", "state_in", i, None, i, None) for i in range(len(values))
    )
    return Sweep(
        cells,
        torch.tensor(values),
        torch.tensor(clean),
        torch.tensor(corrupted),
        "margin",
        "denoise",
    )


# Values


def test_normalized_by_hand() -> None:
    sweep = sweep_of(
        [[1.0, 3.0], [5.0, 7.0], [2.0, 6.0], [7.0, 9.0]], clean=[5.0, 7.0], corrupted=[1.0, 3.0]
    )
    assert sweep.normalized().tolist() == [0.0, 1.0, 0.5, 1.5]


def test_normalized_needs_two_different_runs() -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"clean and the corrupted run have the same mean margin \(2\), so effects have no scale"
        ),
    ):
        sweep_of([[1.0, 3.0]], clean=[1.0, 3.0], corrupted=[2.0, 2.0]).normalized()


@pytest.mark.parametrize(
    ("direction", "recovered", "untouched"), [("denoise", 1.0, 0.0), ("noise", 0.0, 1.0)]
)
def test_patching_all_that_differs_gives_the_other_run(
    direction: str, recovered: float, untouched: float, model: RecurrentDepth
) -> None:
    """The inputs differ at one column, so its embedding is the whole difference and the other
    columns' are none of it.
    """
    clean, corrupted = one_token_apart()
    sites = ["embed"]
    found = activation_patch(
        model, clean, corrupted, projection(), LOOPS, sites=sites, direction=direction
    ).normalized()
    expected = torch.full((POS,), untouched, dtype=found.dtype)
    expected[CHANGED] = recovered
    torch.testing.assert_close(
        found, expected, rtol=0.0, atol=1e-9 if found.dtype == torch.float64 else 1e-3
    )


def test_no_patch_before_the_change_has_an_effect(model: RecurrentDepth) -> None:
    clean, corrupted = one_token_apart()
    sweep = activation_patch(model, clean, corrupted, projection(), LOOPS, sites=["resid_pre", "z"])
    for cell, value in zip(sweep.cells, sweep.values, strict=True):
        if cell.position < CHANGED:
            assert_close(value, sweep.corrupted)


def test_identical_inputs_have_no_effect_anywhere(plain: RecurrentDepth) -> None:
    sweep = activation_patch(
        plain, padded(), padded(), projection(), LOOPS, sites=["resid_mid", "pattern"]
    )
    assert torch.equal(sweep.clean, sweep.corrupted)
    assert_close(sweep.values, sweep.clean.expand_as(sweep.values))
    with pytest.raises(ValueError, match="effects have no scale"):
        sweep.normalized()


def test_noise_is_denoise_with_the_runs_exchanged(model: RecurrentDepth) -> None:
    first, second = padded(seed=1), padded(seed=2)
    noised = activation_patch(
        model, first, second, projection(), 2, sites=["mlp_out", "state_in"], direction="noise"
    )
    denoised = activation_patch(
        model, second, first, projection(), 2, sites=["mlp_out", "state_in"], direction="denoise"
    )
    assert_close(noised.values, denoised.values)
    assert_close(noised.clean, denoised.corrupted)
    assert noised.direction == "noise"


@pytest.mark.parametrize("max_bytes", [1, 10_000, 50_000, 1 << 30])
@pytest.mark.parametrize("sites", [["q", "embed", "state_out"], ["ln_final.normalized", "pattern"]])
def test_number_of_runs_side_by_side_changes_nothing(
    sites: list[str], max_bytes: int, plain: RecurrentDepth
) -> None:
    expected = activation_patch(plain, padded(1), padded(2), projection(), 2, sites=sites)
    found = activation_patch(
        plain, padded(1), padded(2), projection(), 2, sites=sites, max_bytes=max_bytes
    )
    assert found.cells == expected.cells
    assert_close(found.values, expected.values)


def test_metrics_see_the_logits_at_the_readout(plain: RecurrentDepth) -> None:
    clean, corrupted = padded(1), padded(2)
    answers = torch.tensor([3, 5, 7])
    sweep = activation_patch(
        plain, clean, corrupted, logit_margin(answers), LOOPS, sites=["embed"], positions=[0]
    )
    logits = plain(clean.tokens, n_loops=LOOPS, mask=clean.mask)[torch.arange(BATCH), clean.readout]
    assert_close(sweep.clean, logit_margin(answers)(logits))
    assert sweep.metric == "logit_margin"
    assert (
        activation_patch(
            plain, clean, corrupted, logit_diff(answers, answers + 1), 1, positions=[0]
        ).metric
        == "logit_diff"
    )


def test_effects_move_with_the_iterations(plain: RecurrentDepth) -> None:
    """Later patches of the changed column recover no more than the embedding; at the readout of the
    last visit all is recovered.
    """
    clean, corrupted = one_token_apart()
    sweep = activation_patch(plain, clean, corrupted, projection(), LOOPS, sites=["state_out"])
    by_place = dict(
        zip(
            ((cell.loop, cell.position) for cell in sweep.cells),
            sweep.normalized().tolist(),
            strict=True,
        )
    )
    assert by_place[LOOPS - 1, POS - 1] == pytest.approx(1.0)
    assert by_place[LOOPS - 1, CHANGED] == pytest.approx(0.0, abs=1e-9)
    assert abs(by_place[0, CHANGED]) > 1e-3


def blocks_run(model: RecurrentDepth, loop: int, layer: int) -> int:
    calls = []
    handles = [
        block.register_forward_hook(lambda *arguments: calls.append(1)) for block in model.blocks
    ]
    activation_patch(
        model,
        full(1),
        full(2),
        projection(),
        LOOPS,
        sites=["resid_mid"],
        positions=[0, 5],
        loops=[loop],
        layers=[layer],
    )
    for handle in handles:
        handle.remove()
    return len(calls)


def test_sweep_never_runs_again_what_the_patch_cannot_reach(plain: RecurrentDepth) -> None:
    first, last = blocks_run(plain, 0, 0), blocks_run(plain, LOOPS - 1, LAYERS - 1)
    assert first - last == LOOPS * LAYERS - 1


# Cells


def test_default_sites_are_the_residual_stream_at_every_position(plain: RecurrentDepth) -> None:
    sweep = activation_patch(plain, padded(1), padded(2), projection())
    expected = [
        Cell(f"loops.{t}.blocks.{layer}.hook_resid_pre", "resid_pre", t, layer, position, None)
        for t, layer, position in itertools.product(range(LOOPS), range(LAYERS), range(POS))
    ]
    assert sweep.cells == tuple(expected)
    assert sweep.values.shape == (len(expected), BATCH)


def test_cells_of_sites_without_a_layer_or_an_iteration(plain: RecurrentDepth) -> None:
    sites = ["ln_final.normalized", "state_in", "embed"]
    sweep = activation_patch(
        plain, padded(1), padded(2), projection(), 2, sites=sites, positions=[4]
    )
    assert sweep.cells == (
        Cell("hook_embed", "embed", None, None, 4, None),
        Cell("loops.0.hook_state_in", "state_in", 0, None, 4, None),
        Cell("loops.1.hook_state_in", "state_in", 1, None, 4, None),
        Cell("ln_final.hook_normalized", "ln_final.normalized", None, None, 4, None),
    )


@pytest.mark.parametrize("site", ["z", "hook_z", "attn.z", "attn.hook_z"])
def test_sites_may_be_written_short_or_in_full(site: str, plain: RecurrentDepth) -> None:
    sweep = activation_patch(
        plain, padded(1), padded(2), projection(), 1, sites=[site], positions=[0]
    )
    assert [cell.name for cell in sweep.cells] == [
        "loops.0.blocks.0.attn.hook_z",
        "loops.0.blocks.1.attn.hook_z",
    ]


def test_a_site_that_could_be_several_is_shown_in_full(plain: RecurrentDepth) -> None:
    sweep = activation_patch(
        plain, padded(1), padded(2), projection(), 1, sites="scale", positions=[0], layers=[0]
    )
    assert list(sweep.frame()["site"]) == ["ln1.scale", "ln2.scale"]


def test_heads_one_by_one_where_the_site_has_heads(plain: RecurrentDepth) -> None:
    sweep = activation_patch(
        plain,
        padded(1),
        padded(2),
        projection(),
        1,
        sites=["z", "resid_pre"],
        positions=[2],
        heads="all",
    )
    by_site = {
        site: [cell.head for cell in sweep.cells if cell.name.endswith(site)]
        for site in ("hook_z", "hook_resid_pre")
    }
    assert by_site == {"hook_z": [*range(HEADS)] * LAYERS, "hook_resid_pre": [None] * LAYERS}


def test_loops_and_layers_restrict_a_sweep(plain: RecurrentDepth) -> None:
    options = {"sites": ["mlp_out", "state_in"], "positions": [1]}
    loops = activation_patch(
        plain, padded(1), padded(2), projection(), LOOPS, loops=[3, 1], **options
    )
    assert [(cell.loop, cell.layer) for cell in loops.cells] == [
        (1, None),
        (1, 0),
        (1, 1),
        (3, None),
        (3, 0),
        (3, 1),
    ]
    layers = activation_patch(plain, padded(1), padded(2), projection(), 2, layers=[1], **options)
    assert [(cell.loop, cell.layer) for cell in layers.cells] == [(0, 1), (1, 1)]


def test_frame_columns(plain: RecurrentDepth) -> None:
    sweep = activation_patch(
        plain,
        padded(1),
        padded(2),
        projection(),
        2,
        sites=["embed", "state_in", "z", "ln1.scale"],
        heads=[0, 4],
        positions=[1],
    )
    frame = sweep.frame()
    assert list(frame.columns) == [
        "site",
        "visit",
        "loop",
        "layer",
        "position",
        "head",
        "metric",
        "value",
        "standard_error",
        "examples",
    ]
    assert set(frame["examples"]) == {BATCH}
    assert list(frame["visit"])[:2] == ["", "loops.0"]
    assert len(frame) == len(sweep.cells) == 1 + 2 + 4 * 2 + 4
    assert frame["value"].tolist() == sweep.values.mean(1).tolist()
    assert set(frame["metric"]) == {"projection"}
    assert set(frame["site"]) == {"embed", "state_in", "z", "ln1.scale"}
    for column in ("loop", "layer", "position", "head"):
        found = [
            None if value is None else int(value)
            for value in (getattr(cell, column) for cell in sweep.cells)
        ]
        assert [
            None if missing else int(value)
            for value, missing in zip(frame[column], frame[column].isna(), strict=True)
        ] == found


def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    clean, corrupted = ["<t_3><t_9><t_4>", "<t_8><t_1>"], ["<t_3><t_2><t_4>", "<t_5><t_1>"]
    expected = activation_patch(
        model, model.encode(clean), model.encode(corrupted), projection(), 2
    )
    assert_close(activation_patch(model, clean, corrupted, projection(), 2).values, expected.values)
    by_column = activation_patch(
        model, random_tokens(1), random_tokens(2), projection(), 2, readout=-1
    )
    assert_close(
        by_column.values, activation_patch(model, full(1), full(2), projection(), 2).values
    )


def test_number_of_iterations_may_be_unknown_to_the_checkpoint() -> None:
    known, unknown = toy(n_loops=2), toy(n_loops=None)
    for site in ("resid_pre", "embed"):
        expected = activation_patch(known, padded(1), padded(2), projection(), sites=[site])
        assert_close(
            activation_patch(unknown, padded(1), padded(2), projection(), 2, sites=[site]).values,
            expected.values,
        )
    with pytest.raises(ValueError, match="records no number of iterations"):
        activation_patch(unknown, padded(1), padded(2), projection())


# What a sweep refuses


def with_readout(batch: Batch, columns: list[int]) -> Batch:
    return replace(batch, readout=torch.tensor(columns))


@pytest.mark.parametrize(
    ("corrupted", "message"),
    [
        (padded(2, width=POS + 2), r"must have one shape, got \[3, 7\] and \[3, 9\]"),
        (padded(2, lengths=(7, 4)), r"must have one shape, got \[3, 7\] and \[2, 7\]"),
        (padded(2, lengths=(7, 5, 5)), "each clean input must be as long as its corrupted one"),
        (with_readout(padded(2), [6, 3, 3]), "be read at the same column"),
    ],
)
def test_inputs_that_do_not_match_are_refused(
    corrupted: Batch, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        activation_patch(plain, padded(1), corrupted, projection())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [0, 7]}, r"positions must be in 0\.\.6, got 7"),
        ({"positions": [-1]}, r"positions must be in 0\.\.6, got -1"),
        ({"sites": ["z"], "heads": [5]}, r"heads must be in 0\.\.4, got 5"),
        ({"loops": [4]}, r"loops must be in 0\.\.3, got 4"),
        ({"layers": [2]}, r"layers must be in 0\.\.1, got 2"),
        (
            {"sites": ["embed"], "loops": [0]},
            r"no cell is left: the sites \['embed'\] do not occur at loops=\[0\], layers=None",
        ),
        ({"sites": ["state_in"], "layers": [0]}, "no cell is left"),
        ({"positions": []}, "no cell is left"),
    ],
)
def test_places_out_of_range_are_refused(
    options: dict, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        activation_patch(plain, padded(1), padded(2), projection(), LOOPS, **options)


@pytest.mark.parametrize(
    "site", ["nowhere", "resid", "loops.0.blocks.0.hook_resid_pre", "pos_embed"]
)
def test_unknown_site_is_refused_with_the_known_ones(site: str, plain: RecurrentDepth) -> None:
    with pytest.raises(
        KeyError, match=f"no site '{site}'; its sites are attn.hook_attn_scores, .*hook_resid_pre"
    ):
        activation_patch(plain, padded(1), padded(2), projection(), sites=["resid_pre", site])


def test_unknown_direction_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(
        (ValueError, TypeError), match="direction"
    ):  # TypeError where the test run checks types
        activation_patch(plain, padded(1), padded(2), projection(), direction="forwards")
