"""Rows that may be run apart from the others of their batch, and rows that may not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import loopscope
from dictionary_toys import dictionary, model
from family_toys import TOYS
from loopscope.interp.common.collecting import recorded
from loopscope.interp.common.inputs import rows_apart, sample_of
from loopscope.interp.common.metrics import margin
from loopscope.interp.dictionaries.effects import _residuals, feature_effects
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from loopscope.interp.dynamics.basins import basins
from loopscope.interp.dynamics.states import dynamics
from loopscope.models.core.hooks import by_rows, reads_only
from toy import D_MODEL, LENGTHS, LOOPS, BatchCentred, assert_close, odd_one, padded, toy

SITE = "loops.0.blocks.0.hook_resid_post"
VECTORS = torch.arange(1.0, 1 + len(LENGTHS))[:, None] * torch.ones(D_MODEL)


def told_apart(value: Tensor, hook: object = None) -> Tensor:
    return value * torch.linspace(0.2, 3.0, len(value), dtype=value.dtype)[:, None, None]


def test_families_and_hooks_that_look_at_other_rows_are_known() -> None:
    plain = toy().eval()
    assert rows_apart(plain)
    assert len(sample_of(plain, padded())) == 1
    assert not rows_apart(odd_one(BatchCentred))
    for hook, apart in ((told_apart, False), (by_rows(lambda value, hook: None), True)):
        with plain.hooks([(SITE, hook)], n_loops=LOOPS):
            assert rows_apart(plain) == apart
            assert len(sample_of(plain, padded())) == (1 if apart else len(padded()))


def test_a_hook_of_pytorch_on_a_module_counts() -> None:
    plain = toy().eval()
    whole = dynamics(plain, padded(), LOOPS)
    handle = plain.blocks[0].register_forward_hook(lambda module, inputs, out: told_apart(out))
    assert not rows_apart(plain)
    found = dynamics(plain, padded(), LOOPS, batch_size=1)
    torch.testing.assert_close(
        found.states, dynamics(plain, padded(), LOOPS).states, equal_nan=True
    )
    assert not torch.equal(found.states.nan_to_num(), whole.states.nan_to_num())
    handle.remove()
    assert rows_apart(plain)


def test_a_mark_counts_only_while_its_hook_is_there() -> None:
    plain = toy().eval()
    plain.add_hook(SITE, reads_only(lambda value, hook: None))
    plain.hook_point(SITE).fwd_hooks[-1].hook.remove()
    plain.add_hook(SITE, told_apart)
    assert not rows_apart(plain)
    assert plain.hook_point(SITE).may_be_written()
    plain.reset_hooks()


@pytest.mark.parametrize(
    ("site", "shape", "apart"),
    [
        ("resid_pre", (D_MODEL,), True),
        ("resid_pre", (len(LENGTHS), D_MODEL), False),
        ("z", None, True),
    ],
)
def test_a_vector_for_all_rows_leaves_them_apart(
    site: str, shape: tuple[int, ...] | None, apart: bool
) -> None:
    plain = toy().eval()
    vector = torch.ones(shape or (plain.cfg.n_heads, plain.cfg.d_head))
    with loopscope.steer(plain, vector, site=site, loops="all", layers="all", n_loops=LOOPS):
        assert rows_apart(plain) == apart
    doses = torch.ones(len(LENGTHS), 1, 1)
    with loopscope.steer(
        plain, torch.ones(D_MODEL), loops="all", layers="all", scale=doses, n_loops=LOOPS
    ):
        assert not rows_apart(plain)


def test_numbers_for_each_row_at_a_gate_keep_rows_together() -> None:
    ouro = TOYS["ouro"].make()
    numbers = torch.zeros(3)
    with loopscope.steer(ouro, numbers, site="exit_logit", loops="all", layers=None, n_loops=LOOPS):
        assert not rows_apart(ouro)


def test_a_vector_for_each_row_reaches_methods_that_look_at_a_run_first() -> None:
    plain = toy().eval()
    with loopscope.steer(plain, VECTORS, loops="all", layers="all", n_loops=LOOPS):
        assert basins(plain, padded(), 2, 0.1, LOOPS).distance.isfinite().all()


@pytest.mark.parametrize("place", ["family", "hook"])
@torch.no_grad()
def test_the_effect_of_a_feature_is_that_within_the_whole_batch(place: str) -> None:
    shared, batch = dictionary("shared"), padded()
    own = replace(shared, reading=replace(shared.reading, mark=""))
    mixed = odd_one(BatchCentred) if place == "family" else model()
    hooks: list[Any] = [] if place == "family" else [(SITE, told_apart)]
    answers = torch.arange(len(LENGTHS))
    with mixed.hooks(hooks, n_loops=own.n_loops):
        found = feature_effects(mixed, own, batch, answers, k=1)
        row, column, loop = (int(x[0]) for x in (found.rows, found.columns, found.loops))
        (name,) = _residuals(mixed, own)[loop : loop + 1]
        resid = recorded(mixed, batch, [name], own.n_loops)[name][row, column]
        clean = mixed(batch.tokens, mask=batch.mask, n_loops=own.n_loops)
        every = FeatureEdit(found.feature, loops="all")
        with splice(mixed, own, every):
            without = mixed(batch.tokens, mask=batch.mask, n_loops=own.n_loops)
    moved = resid - found.activation[0, column] * own.directions(loop)[found.feature]
    logits = mixed.unembed(mixed.normalize(torch.stack([resid, moved])[:, None]))[:, 0]
    difference = logits[0] - logits[1]
    assert_close(found.logits, difference - difference.mean())
    rows = torch.arange(len(batch))
    change = [margin(x[rows, batch.readout], answers)[found.on].mean() for x in (without, clean)]
    assert_close(found.margin[-1], change[0] - change[1])
