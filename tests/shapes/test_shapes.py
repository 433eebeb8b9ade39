"""Every public call on every family, with the shapes in all signatures checked while it runs.

`make shapes` runs these tests alone, under the import hook of `shape_hook`; the other tests run
without it.
The run fails when a function whose signature states a shape was never called in it.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import TypeCheckError

from loopscope import (
    ActivationStore,
    Sweep,
    activation_patch,
    circuit_scores,
    collect,
    evaluate_circuit,
    export_dataset,
    export_parquet,
    generate,
    logit_lens,
    merge,
    select_circuit,
    wrap,
)
from loopscope.analyses import trials
from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.pages import families
from loopscope.analyses.pages.entity_path import Pairs
from loopscope.interp.circuits.scores import Method
from loopscope.interp.lens.record import Lens
from loopscope.models.core.registry import FAMILIES
from shipped_pages import shipped
from toy import full, padded, projection, toy

pytestmark = pytest.mark.shapes


def test_shapes_are_checked() -> None:
    with pytest.raises(TypeCheckError):
        toy().unembed(torch.zeros(2, 3))


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_method_on_every_family(family: str) -> None:
    refused = trials.refusals(family)
    assert set(refused) == set(trials.methods())
    assert not any("Type-check error" in why for why in refused.values())
    reasons = {
        method: families.sentence(why, method, family) for method, why in refused.items() if why
    }
    said = {method: why for (method, of), why in shipped().reasons.items() if of == family}
    assert reasons == said, "docs/families.md is not what `loopscope families` writes"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_view_of_the_weights(family: str) -> None:
    model = trials.tiny(family)
    views = {
        (type(module), name): getattr(module, name)
        for module in (model, *model.modules())
        for name, kind in inspect.getmembers(type(module))
        if isinstance(kind, property) and re.fullmatch("[Wb]_[A-Za-z]+", name)
    }
    assert {"W_E", "W_U", "b_U", "W_O"} <= {name for _, name in views}
    assert all(isinstance(view, torch.Tensor) for view in views.values())


@pytest.mark.parametrize(
    ("method", "by_position"), [("eap", False), ("eap-ig-activations", False), ("ig-edges", True)]
)
def test_circuits_by_the_divergence(method: Method, by_position: bool) -> None:
    model, clean, corrupted = toy(), full(1), full(2)
    given = (model, clean, corrupted, "kl", 1)
    scores = circuit_scores(*given, method=method, steps=2, by_position=by_position)
    chosen = select_circuit(scores, 9)
    said = evaluate_circuit(model, clean, corrupted, chosen, "kl", minimality=True)
    assert len(said.frame()) == 1
    assert said.cmd >= abs(1 - said.cpr) - 1e-9


def test_a_generation_without_order_is_refused() -> None:
    model = toy()
    with torch.no_grad():
        model.final_norm.w.fill_(torch.nan)
    with pytest.raises(ValueError, match="ln_final"):
        generate(model, full(), 2)


class Theirs(torch.nn.Module):
    """A looped module that is wrapped."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = torch.nn.Embedding(19, 6), torch.nn.Linear(6, 19)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(6, 6)])
        self.norm = torch.nn.LayerNorm(6)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.words(tokens)
        for _ in range(3):
            x = self.layers[0](x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def test_a_wrapped_module() -> None:
    model = wrap(Theirs(), blocks="layers", n_loops=3, norm="norm", head="head")
    tokens = torch.arange(10).view(2, 5)
    logits, loss = model(tokens, return_type="both")
    lens = logit_lens(model, tokens, readout=-1, keep_logits=True)
    assert lens.logits is not None
    torch.testing.assert_close(lens.logits[-1], logits[:, -1])
    assert loss.shape == ()
    assert model.W_E.shape == (19, 6)
    assert model.W_U.shape == (6, 19)
    assert model.b_U.shape == (19,)


def test_a_store_and_its_exports(tmp_path: Path) -> None:
    model = toy()
    options: dict[str, Any] = {"n_loops": 2, "per_file": 2}
    collect(model, full(), to=tmp_path / "store", shard=(0, 2), **options)
    collect(model, full(), to=tmp_path / "store", shard=(1, 2), **options)
    store = merge(tmp_path / "store")
    assert isinstance(store, ActivationStore)
    assert sum(map(len, store.batches(4, seed=0))) == len(store.read()) == len(store)
    assert store.visit("loops.1.blocks.0.hook_resid_post").shape[0] == len(store)
    export_dataset(store, tmp_path / "set", 3, loop=0, layer=1)
    export_parquet(store, tmp_path / "all.parquet")


def test_work_in_shards(tmp_path: Path) -> None:
    model, clean, corrupted = toy(), padded(1), padded(2)
    for i in range(2):
        logit_lens(model, clean, 2, batch_size=2, save_to=tmp_path / "lens", shard=(i, 2))
        activation_patch(
            model, clean, corrupted, projection(), 2, save_to=tmp_path / "sweep", shard=(i, 2)
        )
    assert isinstance(merge(tmp_path / "lens", model), Lens)
    assert isinstance(merge(tmp_path / "sweep"), Sweep)


def test_the_answers_that_the_findings_count() -> None:
    subject = open_subject(SourceConfig(checkpoint="ltg_trained", per_hop=3))
    pairs = Pairs.of(subject, 2)
    logits = subject.model.readout(
        subject.model.advance(subject.model.begin(pairs.clean.tokens, pairs.clean.mask, n_loops=8)),
        pairs.clean.readout,
    )
    assert pairs.right(logits).tolist() == (logits.argmax(-1) == pairs.answers).tolist()
