"""Models and records show themselves on one screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from family_toys import TOYS
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dynamics.states import dynamics
from loopscope.interp.exits.halting import halting
from loopscope.interp.generation import generate
from loopscope.interp.lens.lens import logit_lens
from loopscope.interp.lens.tuned_lens import TunedLens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.models.views import untied
from toy import LOOPS, padded, toy

RECORDS: dict[str, Callable[[RecurrentDepth], Any]] = {
    "Lens": lambda m: logit_lens(m, padded(), 20, positions="all"),
    "Sweep": lambda m: activation_patch(m, padded(), padded(), lambda x: x[:, 0], LOOPS),
    "Dynamics": lambda m: dynamics(m, padded(), 30),
    "Halting": lambda m: halting(m, padded(), n_loops=LOOPS),
    "Generated": lambda m: generate(m, padded(), 2, LOOPS),
    "TunedLens": lambda m: TunedLens.identity(m, LOOPS),
}


def fits(text: str) -> bool:
    lines = text.splitlines()
    return len(lines) <= 24 and max(map(len, lines)) <= 140


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_fits_one_screen(name: str) -> None:
    record = RECORDS[name](toy())
    assert isinstance(record, OneScreen)
    text, page = repr(record), record._repr_html_()
    assert text.startswith(f"{name}\n")
    assert fits(text)
    assert page.startswith(f"<pre>{name}\n")
    assert len(page) < 10_000
    assert ("<table" in page) == hasattr(record, "frame")


def test_a_lens_shows_the_top_tokens_of_the_first_example() -> None:
    lens = logit_lens(toy(), padded(), LOOPS, positions=[0, 3])
    page, top = lens._repr_html_(), lens.top(1)
    for visit in range(len(lens.names)):
        for read in range(2):
            token, prob = int(top.tokens[visit, read, 0]), float(top.probs[visit, read, 0])
            assert f"<td>{token} {prob:.2f}</td>" in page
    assert page.count("<td>") == 2 * len(lens.names)


@pytest.mark.parametrize("family", TOYS)
def test_a_model_fits_one_screen(family: str) -> None:
    model = TOYS[family].make()
    text, page = repr(model), model._repr_html_()
    assert fits(text)
    assert text.startswith(f"{type(model).__name__} of the family {model.cfg.family}\n")
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters, float64 on cpu" in text
    last = [visit for visit in model.schedule(1) if visit.loop is not None][-1]
    flat = " ".join(text.split())
    assert f"{model.cfg.n_loops} x loops.t.[" in flat
    assert last.name.removeprefix("loops.0.") in flat
    assert all(site in flat for site in last.sites)
    assert page.startswith(f"<b>{type(model).__name__} of the family")


def test_an_untied_copy_shows_itself_too(plain: RecurrentDepth) -> None:
    assert fits(repr(untied(plain, 2)))
    assert "float64" in repr(untied(plain.to(torch.float64), 2))
