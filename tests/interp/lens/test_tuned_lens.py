"""Tuned lenses: untrained they are the logit lens, trained they foretell the answer better, and the
model stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.interp.lens import tuned_job
from loopscope.interp.lens.lens import logit_lens
from loopscope.interp.lens.record import Lens
from loopscope.interp.lens.tuned_lens import TunedLens
from loopscope.interp.lens.tuned_training import train_tuned_lens, tuned_lens_kl
from loopscope.models.basis.tokens import Batch, pad_right
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.graphs import PermutationGraph
from loopscope.tasks.multi_hop import sample_facts
from paths import SHIPPED
from toy import (
    BATCH,
    D_MODEL,
    LAYERS,
    LENGTHS,
    LOOPS,
    POS,
    assert_close,
    cached,
    explode,
    full,
    hook_count,
    padded,
    random_tokens,
    randomize_,
    run,
    toy,
)

GRAPH = SHIPPED / "ltg_trained" / "graph.json"
VISITS = LOOPS * LAYERS
QUICK = {"steps": 3, "batch_size": 2}


def random_lens(model: LoopedModel, n_loops: int = LOOPS) -> TunedLens:
    """Translators far from the identity."""
    start, generator = TunedLens.identity(model, n_loops), torch.Generator().manual_seed(3)
    weights, biases = (
        0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)
        for x in (start.weights, start.biases)
    )
    return replace(start, weights=weights, biases=biases)


def kl_to_final(final: Tensor, lens: Lens) -> Tensor:
    """KL(final || lens), "visit read", by its definition."""
    visits = [
        lens.logits_at(torch.full_like(lens.example, visit)) for visit in range(len(lens.names))
    ]
    target, log_probs = final.log_softmax(-1), torch.stack(visits).log_softmax(-1)
    return (target.exp() * (target - log_probs)).sum(-1)


# Reading


@pytest.mark.parametrize(
    "options", [{}, {"positions": "all"}, {"positions": [5, 0]}, {"batch_size": 2}]
)
def test_untrained_tuned_lens_is_the_logit_lens_exactly(
    options: dict, model: RecurrentDepth
) -> None:
    tuned, plain = (
        TunedLens.identity(model, LOOPS).lens(model, padded(), **options),
        logit_lens(model, padded(), LOOPS, **options),
    )
    assert torch.equal(tuned.heads_input, plain.heads_input)
    assert (tuned.names, tuned.loops, tuned.layers) == (plain.names, plain.loops, plain.layers)
    assert torch.equal(tuned.example, plain.example)
    assert torch.equal(tuned.position, plain.position)
    answers = torch.arange(len(tuned.example)) % 29
    assert tuned.frame(answers).equals(plain.frame(answers))


@pytest.mark.shapes
def test_untrained_tuned_lens_of_any_family(odd_model: LoopedModel) -> None:
    assert torch.equal(
        TunedLens.identity(odd_model).lens(odd_model, padded()).heads_input,
        logit_lens(odd_model, padded()).heads_input,
    )


def test_translators_by_their_definition(model: RecurrentDepth) -> None:
    tuned, cache = random_lens(model), cached(model, padded(), "loops.*.blocks.*.hook_resid_post")
    found = tuned.lens(model, padded(), positions="all")
    for visit, name in enumerate(found.names):
        resid = cache[f"{name}.hook_resid_post"].flatten(0, 1)
        expected = torch.stack(
            [
                model.normalize((h + tuned.weights[visit] @ h + tuned.biases[visit])[None, None])[
                    0, 0
                ]
                for h in resid
            ]
        )
        assert_close(found.heads_input[visit], expected)


def test_reading_in_pieces_gives_the_same(plain: RecurrentDepth) -> None:
    tuned = random_lens(plain)
    whole, pieces = (
        tuned.lens(plain, padded(), positions=[1, 4], batch_size=size).heads_input
        for size in (512, 2)
    )
    assert_close(pieces, whole)


def test_inputs_may_be_tokens_with_a_column(plain: RecurrentDepth) -> None:
    tuned = TunedLens.identity(plain)
    assert len(tuned.names) == VISITS
    assert torch.equal(
        tuned.lens(plain, random_tokens(), readout=-1).heads_input,
        tuned.lens(plain, full()).heads_input,
    )
    trained = (
        train_tuned_lens(plain, inputs, **QUICK, **readout)
        for inputs, readout in ((random_tokens(), {"readout": -1}), (full(), {}))
    )
    assert torch.equal(*(lens.weights for lens in trained))


# Training


@pytest.mark.parametrize("positions", ["readout", "real", [0, 5]])
def test_loss_is_the_kl_to_what_the_run_answers(positions: object, model: RecurrentDepth) -> None:
    """The first step, with all reads in its batch, has the loss of the logit lens."""
    found = train_tuned_lens(model, padded(), LOOPS, positions=positions, steps=1)
    lens, final = (
        logit_lens(model, padded(), LOOPS, positions="all"),
        run(model, padded()).flatten(0, 1),
    )
    shown = {
        "readout": [i * POS + n - 1 for i, n in enumerate(LENGTHS)],
        "real": [i * POS + j for i, n in enumerate(LENGTHS) for j in range(n)],
    }.get(str(positions), [i * POS + j for i in range(BATCH) for j in (0, 5)])
    assert found.losses.shape == (1, VISITS)
    assert_close(found.losses[0], kl_to_final(final, lens)[:, shown].mean(1))


def test_training_lowers_every_loss_but_the_last_which_is_zero(model: RecurrentDepth) -> None:
    found = train_tuned_lens(model, padded(), LOOPS, steps=40)
    assert (found.losses[-1] < found.losses[0])[:-1].all()
    assert found.losses[:, -1].abs().max() < 1e-6
    assert (found.weights[-1] == 0).all()
    final = run(model, padded())[torch.arange(BATCH), padded().readout]
    assert (kl_to_final(final, found.lens(model, padded())).mean(1) < found.losses[0])[:-1].all()


def test_gradients_are_those_of_one_visit_at_a_time(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    monkeypatch.setattr(tuned_job, "LOGITS_AT_ONCE", 1)
    monkeypatch.setattr(tuned_job, "_ROWS", 2)
    chunked = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    assert_close(chunked.losses, whole.losses)
    assert_close(chunked.weights, whole.weights)


def test_first_step_goes_against_the_gradient(plain: RecurrentDepth) -> None:
    """Adam's first step is the learning rate, against the sign of the gradient, which differences
    give here.
    """
    found = train_tuned_lens(plain, padded(), LOOPS, steps=1, lr=1e-2)
    final = run(plain, padded())[torch.arange(BATCH), padded().readout]
    for place in ((2, 7), (5, 30)):
        losses = []
        for distance in (1e-5, -1e-5):
            moved = TunedLens.identity(plain, LOOPS)
            moved.biases[place] += distance
            losses.append(kl_to_final(final.detach(), moved.lens(plain, padded()))[place[0]].mean())
        slope = (losses[0] - losses[1]) / 2e-5
        assert slope.abs() > 1e-6
        assert found.biases[place].item() == pytest.approx(-1e-2 * slope.sign().item(), rel=1e-3)


def test_decay_pulls_to_the_logit_lens(plain: RecurrentDepth) -> None:
    free, held = (
        train_tuned_lens(plain, padded(), LOOPS, steps=40, weight_decay=decay)
        for decay in (0.0, 100.0)
    )
    assert held.weights.norm() < 0.8 * free.weights.norm()


def test_model_stays_as_it_is(plain: RecurrentDepth) -> None:
    before = {name: value.clone() for name, value in plain.state_dict().items()}
    plain.blocks[0].mlp.W_in.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in plain.parameters()]
    with torch.no_grad():
        found = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    assert all(torch.equal(value, before[name]) for name, value in plain.state_dict().items())
    assert all(parameter.grad is None for parameter in plain.parameters())
    assert [parameter.requires_grad for parameter in plain.parameters()] == flags
    assert hook_count(plain) == 0
    assert not any(value.requires_grad for value in (found.weights, found.biases, found.losses))


def test_nothing_is_left_behind_after_an_error(plain: RecurrentDepth) -> None:
    with plain.hooks([("loops.1.hook_state_out", explode)], n_loops=LOOPS):
        before = hook_count(plain)
        with pytest.raises(RuntimeError, match="a hook failed"):
            train_tuned_lens(plain, padded(), LOOPS, **QUICK)
        assert hook_count(plain) == before


def test_seed_decides_the_lens(plain: RecurrentDepth) -> None:
    first, again, other = (
        train_tuned_lens(plain, padded(), LOOPS, **QUICK, seed=seed) for seed in (0, 0, 1)
    )
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.losses, again.losses)
    assert not torch.equal(first.losses, other.losses)


@pytest.mark.parametrize("options", [{"steps": 0}, {"batch_size": 0}, {"lr": 0.0}])
def test_training_that_cannot_be_is_refused(options: dict, plain: RecurrentDepth) -> None:
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} must be "):
        train_tuned_lens(plain, padded(), LOOPS, **options)


def test_a_kl_that_cannot_be_is_refused(plain: RecurrentDepth) -> None:
    tuned = TunedLens.identity(plain, LOOPS)
    with pytest.raises(ValueError, match=f"here {LOOPS}, got n_loops={LOOPS + 1}; leave it out"):
        tuned_lens_kl(plain, padded(), tuned, LOOPS + 1)
    kl = tuned_lens_kl(plain, padded(), tuned, LOOPS)
    assert torch.equal(kl.kl, tuned_lens_kl(plain, padded(), tuned).kl)
    with torch.no_grad():
        plain.W_E.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"the residuals at visit loops\.0"):
        tuned_lens_kl(plain, padded(), n_loops=LOOPS)


def test_frame_holds_the_losses(plain: RecurrentDepth) -> None:
    found = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    frame = found.frame()
    assert list(frame.columns) == ["step", "visit", "loop", "layer", "loss"]
    assert len(frame) == 3 * VISITS
    row = frame[(frame.step == 1) & (frame.loop == 1) & (frame.layer == 1)].to_dict("records")
    assert [(r["visit"], r["loss"]) for r in row] == [
        ("loops.1.blocks.1", found.losses[1, 3].item())
    ]
    assert TunedLens.identity(plain).frame().empty


def test_a_lens_of_hooked_runs_is_for_the_model_without_the_hook(plain: RecurrentDepth) -> None:
    places = (slice(None), slice(0, 2))  # held by a hook, as any object may be

    def halve(value: torch.Tensor, hook: object) -> torch.Tensor:
        changed = value.clone()
        changed[places] = 0.5 * changed[places]
        return changed

    with plain.hooks([("loops.1.blocks.0.hook_mlp_out", halve)], n_loops=LOOPS):
        hooked = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    free = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    assert not torch.equal(hooked.losses, free.losses)
    hooked.check(plain)


# Files


def test_saved_and_loaded_is_the_same(tmp_path: Path, plain: RecurrentDepth) -> None:
    found = train_tuned_lens(plain, padded(), LOOPS, **QUICK)
    found.save(tmp_path / "lens.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["lens.safetensors"]
    for loaded in (
        TunedLens.load(tmp_path / "lens.safetensors"),
        TunedLens.load(tmp_path / "lens.safetensors", toy()),
    ):
        for name in ("weights", "biases", "losses"):
            assert torch.equal(getattr(loaded, name), getattr(found, name))
        assert (loaded.names, loaded.n_loops, loaded.family, loaded.fingerprint) == (
            found.names, found.n_loops, found.family, found.fingerprint,
        )  # fmt: skip
        assert torch.equal(
            loaded.lens(plain, padded()).heads_input, found.lens(plain, padded()).heads_input
        )


def test_another_model_is_refused(tmp_path: Path, plain: RecurrentDepth) -> None:
    tuned, path = TunedLens.identity(plain, LOOPS), tmp_path / "lens.safetensors"
    tuned.save(path)
    other = randomize_(toy(), seed=1)
    for refused in (lambda: TunedLens.load(path, other), lambda: tuned.lens(other, padded())):
        with pytest.raises(
            ValueError,
            match=(
                "for a model with other weights or another configuration; train one for this model"
            ),
        ):
            refused()
    with pytest.raises(
        ValueError,
        match=rf"for a recurrent_depth model with d_model={D_MODEL}, got a .* with d_model=48",
    ):
        TunedLens.load(path, load("ltg_trained"))


def test_files_that_hold_something_else_are_refused(tmp_path: Path, plain: RecurrentDepth) -> None:
    plain.run_with_cache(random_tokens(), n_loops=2, names_filter="hook_embed")[1].save(
        tmp_path / "cache"
    )
    (tmp_path / "text").write_text("not a safetensors file at all")
    for name, message in (
        ("cache", "was not written by TunedLens.save"),
        ("text", "does not hold a tuned lens"),
    ):
        with pytest.raises(ValueError, match=message):
            TunedLens.load(tmp_path / name)


# A trained model


def questions(count: int, held_out: bool) -> Batch:
    """Questions of 2 to 6 hops of the graph that the shipped checkpoint knows."""
    graph, rng = PermutationGraph.read(GRAPH), np.random.default_rng(0)
    rows = [
        row
        for hops in range(2, 7)
        for row in sample_facts(graph, hops, count, rng, held_out=held_out).tokens.tolist()
    ]
    tokens, mask = pad_right(rows, max(map(len, rows)))
    return Batch(tokens, mask, mask.sum(1) - 1)


@pytest.mark.slow
def test_trained_lens_foretells_held_out_answers_better_than_the_logit_lens() -> None:
    model, held_out = load("ltg_trained"), questions(40, held_out=True)
    tuned = train_tuned_lens(model, questions(500, held_out=False), 4, positions="real", steps=300)
    final = model(held_out.tokens, n_loops=4, mask=held_out.mask)[
        torch.arange(len(held_out)), held_out.readout
    ]
    before, after = (
        kl_to_final(final, lens).mean(1)
        for lens in (logit_lens(model, held_out, 4), tuned.lens(model, held_out))
    )
    assert (after < before)[:-1].sum() >= 6
    assert (after[:-1] < 1.01 * before[:-1]).all()
    assert after[:-1].sum() < 0.96 * before[:-1].sum()
    assert after[-1].abs() < 1e-6
