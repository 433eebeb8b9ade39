"""Attribution patching: each estimate is the derivative that it claims to be, and how close it
comes to the exact patch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.circuits.edge_attribution import EdgeAttribution, edge_attribution
from loopscope.interp.common.metrics import logit_diff, logit_margin
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.sweep import Sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.questions import read_questions
from toy import (
    BATCH,
    BLOCK_SITES,
    D_MODEL,
    HEADS,
    LAYERS,
    BatchCentred,
    assert_close,
    full,
    hook_count,
    index_at,
    odd_one,
    padded,
    projection,
    random_tokens,
    run,
    toy,
    with_words,
)

SHORT = 2
PLACES = [2, 3, 4]
OWN_SITES = (
    "state_in",
    "state_out",
    "embed",
    "ln_final.scale",
    "ln_final.normalized",
    "ln_final.out",
)


def all_sites(model: RecurrentDepth) -> list[str]:
    extra = ("hook_input", "hook_injected") if model.cfg.input_injection else ()
    return [*BLOCK_SITES, *OWN_SITES, *extra, *(["pos_embed"] if model.positional else [])]


def total_change(sweep: Sweep) -> Tensor:
    return sweep.clean - sweep.corrupted


# The derivative


def slopes(model: RecurrentDepth, base: Batch, moves: list[tuple[str, Tensor]]) -> Tensor:
    """The derivative of the metric when a row's activations move by a share of each change, one
    variable for each, "move batch".
    """
    shares = torch.zeros(len(moves), BATCH, dtype=moves[0][1].dtype, requires_grad=True)

    def move(value: Tensor, hook: HookPoint) -> Tensor:
        for share, (name, change) in zip(shares, moves, strict=True):
            if name == hook.name:
                value = value + share.view(-1, *[1] * (value.ndim - 1)) * change
        return value

    names = list(dict(moves))
    logits = model.run_with_hooks(
        base.tokens, n_loops=SHORT, mask=base.mask, fwd_hooks=[(names, move)]
    )
    return torch.autograd.grad(
        projection()(logits[torch.arange(BATCH), base.readout]).sum(), shares
    )[0]


def naive(model: RecurrentDepth, source: Batch, base: Batch, found: Sweep) -> Tensor:
    """Each cell's derivative, the cell's part of the activation being moved towards the
    source's.
    """
    there, here = (
        model.run_with_cache(b.tokens, n_loops=SHORT, mask=b.mask, names_filter="**")[1]
        for b in (source, base)
    )
    moves = []
    for cell in found.cells:
        index, change = (
            index_at(cell.name, cell.position, cell.head),
            torch.zeros_like(here[cell.name]),
        )
        change[index] = torch.nan_to_num(there[cell.name] - here[cell.name])[
            index
        ]  # unseen scores are -inf in both
        moves.append((cell.name, change))
    return slopes(model, base, moves)


@pytest.mark.parametrize("injection", [False, True])
@pytest.mark.parametrize("positions", ["none", "learned", "sinusoidal"])
def test_every_cell_is_the_derivative_along_its_patch(positions: str, injection: bool) -> None:
    model, clean, corrupted = toy(positions, injection), padded(1), padded(2)
    found = attribution_patch(
        model, clean, corrupted, projection(), SHORT, sites=all_sites(model), positions=PLACES
    )
    assert {cell.name for cell in found.cells} == set(model.hook_names(SHORT))
    assert_close(found.values, found.corrupted + naive(model, clean, corrupted, found))


def test_heads_one_by_one_are_the_derivatives_along_their_patches(model: RecurrentDepth) -> None:
    clean, corrupted = padded(1), padded(2)
    options = {"sites": ["q", "z", "pattern"], "heads": [0, 3], "positions": [3], "layers": [1]}
    found = attribution_patch(model, clean, corrupted, projection(), SHORT, **options)
    assert {cell.head for cell in found.cells} == {0, 3}
    assert_close(found.values, found.corrupted + naive(model, clean, corrupted, found))


def test_families_that_say_no_to_a_fact(odd_model: RecurrentDepth) -> None:
    """For a model whose rows depend on each other a row's value is what its activation does to the
    metrics of all rows.
    """
    clean, corrupted = padded(1), padded(2)
    found = attribution_patch(
        odd_model, clean, corrupted, projection(), SHORT, sites=["resid_mid", "k"], positions=PLACES
    )
    assert_close(found.values, found.corrupted + naive(odd_model, clean, corrupted, found))


def twins(distance: float, injection: bool) -> tuple[RecurrentDepth, Batch, Batch]:
    """A model in which two tokens have almost the same embedding, and two inputs that differ by
    these tokens at one column.
    """
    model = toy("learned", injection)
    with torch.no_grad():
        model.embedding[5] = (
            model.embedding[6]
            + distance * torch.linspace(-1.0, 1.0, D_MODEL, dtype=torch.float64).sin()
        )
    clean = full(1)
    tokens = clean.tokens.clone()
    tokens[:, 3] = 5
    other = tokens.clone()
    other[:, 3] = 6
    return model, replace(clean, tokens=tokens), replace(clean, tokens=other)


def effects_at(distance: float, injection: bool) -> tuple[Tensor, Tensor, Sweep]:
    """Estimated and exact effects of every cell, "cell batch"."""
    model, clean, corrupted = twins(distance, injection)
    sites = [
        "embed",
        "state_in",
        "ln1.scale",
        "q",
        "attn_scores",
        "z",
        "mlp_out",
        *(["hook_input"] if injection else []),
    ]
    estimate = attribution_patch(
        model, clean, corrupted, projection(), SHORT, sites=sites, positions=[3]
    )
    exact = activation_patch(
        model, clean, corrupted, projection(), SHORT, sites=sites, positions=[3]
    )
    assert estimate.cells == exact.cells
    return estimate.values - estimate.corrupted, exact.values - exact.corrupted, estimate


@pytest.mark.parametrize("injection", [False, True])
def test_the_error_falls_with_the_square_of_the_patch(injection: bool) -> None:
    (far, far_exact, _), (near, near_exact, sweep) = (
        effects_at(2e-4, injection),
        effects_at(1e-4, injection),
    )
    assert (
        (far - far_exact).abs().max() / (near - near_exact).abs().max()
    ).item() == pytest.approx(4.0, rel=0.05)
    assert (far_exact.abs().max() / near_exact.abs().max()).item() == pytest.approx(2.0, rel=0.05)
    whole = next(
        i for i, cell in enumerate(sweep.cells) if cell.site == "embed" and cell.position == 3
    )
    assert torch.equal(near[whole].sign(), total_change(sweep).sign())
    assert (near[whole] - total_change(sweep)).abs().max() < 1e-2 * total_change(sweep).abs().min()


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_exact_where_the_metric_is_linear(steps: int, model: RecurrentDepth) -> None:
    clean, corrupted, sites = padded(1), padded(2), ["ln_final.normalized"]
    metric = logit_diff(torch.tensor([3, 5, 7]), torch.tensor([4, 4, 4]))
    exact = activation_patch(model, clean, corrupted, metric, SHORT, sites=sites)
    found = attribution_patch(model, clean, corrupted, metric, SHORT, sites=sites, steps=steps)
    assert found.cells == exact.cells
    assert found.metric == exact.metric == "logit_diff"
    for ours, theirs in zip(
        (found.values, found.clean, found.corrupted),
        (exact.values, exact.clean, exact.corrupted),
        strict=True,
    ):
        assert_close(ours, theirs)


def test_heads_sum_to_the_whole_site(model: RecurrentDepth) -> None:
    options = {"sites": ["z", "k", "pattern"], "positions": [1, 3]}
    whole = attribution_patch(model, padded(1), padded(2), projection(), SHORT, **options)
    split = attribution_patch(
        model, padded(1), padded(2), projection(), SHORT, heads="all", **options
    )
    assert [cell.head for cell in split.cells] == [*range(HEADS)] * len(whole.cells)
    effects = (split.values - split.corrupted).view(-1, HEADS, BATCH).sum(1)
    assert_close(whole.values, whole.corrupted + effects)


def test_noise_is_denoise_with_the_runs_exchanged(model: RecurrentDepth) -> None:
    first, second, sites = padded(1), padded(2), ["mlp_out", "state_in"]
    noised = attribution_patch(
        model, first, second, projection(), SHORT, sites=sites, direction="noise"
    )
    denoised = attribution_patch(model, second, first, projection(), SHORT, sites=sites)
    assert_close(noised.values, denoised.values)
    assert_close(noised.clean, denoised.corrupted)
    assert noised.direction == "noise"


def test_identical_inputs_have_no_effect(plain: RecurrentDepth) -> None:
    for steps in (0, 2):
        found = attribution_patch(
            plain,
            padded(),
            padded(),
            projection(),
            SHORT,
            sites=["resid_mid", "attn_scores"],
            steps=steps,
        )
        assert_close(found.values, found.clean.expand_as(found.values))


def test_gradients_may_be_switched_off_outside(plain: RecurrentDepth) -> None:
    expected = attribution_patch(plain, padded(1), padded(2), projection(), SHORT)
    plain.requires_grad_(False)
    with torch.no_grad():
        found = attribution_patch(plain, padded(1), padded(2), projection(), SHORT)
    assert_close(found.values, expected.values)
    assert not any(
        value.requires_grad for value in (expected.values, expected.clean, expected.corrupted)
    )


# Integrated gradients


LAST = {"loops": [SHORT - 1], "layers": [LAYERS - 1]}


def errors(model: RecurrentDepth, site: str, cells: slice, steps: list[int]) -> list[float]:
    """How far the effects of some cells at the last visit are from the whole change, by the number
    of steps.
    """
    sweeps = [
        attribution_patch(model, full(1), full(2), projection(), SHORT, sites=site, steps=n, **LAST)
        for n in steps
    ]
    return [
        ((s.values - s.corrupted)[cells].sum(0) - total_change(s)).abs().max().item()
        for s in sweeps
    ]


@pytest.mark.parametrize("injection", [False, True])
@pytest.mark.parametrize(
    ("site", "cells"),
    [("resid_post", slice(-1, None)), ("resid_mid", slice(-1, None)), ("resid_post", slice(None))],
)
def test_at_the_last_visit_more_steps_approach_the_exact_patch(
    site: str, cells: slice, injection: bool
) -> None:
    """Only the readout's column matters there, so patching it alone gives the other run's
    metric.
    """
    model = toy("learned", injection)
    exact = activation_patch(model, full(1), full(2), projection(), SHORT, sites=site, **LAST)
    assert_close(exact.values[-1], exact.clean)
    one, coarse, fine = errors(model, site, cells, [0, 32, 64])
    assert fine < 2e-3 * one
    assert coarse / fine == pytest.approx(4.0, rel=0.1)  # the midpoint rule is of second order


@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_steps_side_by_side_change_nothing(batch_size: int, plain: RecurrentDepth) -> None:
    options = {"sites": ["attn_out", "attn_scores"], "steps": 5, **LAST}
    expected = attribution_patch(
        plain, padded(1), padded(2), logit_margin(torch.tensor([3, 5, 7])), SHORT, **options
    )
    found = attribution_patch(
        plain,
        padded(1),
        padded(2),
        logit_margin(torch.tensor([3, 5, 7])),
        SHORT,
        batch_size=batch_size,
        **options,
    )
    assert_close(found.values, expected.values)


def test_rows_that_depend_on_each_other_are_not_put_side_by_side() -> None:
    model, options = odd_one(BatchCentred), {"sites": ["attn_out"], "steps": 3, **LAST}
    expected = attribution_patch(
        model, padded(1), padded(2), projection(), SHORT, batch_size=1, **options
    )
    assert_close(
        attribution_patch(model, padded(1), padded(2), projection(), SHORT, **options).values,
        expected.values,
    )


@pytest.mark.shapes
def test_integrated_gradients_of_a_whole_stream_sum_to_the_whole_change(
    plain: RecurrentDepth,
) -> None:
    """Moving every position of one hook point of the residual stream moves all that comes after."""
    found = attribution_patch(
        plain,
        full(1),
        full(2),
        projection(),
        SHORT,
        sites="resid_pre",
        loops=[1],
        layers=[1],
        steps=200,
    )
    effects = (found.values - found.corrupted).sum(0)
    torch.testing.assert_close(effects, total_change(found), rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("site", ["attn_scores", "state_in", "ln2.scale"])
def test_integrated_gradients_are_the_mean_of_moved_gradients(
    site: str, plain: RecurrentDepth
) -> None:
    """Two steps: the gradients a quarter and three quarters of the way."""
    clean, corrupted = padded(1), padded(2)
    found = attribution_patch(
        plain,
        clean,
        corrupted,
        projection(),
        SHORT,
        sites=[site],
        positions=[3],
        loops=[1],
        steps=2,
    )
    caches = [
        plain.run_with_cache(b.tokens, n_loops=SHORT, mask=b.mask, names_filter="**")[1]
        for b in (clean, corrupted)
    ]
    for cell, value in zip(found.cells, found.values, strict=True):
        there, here = (cache[cell.name] for cache in caches)
        whole = torch.where(there == here, 0.0, there - here)
        part = torch.zeros_like(whole)
        part[index_at(cell.name, 3)] = whole[index_at(cell.name, 3)]
        found_slopes = []
        for share in (0.25, 0.75):
            with plain.hooks(
                [(cell.name, lambda _, hook, at=here + share * whole: at)], n_loops=SHORT
            ):
                found_slopes.append(slopes(plain, corrupted, [(cell.name, part)])[0])
        assert_close(value, found.corrupted + torch.stack(found_slopes).mean(0))


# A trained model


@pytest.mark.parametrize(("hops", "steps", "least"), [(2, 0, 0.7), (3, 0, 0.3), (3, 4, 0.75)])
def test_estimates_rank_the_cells_of_a_trained_model(hops: int, steps: int, least: float) -> None:
    """Each clean question is patched into another one, so the changes are large: one gradient ranks
    longer chains less well.
    """
    model = load("ltg_trained")
    questions = [
        q for q in read_questions(SHIPPED / "ltg_trained" / "test.json") if q.hops == hops
    ][:16]
    answers = torch.tensor([model.to_single_token(q.answer) for q in questions])
    clean = model.encode([q.text for q in questions])
    corrupted, metric = clean[torch.arange(16).roll(1)], logit_diff(answers, answers.roll(1))
    found = attribution_patch(model, clean, corrupted, metric, 4, steps=steps)
    exact = activation_patch(model, clean, corrupted, metric, 4)
    ranks = pd.DataFrame(
        {"estimate": found.normalized().numpy(), "exact": exact.normalized().numpy()}
    ).rank()
    spearman = ranks["estimate"].corr(ranks["exact"])
    print(f"{hops} hops, {steps} steps: rank correlation {spearman:.3f} over {len(ranks)} cells")
    assert spearman >= least


# Arguments and refusals


@pytest.mark.shapes
def test_inputs_may_be_texts_or_tokens_with_a_column(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    clean, corrupted = ["<t_3><t_9><t_4>", "<t_8><t_1>"], ["<t_3><t_2><t_4>", "<t_5><t_1>"]
    methods: list[Callable[..., Sweep | EdgeAttribution]] = [attribution_patch, edge_attribution]
    for method in methods:
        expected = method(model, model.encode(clean), model.encode(corrupted), projection(), SHORT)
        assert_close(method(model, clean, corrupted, projection(), SHORT).values, expected.values)
        by_column = method(
            model, random_tokens(1), random_tokens(2), projection(), SHORT, readout=-1
        )
        assert_close(by_column.values, method(model, full(1), full(2), projection(), SHORT).values)


def test_metrics_see_the_logits_at_the_readout(plain: RecurrentDepth) -> None:
    metric = logit_margin(torch.tensor([3, 5, 7]))
    found = attribution_patch(plain, padded(1), padded(2), metric, sites="embed")
    assert_close(found.clean, metric(run(plain, padded(1))[torch.arange(BATCH), padded().readout]))


REFUSED = {
    "a place": ({"positions": [7]}, ValueError, r"positions must be in 0\.\.6, got 7"),
    "a site": ({"sites": "nowhere"}, KeyError, "no site 'nowhere'"),
    "steps": (
        {"steps": -1},
        ValueError,
        "steps must be at least 0, got -1",
    ),
    "a direction": (
        {"direction": "forwards"},
        (ValueError, TypeError),
        "direction",
    ),  # TypeError where the test run checks types
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_nothing_behind(case: str, plain: RecurrentDepth) -> None:
    options, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        attribution_patch(plain, padded(1), padded(2), projection(), SHORT, **options)
    assert hook_count(plain) == 0


def test_inputs_that_do_not_match_are_refused(plain: RecurrentDepth) -> None:
    for method in (attribution_patch, edge_attribution):
        with pytest.raises(
            ValueError, match="each clean input must be as long as its corrupted one"
        ):
            method(plain, padded(1), padded(2, lengths=(7, 5, 5)), projection())


def test_a_failing_metric_leaves_nothing_behind(plain: RecurrentDepth) -> None:
    def fails(logits: Tensor) -> Tensor:
        raise RuntimeError("no metric")

    for method in (attribution_patch, edge_attribution):
        with pytest.raises(RuntimeError, match="no metric"):
            method(plain, padded(1), padded(2), fails, SHORT)
        assert hook_count(plain) == 0
