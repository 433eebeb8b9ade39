"""Every public call on every family, with the shapes in all signatures checked while it runs.

`make shapes` runs these tests alone, under jaxtyping's import hook; the other tests run without it.
The last test fails when a function whose signature states a shape was never called here.
"""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from jaxtyping import TypeCheckError

from annotated import CALLED, annotated
from loopscope import generate
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.pages import families
from loopscope.analyses.pages.findings import Pairs
from loopscope.models.core.registry import FAMILIES
from paths import ROOT
from toy import full, toy

pytestmark = pytest.mark.shapes


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        toy().unembed(torch.zeros(2, 3))


def test_every_method_on_every_family() -> None:
    found = families.run()
    assert set(found.methods.columns[1:]) == set(FAMILIES)
    assert {row["method"] for _, row in found.methods.iterrows()} == set(families.methods())


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_view_of_the_weights(family: str) -> None:
    model = families.tiny(family)
    views = {
        (type(module), name): getattr(module, name)
        for module in (model, *model.modules())
        for name, kind in inspect.getmembers(type(module))
        if isinstance(kind, property) and re.fullmatch("[Wb]_[A-Za-z]+", name)
    }
    assert {"W_E", "W_U", "b_U", "W_O"} <= {name for _, name in views}
    assert all(isinstance(view, torch.Tensor) for view in views.values())


def test_a_generation_without_order_is_refused() -> None:
    model = toy()
    with torch.no_grad():
        model.final_norm.w.fill_(torch.nan)
    with pytest.raises(ValueError, match="ln_final"):
        generate(model, full(), 2)


def test_the_answers_that_the_findings_count() -> None:
    subject = open_subject(SourceConfig(checkpoint="ltg_trained", per_hop=3))
    pairs = Pairs.of(subject, 2)
    logits = subject.model.readout(
        subject.model.advance(subject.model.begin(pairs.clean.tokens, pairs.clean.mask, n_loops=8)),
        pairs.clean.readout,
    )
    assert pairs.right(logits).tolist() == (logits.argmax(-1) == pairs.answers).tolist()


def test_every_function_that_states_a_shape_was_called() -> None:
    stated = annotated(ROOT)
    assert len(stated) > 200
    assert sorted(stated - CALLED) == []
