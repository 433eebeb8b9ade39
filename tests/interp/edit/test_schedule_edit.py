"""Another order of visits, against the runs that it amounts to."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import LOOPS as FAMILY_LOOPS
from family_toys import TOYS, position_solver
from family_toys import full as family_batch
from loopscope.interp.common.fingerprint import fingerprint
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.dynamics.changes import varying
from loopscope.interp.dynamics.lyapunov import lyapunov_spectrum
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.schedule import Freeze, schedule_edit
from loopscope.interp.generation import generate
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.attention import Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.families.smollm import SMolLMConfig
from loopscope.models.views import unrolled, untied
from loopscope.models.wrapped.wrap import wrap
from toy import Calls, assert_close, full, hook_count, padded, random_tokens, run, toy

T = 4


def edited(model: LoopedModel, order: Sequence[Any], n_loops: int, after: int) -> Tensor:
    with schedule_edit(model, order, n_loops):
        return run(model, padded(), after)


def names(model: LoopedModel, n_loops: int) -> list[str]:
    return [visit.name for visit in model.schedule(n_loops)]


def test_the_models_own_list_changes_nothing(plain: RecurrentDepth) -> None:
    own, hooks = names(plain, T), plain.hook_names(T)
    with schedule_edit(plain, own, T):
        assert names(plain, T) == own
        assert plain.hook_names(T) == hooks
        inside = run(plain, padded(), T)
    assert_close(inside, run(plain, padded(), T))


def test_iterations_that_are_alike_are_only_counted(plain: RecurrentDepth) -> None:
    """In a model whose iterations are all alike the number of them is all that matters."""
    for order, after in ((["loops.0", "loops.3"], 2), (["loops.2"] * 3, 3)):
        assert_close(edited(plain, order, T, after), run(plain, padded(), after))


def by_hand(model: RecurrentDepth, layers: Sequence[int]) -> Tensor:
    """Logits of a run of some blocks one after another."""
    batch = padded()
    state = model.begin(batch.tokens, batch.mask, n_loops=1)
    blocks = [model.schedule(1)[layer] for layer in layers]
    rows, resid = Rows.make(state, type(model).visible), state.resid
    for visit in blocks:
        resid = visit.block(resid, rows, {})
    return model.unembed(model.normalize(resid))


@pytest.mark.parametrize(
    ("order", "layers", "after"),
    [
        (["loops.0", "loops.1.blocks.1"], [0, 1, 1], 2),
        (["loops.0.blocks.1", "loops.0.blocks.0"], [1, 0], 1),
        (["loops.0.blocks.0"] * 2 + ["loops.0.blocks.1"], [0, 0, 1], 2),
        (["loops.0.blocks.1", "loops.0", "loops.0"], [1, 0, 1, 0, 1], 3),
    ],
)
def test_a_list_of_visits_runs_these_blocks(
    plain: RecurrentDepth, order: list[str], layers: list[int], after: int
) -> None:
    assert_close(edited(plain, order, T, after), by_hand(plain, layers))


def test_a_repeated_visit_has_a_name_of_its_own_and_says_what_it_repeats() -> None:
    model = toy(injection=True)
    with schedule_edit(model, ["loops.1", "loops.1", "loops.0.blocks.1"], T):
        visits = model.schedule(3)
        assert [v.name for v in visits] == [
            "loops.0.blocks.0", "loops.0.blocks.1", "loops.1.blocks.0", "loops.1.blocks.1",
            "loops.2.blocks.1",
        ]  # fmt: skip
        acts = [v.acts_as.name for v in visits if v.acts_as is not None]
        assert acts == [
            "loops.1.blocks.0", "loops.1.blocks.1", "loops.1.blocks.0", "loops.1.blocks.1",
            "loops.0.blocks.1",
        ]  # fmt: skip
        hooks = model.hook_names(3)
        assert len(set(hooks)) == len(hooks)
        assert "loops.0.hook_input" in hooks, "iteration 1 is injected, wherever it stands"
        assert "loops.2.hook_input" not in hooks, "iteration 0 is not"
        assert "loops.2.hook_state_in" in hooks, "an iteration opens before its first visit"
        _, cache = model.run_with_cache(random_tokens(), n_loops=3, names_filter="**")
        assert set(cache) == set(hooks)
        assert_close(cache["loops.0.hook_input"], cache["hook_embed"])


def test_a_frozen_visit_adds_what_it_added_before(plain: RecurrentDepth) -> None:
    order = ["loops.0", "loops.1.blocks.0", Freeze("loops.1.blocks.1", "loops.0.blocks.1")]
    with schedule_edit(plain, order, T):
        logits, cache = plain.run_with_cache(random_tokens(), n_loops=2)
        lens = logit_lens(plain, padded(), 2)
        assert "loops.1.blocks.1.hook_mlp_out" not in plain.hook_names(2)
        with pytest.raises(ValueError, match="a frozen visit adds what an earlier iteration left"):
            varying(plain, padded(), "real", None)
    added = cache["resid_post", 0, 1] - cache["resid_pre", 0, 1]
    assert_close(cache["resid_post", 1, 1], cache["resid_pre", 1, 1] + added)
    assert_close(plain.unembed(plain.normalize(cache["resid_post", 1, 1])), logits)
    assert lens.names[-1] == "loops.1.blocks.1"
    whole = edited(plain, ["loops.0", Freeze("loops.1", "loops.0")], T, 2)
    assert not torch.allclose(whole, run(plain, padded(), 2))


@pytest.mark.parametrize("family", sorted(TOYS))
def test_every_family_runs_its_own_list_and_a_repeated_iteration(family: str) -> None:
    model = TOYS[family].make()
    batch = family_batch(TOYS[family], model)
    expected = model(batch, n_loops=FAMILY_LOOPS)
    own = [v.name for v in model.schedule(FAMILY_LOOPS) if v.loop is not None]
    with schedule_edit(model, own, FAMILY_LOOPS):
        assert_close(model(batch, n_loops=model.edited.n_loops), expected)
    assert_close(model(batch, n_loops=FAMILY_LOOPS), expected)


@pytest.mark.parametrize("family", sorted(set(TOYS) - {"training_free_layers"}))
def test_every_family_repeats_an_iteration(family: str) -> None:
    model = TOYS[family].make()
    batch = family_batch(TOYS[family], model)
    expected = model(batch, n_loops=FAMILY_LOOPS)
    with schedule_edit(model, ["loops.0", "loops.1", "loops.1", "loops.2"], FAMILY_LOOPS):
        logits, cache = model.run_with_cache(
            batch, n_loops=FAMILY_LOOPS + 1, names_filter="loops.*.**.hook_attn_out"
        )
    assert logits.isfinite().all()
    assert {name.split(".")[1] for name in cache} == {"0", "1", "2", "3"}
    assert not logits.allclose(expected)
    assert_close(model(batch, n_loops=FAMILY_LOOPS), expected)


def test_layers_that_are_looped_one_by_one_cannot_be_run_iteration_by_iteration() -> None:
    model = TOYS["training_free_layers"].make()
    order = ["loops.0", "loops.1", "loops.2"]
    with (
        pytest.raises(ValueError, match=r"cannot run the list: .* needs the part 'g_0'"),
        schedule_edit(model, order, FAMILY_LOOPS),
    ):
        raise AssertionError("not entered")


def test_methods_inside_are_those_of_the_edited_run(plain: RecurrentDepth) -> None:
    """Blocks 0, 1, 1: the same as a run by hand, through lenses, sweeps and ablations."""
    order, batch, other = ["loops.0", "loops.1.blocks.1"], padded(), padded(1)
    metric = logit_diff([5, 3, 2], 7)
    at = torch.arange(3)
    with schedule_edit(plain, order, T):
        lens = readout_lens(plain, batch, 2, keep_logits=True)
        path = dynamics(plain, batch, 2)
        sweep = activation_patch(plain, batch, other, metric, 2, sites=["resid_pre"], positions=[2])
        name = "loops.1.blocks.1.hook_resid_pre"
        source = plain.run_with_cache(batch, n_loops=2, names_filter=name)[1][name]

        def put(value: Tensor, hook: object) -> Tensor:
            changed = value.clone()
            changed[:, 2] = source[:, 2]
            return changed

        patched = plain.run_with_hooks(other, n_loops=2, fwd_hooks=[(name, put)])
        with ablate(plain, Component("visit", loops=[1], layers=[1]), n_loops=2):
            skipped = run(plain, batch, 2)
        spectrum = lyapunov_spectrum(plain, batch, 2, 2)
    assert lens.logits is not None
    assert_close(lens.logits[-1], by_hand(plain, [0, 1, 1])[at, batch.readout])
    assert_close(lens.logits[0], by_hand(plain, [0, 1])[at, batch.readout])
    assert path.states.shape[0] == 3
    assert_close(skipped, by_hand(plain, [0, 1]))
    frame = sweep.frame()
    last = frame[(frame["loop"] == 1) & (frame["layer"] == 1)]["value"]
    assert torch.tensor(last.to_numpy()).mean().item() == pytest.approx(
        metric(patched[at, other.readout]).mean().item()
    )
    assert spectrum.shares.sum(1).allclose(spectrum.exponents)


def test_a_generation_goes_through_the_edited_schedule(plain: RecurrentDepth) -> None:
    batch = full()
    with schedule_edit(plain, ["loops.0", "loops.1.blocks.1"], T):
        generated = generate(plain, batch, 2, 2)
        slow = plain(torch.cat([batch.tokens, generated.new[:, :1]], dim=1), n_loops=2)
    assert generated.new[:, 1].tolist() == slow[:, -1].argmax(-1).tolist()
    melt = TOYS["melt"].make()
    with (
        schedule_edit(melt, ["loops.0", "loops.1"], FAMILY_LOOPS),
        pytest.raises(ValueError, match="no text is generated in an edited one"),
    ):
        generate(melt, family_batch(TOYS["melt"], melt), 2, 2)


def test_another_length_and_foreign_states_and_hooks_are_refused(plain: RecurrentDepth) -> None:
    tokens = random_tokens()
    before = plain.begin(tokens, n_loops=2)
    edit = schedule_edit(plain, ["loops.0", "loops.1.blocks.1"], T)
    early = plain.hooks([("loops.*.hook_state_out", Calls())], n_loops=2)
    with early, edit, pytest.raises(ValueError, match="attached for another schedule"):
        plain(tokens, n_loops=2)
    early = plain.hooks([("loops.1.blocks.0.hook_resid_post", Calls())])
    edit = schedule_edit(plain, ["loops.0", "loops.1.blocks.1"], T)
    with early, edit, pytest.raises(ValueError, match="the schedule that is on does not have"):
        plain(tokens, n_loops=2)
    with schedule_edit(plain, ["loops.0", "loops.1.blocks.1"], T):
        inside = plain.begin(tokens, n_loops=2)
        with pytest.raises(ValueError, match="has 2 iterations, got n_loops=4; pass n_loops=2"):
            plain(tokens)
        with pytest.raises(ValueError, match="got n_loops=3"):
            plain.hook_names(3)
        with pytest.raises(ValueError, match="is of the model's own schedule, which is not on"):
            plain.advance(before)
        for view in (unrolled, untied):
            with pytest.raises(ValueError, match="a view shows the model's own schedule"):
                view(plain, 2)
        with pytest.raises(ValueError, match="edited already"):
            schedule_edit(plain, ["loops.0"], T).__enter__()
    with pytest.raises(ValueError, match="is of an edited schedule, which is not on"):
        plain.advance(inside)


def test_files_of_sweeps_know_the_schedule(plain: RecurrentDepth) -> None:
    """Two lists of the same blocks in other iterations are other schedules."""

    def facts(order: list[str]) -> str:
        with schedule_edit(plain, order, T):
            return fingerprint(plain, [], [padded()], ())

    one = facts(["loops.0.blocks.1", "loops.0"])
    other = facts(["loops.0.blocks.1", "loops.0.blocks.0", "loops.0.blocks.1"])
    assert len({one, other, fingerprint(plain, [], [padded()], ())}) == 3
    assert facts(["loops.0.blocks.1", "loops.0"]) == one


def test_hooks_at_points_of_the_edited_schedule_alone_are_refused_outside() -> None:
    model, calls = toy(injection=True), Calls()
    hooks = model.hooks([("loops.0.hook_input", calls)])
    with schedule_edit(model, ["loops.1"], T):
        hooks.__enter__()
        model(random_tokens(), n_loops=1)
    assert calls.names == ["loops.0.hook_input"]
    with pytest.raises(ValueError, match=r"'loops\.0\.hook_input', which the schedule that is on"):
        model(random_tokens(), n_loops=2)
    hooks.__exit__(None, None, None)
    assert model(random_tokens(), n_loops=2).isfinite().all()
    assert hook_count(model) == 0


@pytest.mark.parametrize("first", ["edit", "hooks"])
def test_contexts_are_left_in_any_order_and_in_any_thread(
    first: str, plain: RecurrentDepth
) -> None:
    expected, calls = run(plain, padded(), T), Calls()
    edit = schedule_edit(plain, ["loops.0", "loops.1.blocks.1"], T)
    edit.__enter__()
    hooks = plain.hooks([("loops.1.blocks.1.hook_resid_post", calls)], n_loops=2)
    hooks.__enter__()
    run(plain, padded(), 2)
    contexts = [edit, hooks] if first == "edit" else [hooks, edit]
    for context in contexts:
        leaving = threading.Thread(target=context.__exit__, args=(None, None, None))
        leaving.start()
        leaving.join()
    assert calls.names == ["loops.1.blocks.1.hook_resid_post"]
    assert plain.edited is None
    assert not plain.any_hook()
    assert_close(run(plain, padded(), T), expected)


def test_an_exception_puts_the_schedule_back(plain: RecurrentDepth) -> None:
    with (
        pytest.raises(RuntimeError, match="mine"),
        schedule_edit(plain, ["loops.0"], T),
    ):
        raise RuntimeError("mine")
    assert plain.edited is None
    assert run(plain, padded(), T).isfinite().all()


def test_lists_that_no_run_could_follow_are_refused(plain: RecurrentDepth) -> None:
    def enter(model: LoopedModel, order: list[Any], n_loops: int = T) -> None:
        with schedule_edit(model, order, n_loops):
            raise AssertionError("not entered")

    with pytest.raises(ValueError, match="at least one visit of the loop, got an empty list"):
        enter(plain, [])
    with pytest.raises(KeyError, match=r"'loops\.4' is no visit .* n_loops=4; nearest: loops\.3"):
        enter(plain, ["loops.4"])
    with pytest.raises(TypeError, match="order must hold names and Freeze entries, got 3"):
        enter(plain, [3])
    with pytest.raises(ValueError, match="which must come before it in the list"):
        enter(plain, [Freeze("loops.0", "loops.1"), "loops.1"])
    huginn, hrm, inkling = (TOYS[name].make() for name in ("huginn", "hrm_text", "inkling2_loop"))
    with pytest.raises(ValueError, match=r"visits outside the loop stay .* leave 'prelude' out"):
        enter(huginn, ["prelude", "loops.0"], FAMILY_LOOPS)
    with pytest.raises(ValueError, match=r"must end with 'high' .* ends with 'loops\.0\.low"):
        enter(hrm, ["loops.0.low.0"], FAMILY_LOOPS)
    with pytest.raises(ValueError, match=r"cannot run the list: .* needs the part 'sources'"):
        enter(inkling, ["loops.1"], FAMILY_LOOPS)
    with pytest.raises(ValueError, match="changes more than the stream"):
        enter(TOYS["melt"].make(), ["loops.0", Freeze("loops.1", "loops.0")], FAMILY_LOOPS)
    layers = torch.nn.Sequential(torch.nn.Embedding(19, 6), torch.nn.Linear(6, 6))
    module = wrap(layers, blocks="1", n_loops=1)
    with pytest.raises(ValueError, match="are called by its own code in its own order"):
        enter(module, ["loops.0"], 1)
    assert plain.edited is None


def test_a_model_that_needs_all_its_positions_is_tried_on_all_of_them() -> None:
    model, tokens = position_solver(), torch.arange(5)[None]
    with schedule_edit(model, ["loops.0", "loops.2"], T):
        shorter = model(tokens, n_loops=2)
    assert_close(shorter, model(tokens, n_loops=2))


def test_dropout_draws_nothing_where_a_list_is_tried() -> None:
    cfg = SMolLMConfig(
        n_layers=1, n_loops=2, d_model=6, n_heads=1, d_mlp=7, d_vocab=11, n_ctx=5, dropout=0.5
    )
    model = build(cfg).train()
    before = torch.random.get_rng_state()
    with schedule_edit(model, ["loops.1"], 2):
        assert model.training
    assert torch.equal(torch.random.get_rng_state(), before)
