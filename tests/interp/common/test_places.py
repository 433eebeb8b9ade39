"""Places whose unit is the visit: in nested cycles several visits share iteration and layer, and
every method means all of them or the one that is named.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from family_toys import LOOPS, TOYS
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.columns import shown_columns
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.common.places import (
    Place,
    Where,
    at_site,
    chosen_visits,
    in_range,
    loop_and_layer,
    one_visit,
    places_of,
)
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.injection import attenuate_input, swap_input
from loopscope.interp.edit.steering import set_to, steer, steering_vector
from loopscope.interp.patching.activation import activation_patch
from loopscope.interp.patching.path_ends import Receiver, Sender
from loopscope.interp.patching.paths import path_patch, path_patch_sweep
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.families.hrm_text import HrmTextConfig
from toy import LENGTHS, POS, padded, randomize_

D_MODEL, D_VOCAB = 12, 19
ONE = "loops.1.low.1.blocks.0"
SHARED = ["loops.1.low.0.blocks.0", ONE, "loops.1.high.blocks.0"]
METRIC = logit_diff([3, 5, 7], 2)
Edit = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def nested() -> LoopedModel:
    """Two iterations of two low runs and a high one, of two blocks each."""
    config = HrmTextConfig(
        n_layers=2,
        n_loops=2,
        n_low_loops=2,
        d_model=D_MODEL,
        n_heads=3,
        d_mlp=14,
        d_vocab=D_VOCAB,
        embedding_scale=3.0,
    )
    return randomize_(build(config)).double().eval()


def questions(seed: int) -> Batch:
    mask = (torch.arange(POS) < torch.tensor(LENGTHS)[:, None]).long()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, D_VOCAB, mask.shape, generator=generator) * mask
    return Batch(tokens, mask, torch.tensor(LENGTHS) - 1)


def logits(model: LoopedModel, batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(batch.tokens, mask=batch.mask)


def hooked(model: LoopedModel, batch: Batch, names: list[str], edit: Edit) -> Tensor:
    hooks = [(name, lambda value, hook: edit(value)) for name in names]
    with torch.no_grad(), model.hooks(hooks, n_loops=2):
        return model(batch.tokens, mask=batch.mask)


def value_at(model: LoopedModel, batch: Batch, name: str) -> Tensor:
    return model.run_with_cache(batch.tokens, mask=batch.mask, names_filter=name)[1][name]


@pytest.mark.parametrize("family", TOYS)
def test_the_places_of_a_call_are_its_hook_points(family: str) -> None:
    model = TOYS[family].make()
    places = places_of(model, LOOPS)
    assert [place.name for place in places] == model.hook_names(LOOPS)
    visits = {visit.name: (visit.loop, visit.layer) for visit in model.schedule(LOOPS)}
    for place in places:
        if place.layer is not None:
            assert visits[place.visit] == (place.loop, place.layer) == loop_and_layer(place.visit)


@pytest.mark.parametrize(
    ("visit", "loop", "layer", "stage"),
    [
        ("loops.3.blocks.0", 3, 0, ""),
        ("loops.3", 3, None, ""),
        ("loops.0.low.1.blocks.2", 0, 2, "low.1"),
        ("loops.0.low.1", 0, None, "low.1"),
        ("loops.10.high", 10, None, "high"),
        ("prelude.4", None, 4, "prelude"),
        ("", None, None, ""),
    ],
)
def test_the_stage_of_a_visit(visit: str, loop: int | None, layer: int | None, stage: str) -> None:
    assert Place(f"{visit}.hook", visit, "hook", loop, layer).stage == stage


def test_coordinates_mean_every_visit_that_shares_them(nested: LoopedModel) -> None:
    assert [visit.name for visit in chosen_visits(nested, 2, Where([1], [0]))] == SHARED
    assert [visit.name for visit in chosen_visits(nested, 2, Where(1, 0))] == SHARED


def test_names_and_patterns_mean_visits(nested: LoopedModel) -> None:
    def chosen(**where: object) -> list[str]:
        return [visit.name for visit in chosen_visits(nested, 2, Where(**where))]

    assert chosen(visits=ONE) == [ONE]
    assert chosen(visits="loops.1.low.1") == [ONE, "loops.1.low.1.blocks.1"]
    assert chosen(visits="loops.*.high", layers=[1]) == [
        f"loops.{loop}.high.blocks.1" for loop in range(2)
    ]
    assert chosen(visits=["loops.1.high.blocks.0", ONE]) == [ONE, "loops.1.high.blocks.0"]
    assert chosen(visits=ONE, loops=[0]) == []


def test_a_name_that_is_no_visit_is_refused(nested: LoopedModel) -> None:
    with pytest.raises(KeyError, match=r"'loops\.1\.low\.2' is no visit .* nearest: loops\.1\.low"):
        chosen_visits(nested, 2, Where(visits="loops.1.low.2"))
    with pytest.raises(ValueError, match=r"loops must be in 0\.\.1, got 2"):
        chosen_visits(nested, 2, Where(loops=[2]))
    with pytest.raises(ValueError, match=r"loops=1, layers=0 means loops\.1\.low\.0.*with visit="):
        one_visit(nested, 2, Where(1, 0))
    with pytest.raises(KeyError, match="no site 'state'; its sites are"):
        at_site(places_of(nested, 2), "state")


def test_indices_are_integers_each_once() -> None:
    assert in_range("heads", torch.tensor([2, 0, 2]), 3) == [2, 0]
    assert in_range("heads", 1, 3) == [1]
    assert in_range("heads", "all", 3) == in_range("heads", None, 3) == [0, 1, 2]
    masks = ([True, False], torch.tensor([True, False]), torch.tensor([True, False]).numpy(), True)
    for wrong in ("first", [1.5], 0.5, [[1]], *masks):
        with pytest.raises(TypeError, match="heads must be 'all', an integer or several, got"):
            in_range("heads", wrong, 3)


def test_columns_are_at_least_one_and_of_any_integers() -> None:
    expected = shown_columns(padded(), [1, 3])[0]
    for given in (torch.tensor([1, 3]), torch.tensor([1, 3]).numpy(), range(1, 4, 2)):
        assert torch.equal(shown_columns(padded(), given)[0], expected)
    with pytest.raises(ValueError, match="positions must name at least one column, got none"):
        shown_columns(padded(), [])


def test_each_visit_has_cells_of_its_own(nested: LoopedModel) -> None:
    clean, corrupted = questions(1), questions(2)
    sweep = activation_patch(
        nested, clean, corrupted, METRIC, loops=[1], layers=[0], positions=[0, 2]
    )
    assert [cell.visit for cell in sweep.cells] == [visit for visit in SHARED for _ in range(2)]
    assert sweep.frame()["visit"].tolist() == [cell.visit for cell in sweep.cells]
    for cell, values in zip(sweep.cells, sweep.values, strict=True):
        source = value_at(nested, clean, f"{cell.visit}.hook_resid_pre")[:, cell.position]

        def put(value: Tensor, source: Tensor = source, at: int = cell.position) -> Tensor:
            return value.index_copy(1, torch.tensor([at]), source[:, None])

        patched = hooked(nested, corrupted, [f"{cell.visit}.hook_resid_pre"], put)
        torch.testing.assert_close(values, METRIC(patched[torch.arange(3), corrupted.readout]))
    one = activation_patch(nested, clean, corrupted, METRIC, visits=ONE, positions=[0, 2])
    torch.testing.assert_close(one.values, sweep.values[2:4])
    estimate = attribution_patch(nested, clean, corrupted, METRIC, visits=ONE, positions=[0, 2])
    assert [cell.visit for cell in estimate.cells] == [ONE, ONE]


@pytest.mark.parametrize(
    ("where", "visits"), [({"loops": [1], "layers": [0]}, SHARED), ({"visits": ONE}, [ONE])]
)
def test_vectors_are_written_at_every_visit_that_is_meant(
    where: dict[str, object], visits: list[str], nested: LoopedModel
) -> None:
    batch, vector = questions(1), torch.linspace(-1, 1, D_MODEL, dtype=torch.float64)
    names = [f"{visit}.hook_resid_pre" for visit in visits]
    with set_to(nested, vector, **where):
        written = logits(nested, batch)
    torch.testing.assert_close(
        written, hooked(nested, batch, names, lambda value: vector.expand_as(value))
    )
    with steer(nested, vector, **where):
        steered = logits(nested, batch)
    torch.testing.assert_close(steered, hooked(nested, batch, names, lambda value: value + vector))
    with ablate(nested, Component("mlp", **where)):
        ablated = logits(nested, batch)
    outputs = [f"{visit}.hook_mlp_out" for visit in visits]
    torch.testing.assert_close(ablated, hooked(nested, batch, outputs, torch.zeros_like))


def test_a_run_of_a_stack_is_skipped(nested: LoopedModel) -> None:
    batch = questions(1)
    entering: list[Tensor] = []
    hooks = [
        ("loops.1.low.0.hook_state_in", lambda value, hook: entering.append(value)),
        ("loops.1.low.0.hook_state_out", lambda value, hook: entering[0]),
    ]
    with torch.no_grad(), nested.hooks(hooks, n_loops=2):
        expected = nested(batch.tokens, mask=batch.mask)
    with ablate(nested, Component("iteration", visits="loops.1.low.0")):
        torch.testing.assert_close(logits(nested, batch), expected)
    with pytest.raises(KeyError, match="is no visit of this call"):
        ablate(nested, Component("iteration", visits=ONE)).__enter__()


@pytest.mark.parametrize(
    ("where", "runs"),
    [
        ({}, [f"loops.{t}.{run}" for t in range(2) for run in ("low.0", "low.1", "high")]),
        ({"loops": [1]}, [f"loops.1.{run}" for run in ("low.0", "low.1", "high")]),
        ({"visits": "loops.*.low"}, [f"loops.{t}.low.{run}" for t in range(2) for run in range(2)]),
    ],
)
def test_inputs_change_at_every_injection(
    where: dict[str, object], runs: list[str], nested: LoopedModel
) -> None:
    batch, other = questions(1), questions(2)
    names = [f"{run}.hook_input" for run in runs]
    with attenuate_input(nested, 0.5, **where):
        found = logits(nested, batch)
    torch.testing.assert_close(found, hooked(nested, batch, names, lambda value: 0.5 * value))
    taken = {name: value_at(nested, other, name) for name in names}
    hooks = [(name, lambda value, hook: taken[hook.name]) for name in names]
    with torch.no_grad(), nested.hooks(hooks, n_loops=2):
        expected = nested(batch.tokens, mask=batch.mask)
    with swap_input(nested, other, **where):
        torch.testing.assert_close(logits(nested, batch), expected)


def test_a_steering_vector_asks_for_the_visit(nested: LoopedModel) -> None:
    positive, negative = questions(1), questions(2)
    with pytest.raises(ValueError, match=r"one place is needed.*name one of them with visit="):
        steering_vector(nested, positive, negative, "resid_pre", 1, 0)
    found = steering_vector(nested, positive, negative, "resid_pre", visit=ONE)
    means = [
        value_at(nested, batch, f"{ONE}.hook_resid_pre")[torch.arange(3), batch.readout].mean(0)
        for batch in (positive, negative)
    ]
    torch.testing.assert_close(found, means[0] - means[1])


def test_vectors_need_a_place(nested: LoopedModel) -> None:
    vector = torch.zeros(D_MODEL)
    with pytest.raises(ValueError, match=r"'resid_pre' needs loops= .* or visits="):
        set_to(nested, vector).__enter__()
    with pytest.raises(ValueError, match=r"'resid_pre' does not occur at loops=\[0\].*visits="):
        set_to(nested, vector, loops=[0], layers=[0], visits=ONE).__enter__()


def test_a_path_between_visits_that_share_coordinates(nested: LoopedModel) -> None:
    clean, corrupted = questions(1), questions(2)
    sender, receiver = Sender("mlp", visit=SHARED[0]), Receiver("v", visit=ONE, head=1)
    found = path_patch(nested, clean, corrupted, METRIC, sender, receiver)
    order = nested.hook_names(2)
    sent, received = f"{SHARED[0]}.hook_mlp_out", f"{ONE}.attn.hook_v"
    base = nested.run_with_cache(corrupted.tokens, mask=corrupted.mask, names_filter="**")[1]
    frozen = [
        name
        for name in order[order.index(sent) + 1 :]
        if name.endswith(("hook_attn_out", "hook_mlp_out"))
    ]
    source, kept = value_at(nested, clean, sent), []
    hooks = [(sent, lambda value, hook: source)]
    hooks += [(name, lambda value, hook: base[hook.name]) for name in frozen]
    hooks.append((received, lambda value, hook: kept.append(value)))
    with torch.no_grad(), nested.hooks(hooks, n_loops=2):
        nested(corrupted.tokens, mask=corrupted.mask)

    def one_head(value: Tensor) -> Tensor:
        return torch.cat([value[:, :, :1], kept[0][:, :, 1:2], value[:, :, 2:]], dim=2)

    patched = hooked(nested, corrupted, [received], one_head)
    expected = METRIC(patched[torch.arange(3), corrupted.readout])
    torch.testing.assert_close(found.values, expected)
    assert found.effect().abs().min() > 0
    frame = path_patch_sweep(nested, clean, corrupted, METRIC, receiver)
    assert frame["visit"].unique().tolist() == [
        visit.name
        for visit in nested.schedule(2)
        if order.index(f"{visit.name}.attn.hook_z") < order.index(received)
    ]
    row = frame[(frame["visit"] == SHARED[0]) & (frame["kind"] == "mlp")]
    assert row["value"].item() == pytest.approx(expected.mean().item(), rel=1e-9)
    assert (row["loop"].item(), row["layer"].item()) == (1, 0)


def test_the_ends_of_a_path_ask_for_the_visit(nested: LoopedModel) -> None:
    arguments = nested, questions(1), questions(2), METRIC
    with pytest.raises(ValueError, match=r"one visit is needed.*loops\.1\.low\.0\.blocks\.0"):
        path_patch(*arguments, Sender("mlp", 1, 0), Receiver("readout"))
    with pytest.raises(ValueError, match="a sender needs loop= and layer=, or visit= alone"):
        Sender("mlp", 1, 0, visit=ONE)
    with pytest.raises(ValueError, match="a receiver needs loop= and layer=, or visit= alone"):
        Receiver("mlp", loop=1)
