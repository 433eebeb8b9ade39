"""Positions of interventions count in the text, also where a run holds some of its rows only."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from family_toys import LENGTHS, TOYS, padded, random_tokens
from loopscope.interp.edit.ablation import Component, ablate
from loopscope.interp.edit.steering import set_to, steer
from loopscope.interp.generation import generate
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.melt import advance_in_chunks
from toy import assert_close

FAMILIES = ("ouro", "hrm_text", "huginn", "nanbeige")
LOOPS, NEW = 2, 4
Edit = Callable[[LoopedModel, Any], AbstractContextManager[LoopedModel]]


def vector(model: LoopedModel) -> Tensor:
    return torch.linspace(-3, 3, model.cfg.d_model, dtype=torch.float64)


EDITS: dict[str, Edit] = {
    "set_to": lambda m, at: set_to(
        m, vector(m), site="resid_post", loops=[1], layers="all", positions=at, n_loops=LOOPS
    ),
    "steer": lambda m, at: steer(
        m, vector(m), site="mlp_out", loops="all", layers="all", positions=at, n_loops=LOOPS
    ),
    "ablate": lambda m, at: ablate(m, Component("attn"), positions=at, n_loops=LOOPS),
    "skip": lambda m, at: ablate(m, Component("visit", loops=[1]), positions=at, n_loops=LOOPS),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    "family",
    ["ouro", *(pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES[1:])],
)
def test_positions_count_in_the_text_when_tokens_are_generated(family: str, edit: str) -> None:
    toy = TOYS[family]
    model = toy.make()
    prompts = padded(toy, model)
    plain = generate(model, prompts, NEW, LOOPS)
    changed = False
    for positions in ([0], [3], [LENGTHS[1], 6]):  # the second row generates the last ones
        with EDITS[edit](model, positions):
            cached = generate(model, prompts, NEW, LOOPS)
            whole = generate(model, prompts, NEW, LOOPS, use_cache=False)
        assert torch.equal(cached.new, whole.new)
        assert_close(cached.logits, whole.logits)
        changed |= not torch.allclose(cached.logits, plain.logits)
    assert changed


def test_positions_count_in_the_text_when_a_prompt_is_run_in_chunks() -> None:
    model = TOYS["melt"].make()
    tokens = random_tokens(model)
    seen: list[Tensor] = []
    name = "loops.1.blocks.0.hook_resid_post"

    def chunks() -> Tensor:
        seen.clear()
        with model.hooks([(name, lambda value, hook: seen.append(value))], n_loops=LOOPS):
            advance_in_chunks(model, model.begin(tokens, n_loops=LOOPS), 3)
        return torch.cat(seen, dim=1)

    before = chunks()
    with set_to(
        model, vector(model), site="resid_post", loops=[1], layers=[0], positions=[4], n_loops=LOOPS
    ):
        after = chunks()
    assert torch.equal(after[:, 4], vector(model).expand(len(tokens), -1))
    assert torch.equal(after[:, :4], before[:, :4])


def test_positions_count_in_the_text_when_a_run_is_continued_for_some_rows() -> None:
    model = TOYS["ouro"].make()
    tokens = random_tokens(model)
    state, store = model.begin(tokens, n_loops=LOOPS), {}
    whole = model.advance(state, store=store)
    edit = EDITS["set_to"](model, [5])
    with edit:
        edited = model.advance(state)
        some = model.advance(state.rows(pos=slice(4, 7)), supplied=store)
    assert_close(some.resid[:, :1], whole.resid[:, 4:5])
    assert_close(some.resid[:, 1:2], edited.resid[:, 5:6])


def test_a_position_that_a_text_does_not_have_is_refused() -> None:
    model = TOYS["ouro"].make()
    tokens = random_tokens(model)
    with EDITS["steer"](model, [2, 7]):
        with pytest.raises(ValueError, match=r"positions must be in 0\.\.6 in this run, got 7"):
            model(tokens, n_loops=LOOPS)
        batch = Batch(tokens, torch.ones_like(tokens), torch.full((3,), 6))
        for use_cache in (True, False):
            with pytest.raises(ValueError, match=r"positions must be in 0\.\.6 in this run, got 7"):
                generate(model, batch, NEW, LOOPS, use_cache=use_cache)
