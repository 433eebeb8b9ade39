"""Ablation: zeroed components against a hand-made run, the context, and what is refused and cleaned
up.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from ablations import ATTN, ATTN_OUT, MLP, MLP_OUT, Z, ablated
from loopscope.checkpoints.load import load
from loopscope.checkpoints.locate import SHIPPED
from loopscope.interp.common.metrics import margin
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.exits.halting import halting
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.questions import read_questions
from toy import (
    BATCH,
    HEADS,
    LAYERS,
    LOOPS,
    POS,
    assert_close,
    cached,
    explode,
    full,
    hook_count,
    padded,
    run,
    toy,
)

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
    z = cached(plain, batch, Z)[Z].clone()
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
