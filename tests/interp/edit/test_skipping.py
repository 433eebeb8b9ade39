"""Skipped visits and iterations: what passes them by, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from ablations import ablated, without
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.hooks import Taps, tap
from loopscope.models.core.state import Slot, Visit
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    LAYERS,
    LOOPS,
    POS,
    ShortEnding,
    assert_close,
    full,
    is_close,
    odd_one,
    padded,
    projection,
    randomize_,
    run,
    toy_config,
)


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
