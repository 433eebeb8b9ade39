"""Ablation: each kind against a hand-made run, what the stand-ins are, and what is refused and
cleaned up.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.common.metrics import margin
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.exits.halting import halting
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.basis.draws import other_rows
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.state import Slot, Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.questions import read_questions
from toy import (
    BATCH,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    BatchCentred,
    ShortEnding,
    assert_close,
    explode,
    full,
    hook_count,
    is_close,
    odd_one,
    padded,
    projection,
    random_tokens,
    randomize_,
    run,
    toy,
    toy_config,
    with_words,
)  # fmt: skip

ATTN, MLP = Component("attn", [1], [0]), Component("mlp", [2], [1])
Z, ATTN_OUT, MLP_OUT = (
    "loops.1.blocks.0.attn.hook_z",
    "loops.1.blocks.0.hook_attn_out",
    "loops.2.blocks.1.hook_mlp_out",
)
SITES = [
    "hook_embed",
    "**.hook_z",
    "**.hook_attn_out",
    "**.hook_mlp_out",
    "**.hook_resid_pre",
    "**.hook_resid_post",
]


def cached(
    model: LoopedModel, batch: Batch, names: str | list[str] = SITES, n_loops: int = LOOPS
) -> dict[str, Tensor]:
    """Some activations, and the logits of the same run."""
    logits, cache = model.run_with_cache(
        batch.tokens, n_loops=n_loops, mask=batch.mask, names_filter=names
    )
    return {**cache, "logits": logits}


def ablated(
    model: LoopedModel, what: Component | list[Component], batch: Batch, **options: object
) -> dict[str, Tensor]:
    with ablate(model, what, n_loops=LOOPS, **options):
        return cached(model, batch)


def without(model: LoopedModel, batch: Batch, skipped: set[int], n_loops: int = LOOPS) -> Tensor:
    """Logits of a run whose visits with these indices are left out, iteration boundaries
    included.
    """
    state = model.begin(batch.tokens, batch.mask, n_loops=n_loops)
    for visit in model.schedule(n_loops):
        state = (
            replace(state, visit=visit.index + 1)
            if visit.index in skipped
            else model.advance(state, visit.index + 1)
        )
    return model.readout(state)


# Zero


@pytest.mark.parametrize("positions", ["all", [2, 5]])
@pytest.mark.parametrize(("what", "name"), [(ATTN, ATTN_OUT), (MLP, MLP_OUT)])
def test_an_output_is_zero_there_and_nowhere_else(
    what: Component, name: str, positions: list[int] | str, plain: RecurrentDepth
) -> None:
    found = ablated(plain, what, padded(), positions=positions)
    columns = range(POS) if positions == "all" else positions
    before = cached(plain, padded())
    for position in range(POS):
        expected = (
            torch.zeros_like(found[name][:, position])
            if position in columns
            else before[name][:, position]
        )
        assert_close(found[name][:, position] + 1, expected + 1)
    for other in before:
        if other.endswith(("attn_out", "mlp_out")) and other != name:
            assert not (found[other] == 0).any()


def test_a_zeroed_attention_is_a_block_without_it(model: RecurrentDepth) -> None:
    """Block 0 of iteration 1 by hand: the state goes straight to the MLP."""
    batch = padded()
    state = model.advance(model.begin(batch.tokens, batch.mask, n_loops=LOOPS), LAYERS)
    resid = state.resid + state.parts["input"] if model.cfg.input_injection else state.resid
    block = model.blocks[0]
    resid = resid + block.mlp(block.ln2(resid, {}), {})
    expected = model.readout(model.advance(replace(state, visit=LAYERS + 1, resid=resid)))
    assert_close(ablated(model, ATTN, batch)["logits"], expected)


@pytest.mark.parametrize("heads", [[3], [0, 4], "all"])
def test_zeroed_heads_add_nothing_but_the_bias(
    heads: list[int] | str, plain: RecurrentDepth
) -> None:
    batch, chosen = padded(), list(range(HEADS)) if heads == "all" else heads
    z = cached(plain, batch)[Z].clone()
    z[:, :, chosen] = 0
    found = ablated(plain, Component("head", [1], [0], heads), batch)
    attn = plain.blocks[0].attn
    assert_close(found[ATTN_OUT], torch.einsum("bphd,hdm->bpm", z, attn.W_O) + attn.b_O)


def test_heads_named_apart_are_ablated_together(plain: RecurrentDepth) -> None:
    apart = ablated(
        plain, [Component("head", [1], [0], [3]), Component("head", [1, 2], [0], [1])], padded()
    )
    assert_close(
        apart[ATTN_OUT], ablated(plain, Component("head", [1], [0], [1, 3]), padded())[ATTN_OUT]
    )
    assert (apart["loops.2.blocks.0.attn.hook_z"] == 0).flatten(3).all(-1).all(0).all(
        0
    ).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("kind", ["head", "attn", "mlp"])
def test_all_iterations_and_layers_are_meant_by_default(kind: str, plain: RecurrentDepth) -> None:
    site = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}[kind]
    found = ablated(plain, Component(kind), padded())
    for t, layer in itertools.product(range(LOOPS), range(LAYERS)):
        assert not found[f"loops.{t}.blocks.{layer}.{site}"].any()


def test_without_attention_and_mlp_the_state_stays(plain: RecurrentDepth) -> None:
    found = ablated(plain, [Component("attn"), Component("mlp")], padded())
    assert_close(found["logits"], plain.unembed(plain.normalize(found["hook_embed"])))


# Visits and iterations


@pytest.mark.parametrize(("loop", "layer"), [(0, 0), (2, 1)])
def test_a_skipped_visit_leaves_the_residual_stream_alone(
    loop: int, layer: int, model: RecurrentDepth
) -> None:
    what = Component("visit", [loop], [layer])
    found = ablated(model, what, padded())
    place = f"loops.{loop}.blocks.{layer}"
    assert torch.equal(found[f"{place}.hook_resid_post"], found[f"{place}.hook_resid_pre"])
    both = [Component("attn", [loop], [layer]), Component("mlp", [loop], [layer])]
    assert_close(found["logits"], ablated(model, both, padded())["logits"])


@pytest.mark.parametrize("loop", range(LOOPS))
def test_a_skipped_iteration_is_a_run_without_it(loop: int, model: RecurrentDepth) -> None:
    skipped = {loop * LAYERS + layer for layer in range(LAYERS)}
    found = ablated(model, Component("iteration", [loop]), padded())["logits"]
    assert_close(found, without(model, padded(), skipped))
    assert not is_close(found, run(model, padded()))
    if not model.cfg.input_injection:
        assert_close(found, run(model, padded(), LOOPS - 1))


def test_several_skipped_iterations(model: RecurrentDepth) -> None:
    expected = without(model, padded(), {2, 3, 6, 7})
    assert_close(ablated(model, Component("iteration", [1, 3]), padded())["logits"], expected)
    assert_close(
        ablated(model, [Component("iteration", [3]), Component("iteration", [1])], padded())[
            "logits"
        ],
        expected,
    )


def test_without_any_iteration_the_embedding_is_read(plain: RecurrentDepth) -> None:
    found = ablated(plain, Component("iteration"), padded())
    assert_close(found["logits"], plain.unembed(plain.normalize(found["hook_embed"])))


def test_a_visit_skipped_at_some_columns(plain: RecurrentDepth) -> None:
    found = ablated(plain, Component("visit", [1], [1]), full(), positions=[3])
    before, after = (
        found["loops.1.blocks.1.hook_resid_pre"],
        found["loops.1.blocks.1.hook_resid_post"],
    )
    assert (before == after).all(-1).all(0).tolist() == [position == 3 for position in range(POS)]


class TwoLevels(RecurrentDepth):
    """A second part of the state, which each iteration adds to and the first part reads."""

    def plan(self, n_loops: int) -> list[Slot]:
        def wide(slot: Slot) -> Slot:
            both = [
                tuple(y for x in sites for y in (x, f"{x}.slow"))
                for sites in (slot.opening, slot.closing)
            ]
            return replace(slot, opening=both[0], closing=both[1])

        return [wide(slot) for slot in super().plan(n_loops)]

    def embed(
        self, tokens: Tensor, positions: Tensor, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, _ = super().embed(tokens, positions, taps)
        return resid, {"slow": resid}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        slow = tap(taps, "hook_state_in.slow", parts["slow"])
        return tap(taps, "hook_state_in", resid) + slow, {"slow": slow}

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        slow = tap(taps, "hook_state_out.slow", parts["slow"] + resid.roll(1, -1))
        return tap(taps, "hook_state_out", resid), {"slow": slow}


def test_every_part_of_the_state_passes_a_skipped_iteration() -> None:
    model = randomize_(TwoLevels(toy_config()).eval()).double()
    assert_close(
        ablated(model, Component("iteration", [1]), padded())["logits"],
        without(model, padded(), {2, 3}),
    )


@pytest.mark.parametrize("what", [Component("visit", [1], [0]), Component("iteration", [1])])
def test_hooks_attached_later_at_the_entrance_are_passed_on(
    what: Component, model: RecurrentDepth
) -> None:
    """A hook inside the context still reaches what follows the skipped part."""
    entrance = (
        "loops.1.blocks.0.hook_resid_pre" if what.kind == "visit" else "loops.1.hook_state_in"
    )
    hook = [(entrance, lambda value, hook: value.roll(1, -1))]
    batch = padded()
    with model.hooks(hook, n_loops=LOOPS), ablate(model, what, n_loops=LOOPS):
        expected = run(model, batch)
    with ablate(model, what, n_loops=LOOPS), model.hooks(hook, n_loops=LOOPS):
        assert torch.equal(run(model, batch), expected)
    assert not is_close(expected, ablated(model, what, batch)["logits"])


def test_a_sweep_inside_patches_the_run_that_skips(plain: RecurrentDepth) -> None:
    """Patching the state that enters a skipped iteration does what patching the one before its end
    does.
    """
    with ablate(plain, Component("iteration", [1]), n_loops=LOOPS):
        sweep = activation_patch(
            plain, full(1), full(2), projection(), LOOPS, sites=["state_in"], loops=[1, 2]
        )
    entering, leaving = sweep.values.split(POS)
    assert_close(entering, leaving)
    assert not is_close(entering, sweep.corrupted.expand_as(entering))


@pytest.mark.parametrize("rows", [slice(None), slice(0, 2)])
def test_a_run_continued_inside_a_skipped_iteration_is_refused(
    rows: slice, plain: RecurrentDepth
) -> None:
    batch = padded()
    with ablate(plain, Component("iteration", [1]), n_loops=LOOPS):
        inside = plain.advance(
            plain.begin(batch.tokens, batch.mask, n_loops=LOOPS), "loops.1.blocks.1"
        )
        if rows == slice(None):
            plain.advance(inside)
        with pytest.raises(
            ValueError,
            match=(
                r"'loops\.1\.hook_state_in' on must be run from there, but this run was continued"
                r" inside it"
            ),
        ):
            plain.advance(inside.rows(rows))


# Mean and resample


def site_values(model: RecurrentDepth, reference: Batch, name: str) -> Tensor:
    return cached(model, reference, name)[name]


@pytest.mark.parametrize(("what", "name"), [(ATTN, ATTN_OUT), (MLP, MLP_OUT)])
def test_mean_is_over_what_is_real_or_read(
    what: Component, name: str, plain: RecurrentDepth
) -> None:
    reference = padded(seed=3, lengths=(4, 7, 2, 5))
    reference = replace(
        reference, readout=torch.tensor([4, 6, 1, 4])
    )  # the first row is read at a padded column
    values = site_values(plain, reference, name)
    rows = [values[i, p] for i, length in enumerate((4, 7, 2, 5)) for p in range(length)] + [
        values[0, 4]
    ]
    found = ablated(plain, what, padded(), how="mean", reference=reference)[name]
    assert_close(found, torch.stack(rows).mean(0).expand_as(found))


def test_mean_is_of_the_same_iteration(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    found = ablated(plain, Component("mlp"), padded(), how="mean", reference=reference)
    means = [
        site_values(plain, reference, f"loops.{t}.blocks.1.hook_mlp_out").mean((0, 1))
        for t in range(LOOPS)
    ]
    for t in range(LOOPS):
        assert_close(found[f"loops.{t}.blocks.1.hook_mlp_out"][1, 2], means[t])
    assert not is_close(means[0], means[1])


def test_mean_of_one_head(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    found = ablated(
        plain, Component("head", [1], [0], [3]), padded(), how="mean", reference=reference
    )[Z]
    expected = cached(plain, padded())[Z].clone()
    expected[:, :, 3] = site_values(plain, reference, Z)[:, :, 3].mean((0, 1))
    assert_close(found, expected)


def test_mean_per_position(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    found = ablated(plain, ATTN, padded(), how="mean_per_position", reference=reference)[ATTN_OUT]
    assert_close(found, site_values(plain, reference, ATTN_OUT).mean(0).expand_as(found))


def test_resample_takes_another_row_of_the_reference(plain: RecurrentDepth) -> None:
    reference = full(seed=3)
    values, order = site_values(plain, reference, Z), other_rows(BATCH, 7)
    found = ablated(
        plain, Component("head", [1], [0], [2]), full(), how="resample", reference=reference, seed=7
    )[Z]
    assert_close(found[:, :, 2], values[order][:, :, 2])
    assert_close(found[:, :, 3], site_values(plain, full(), Z)[:, :, 3])


def test_resample_starts_over_where_the_run_has_more_rows(plain: RecurrentDepth) -> None:
    reference, order = full(seed=3), other_rows(BATCH, 0)
    tokens = random_tokens(5, batch=BATCH + 1)
    with ablate(plain, ATTN, how="resample", n_loops=LOOPS, reference=reference):
        _, cache = plain.run_with_cache(tokens, n_loops=LOOPS, names_filter=ATTN_OUT)
    assert_close(
        cache[ATTN_OUT], site_values(plain, reference, ATTN_OUT)[torch.cat([order, order[:1]])]
    )


def test_a_reference_in_pieces_gives_the_same(
    plain: RecurrentDepth, monkeypatch: pytest.MonkeyPatch
) -> None:
    for how, reference in (
        ("mean", padded(3)),
        ("mean_per_position", full(3)),
        ("resample", full(3)),
    ):
        whole = ablated(plain, [ATTN, MLP], padded(), how=how, reference=reference)["logits"]
        monkeypatch.setattr("loopscope.interp.edit.substitutes._CHUNK", 2)
        assert_close(
            ablated(plain, [ATTN, MLP], padded(), how=how, reference=reference)["logits"], whole
        )
        monkeypatch.undo()


def test_a_reference_is_run_whole_where_rows_depend_on_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loopscope.interp.edit.substitutes._CHUNK", 1)
    model = odd_one(BatchCentred)
    found = ablated(model, MLP, padded(), how="mean", reference=full(3))[MLP_OUT]
    assert_close(found, site_values(model, full(3), MLP_OUT).mean((0, 1)).expand_as(found))


def test_the_reference_is_run_with_the_hooks_of_the_moment(plain: RecurrentDepth) -> None:
    with ablate(plain, Component("iteration", [0]), n_loops=LOOPS):
        expected = site_values(plain, full(3), ATTN_OUT).mean((0, 1))
        found = ablated(plain, ATTN, padded(), how="mean", reference=full(3))[ATTN_OUT]
    assert_close(found, expected.expand_as(found))
    assert not is_close(expected, site_values(plain, full(3), ATTN_OUT).mean((0, 1)))


def test_references_may_be_texts_or_tokens(plain: RecurrentDepth) -> None:
    model = with_words(plain)
    texts = ["<t_3><t_9><t_4>", "<t_8>"]
    expected = ablated(model, MLP, padded(), how="mean", reference=model.encode(texts))["logits"]
    assert_close(ablated(model, MLP, padded(), how="mean", reference=texts)["logits"], expected)
    expected = ablated(model, MLP, padded(), how="mean", reference=full(3))["logits"]
    assert_close(
        ablated(model, MLP, padded(), how="mean", reference=random_tokens(3))["logits"], expected
    )


# The context


def test_every_method_sees_the_ablated_model(plain: RecurrentDepth) -> None:
    expected = run(plain, padded(), LOOPS - 1)[torch.arange(BATCH), padded().readout]
    before = run(plain, padded())
    with ablate(plain, Component("iteration", [1]), n_loops=LOOPS) as inside:
        assert inside is plain
        assert_close(logit_lens(plain, padded(), LOOPS, keep_logits=True).logits[-1], expected)
        assert_close(readout_lens(plain, padded(), LOOPS, keep_logits=True).logits[-1], expected)
        assert halting(plain, padded(), n_loops=LOOPS).lens.kl()[1].abs().max() < 1e-12
        assert hook_count(plain) > 0
    assert hook_count(plain) == 0
    assert torch.equal(run(plain, padded()), before)


@pytest.mark.parametrize("n_loops", [2, LOOPS + 2])
@pytest.mark.parametrize(
    "what",
    [
        Component("attn"),
        Component("head", [0], [1], [2]),
        Component("visit", [0], [0]),
        Component("iteration", [1]),
    ],
)
def test_a_run_of_another_length_is_refused(
    what: Component, n_loops: int, plain: RecurrentDepth
) -> None:
    with (
        ablate(plain, what, n_loops=LOOPS),
        pytest.raises(ValueError, match=rf"but (this|a) call (runs|with) n_loops={n_loops}"),
    ):
        run(plain, padded(), n_loops)
    run(plain, padded(), n_loops)


def test_iterations_default_to_what_is_recorded(plain: RecurrentDepth) -> None:
    with ablate(plain, ATTN):
        assert_close(run(plain, padded()), ablated(plain, ATTN, padded())["logits"])
    with (
        pytest.raises(ValueError, match="records no number of iterations"),
        ablate(toy(n_loops=None), ATTN),
    ):
        pass


@pytest.mark.parametrize("what", [ATTN, Component("visit", [1], [1]), Component("iteration", [2])])
def test_nothing_is_left_after_an_error(what: Component, plain: RecurrentDepth) -> None:
    before = run(plain, padded())
    hooks = [
        (name, explode) for name in ("loops.1.blocks.1.hook_resid_pre", "loops.2.hook_state_in")
    ]
    with (
        ablate(plain, what, n_loops=LOOPS),
        plain.hooks(hooks),
        pytest.raises(RuntimeError, match="a hook failed"),
    ):
        run(plain, padded())
    assert hook_count(plain) == 0
    with pytest.raises(RuntimeError, match="an error"), ablate(plain, what, n_loops=LOOPS):
        raise RuntimeError("an error")
    assert hook_count(plain) == 0
    assert torch.equal(run(plain, padded()), before)


def test_other_hooks_stay(plain: RecurrentDepth) -> None:
    calls: list[str] = []
    plain.add_hook("hook_embed", lambda value, hook: calls.append(hook.name))
    with (
        ablate(plain, [ATTN, Component("iteration", [1])], n_loops=LOOPS),
        ablate(plain, MLP, n_loops=LOOPS),
    ):
        run(plain, padded())
    assert hook_count(plain) == 2  # PyTorch's and TransformerLens's record of one hook
    run(plain, padded(), 2)
    assert calls == ["hook_embed"] * 2


def test_gradients_pass_a_skipped_visit(plain: RecurrentDepth) -> None:
    with ablate(plain, Component("visit"), n_loops=LOOPS):
        run(plain, padded())[0, 3].sum().backward()
    assert plain.embedding.grad is not None
    assert plain.blocks[0].mlp.W_in.grad is None or not plain.blocks[0].mlp.W_in.grad.any()


# What is refused


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        (Component("attn", [4]), {}, r"loops must be in 0\.\.3, got 4"),
        (Component("attn", [-1]), {}, r"loops must be in 0\.\.3, got -1"),
        (Component("mlp", [0], [2]), {}, r"layers must be in 0\.\.1, got 2"),
        (Component("head", [0], [0], [5]), {}, r"heads must be in 0\.\.4, got 5"),
        (Component("attn", []), {}, r"means no visit of a call with n_loops=4"),
        ([], {}, "at least one component to ablate is needed"),
        (
            ATTN,
            {"positions": [-1]},
            r"positions must be 'all' or a list of columns counted from 0, got \[-1\]",
        ),
        (ATTN, {"positions": []}, "positions must be 'all' or a list of columns"),
        (ATTN, {"how": "mean"}, "reference= must be given for how='mean'.* got how='mean'"),
        (ATTN, {"reference": full()}, "reference= must be given .* and only then, got how='zero'"),
        (
            ATTN,
            {"how": "resample", "reference": padded()},
            "needs reference rows of one length, got lengths from 4 to 7",
        ),
        (
            ATTN,
            {"how": "mean_per_position", "reference": padded()},
            "needs reference rows of one length",
        ),
        (ATTN, {"how": "resample", "reference": full()[:1]}, "at least two are needed, got 1"),
        (
            Component("iteration", [1]),
            {"how": "mean", "reference": full()},
            "a skipped iteration contributes nothing, so how must be 'zero'",
        ),
        (
            Component("visit", [1]),
            {"how": "resample", "reference": full()},
            "a skipped visit contributes nothing",
        ),
    ],
)
def test_wrong_requests_are_refused(
    what: Component | list[Component], options: dict, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message), ablate(plain, what, n_loops=LOOPS, **options):
        pass
    assert hook_count(plain) == 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("attn", {"heads": [0]}, "heads= goes with kind 'head' only"),
        ("iteration", {"layers": [0]}, "an iteration is skipped with all its layers"),
        ("neuron", {}, "kind"),
    ],
)
def test_wrong_components_are_refused(kind: str, options: dict, message: str) -> None:
    with pytest.raises(
        (ValueError, TypeError), match=message
    ):  # TypeError where the test run checks types
        Component(kind, **options)


@pytest.mark.shapes
def test_places_outside_the_run_are_refused_when_it_runs(plain: RecurrentDepth) -> None:
    with (
        ablate(plain, ATTN, n_loops=LOOPS, positions=[8]),
        pytest.raises(ValueError, match=r"positions must be in 0\.\.6 in this run, got 8"),
    ):
        run(plain, padded())
    context = ablate(plain, ATTN, how="resample", n_loops=LOOPS, reference=full())
    with (
        context,
        pytest.raises(
            ValueError,
            match="the reference is 7 columns wide, so the runs inside must be too, got 9",
        ),
    ):
        run(plain, padded(width=9))


def test_an_iteration_that_does_not_end_cannot_be_skipped() -> None:
    model = odd_one(ShortEnding)
    with pytest.raises(
        ValueError,
        match=r"iteration 3 cannot be skipped: .*loops\.3\.hook_state_in.* leaves it at \[\]",
    ):
        ablated(model, Component("iteration", [3]), padded())
    assert_close(
        ablated(model, Component("iteration", [1]), padded())["logits"],
        without(model, padded(), {2, 3}),
    )


# A trained model


def test_a_trained_model_needs_its_iterations_and_its_attention() -> None:
    model = load("ltg_trained")
    questions = [
        question
        for question in read_questions(SHIPPED / "ltg_trained" / "test.json")
        if question.hops == 6
    ][:40]
    batch = model.encode([question.text for question in questions])
    answers = torch.tensor([model.to_single_token(question.answer) for question in questions])

    def accuracy(n_loops: int = 8) -> float:
        logits = model(batch.tokens, n_loops=n_loops, mask=batch.mask)[
            torch.arange(len(batch)), batch.readout
        ]
        return (margin(logits, answers) > 0).float().mean().item()

    assert accuracy() > 0.95
    alone = accuracy(1)
    assert alone < 0.5
    with ablate(model, Component("iteration", range(1, 8)), n_loops=8):
        assert accuracy() == alone
    with ablate(model, Component("attn"), n_loops=8):
        assert accuracy() < 0.2
