"""Shortcut maps: states of random runs in the clean run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.panels import Panel
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.figures.circuit import shortcut
from loopscope.analyses.figures.circuit.shortcut import Shortcut, ShortcutConfig, ShortcutMap
from loopscope.analyses.pages.multi_hop_claims import shortcut_on_random_graph
from loopscope.interp.drawing.labels import label
from loopscope.models.core.base import LoopedModel

AVERAGE = ShortcutConfig(average=True, draws=2, seed=5, n_loops=3)


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The random graph's model in float64, with three questions of each hop count."""
    opened = open_subject(SourceConfig(checkpoint="mini/shortcut", per_hop=3))
    return replace(opened, model=opened.model.double())


def patched_margin(
    model: LoopedModel, clean: str, random: str, answer: str, name: str, position: int
) -> float:
    """The margin of a clean question with one state of the random run, by a hook of its own."""
    _, cache = model.run_with_cache(model.encode(random).tokens, n_loops=3)

    def put(value: Tensor, hook: HookPoint) -> Tensor:
        changed = value.clone()
        changed[:, position] = cache[name][:, position]
        return changed

    batch = model.encode(clean)
    logits = model.run_with_hooks(batch.tokens, n_loops=3, fwd_hooks=[(name, put)])[
        0, batch.readout[0]
    ]
    right = model.to_single_token(answer)
    return float(logits[right] - torch.cat([logits[:right], logits[right + 1 :]]).max())


@pytest.mark.parametrize(
    ("row", "name", "position"),
    [
        (0, "hook_embed", 1),
        (4, "loops.1.blocks.1.hook_resid_post", 2),
        (6, "loops.2.blocks.1.hook_resid_post", 3),
    ],
)
def test_a_cell_is_the_mean_over_patches_made_one_by_one(
    subject: Subject, row: int, name: str, position: int
) -> None:
    found = shortcut.measure(subject, 3, AVERAGE)
    assert len(found.random) == 6
    total = 0.0
    for clean, random in zip(subject.questions[3] * 2, found.random, strict=True):
        with torch.no_grad():
            patched = patched_margin(
                subject.model, clean.text, random, clean.answer, name, position
            )
            total += patched - patched_margin(
                subject.model, clean.text, clean.text, clean.answer, name, position
            )
    assert float(found.effect[row, position]) == pytest.approx(total / 6, abs=1e-9)
    assert abs(total) > 0.01


def test_random_runs_have_another_token_of_the_same_kind_everywhere(subject: Subject) -> None:
    found = shortcut.measure(subject, 3, AVERAGE)
    for clean, random in zip(found.texts * 2, found.random, strict=True):
        ours, theirs = (subject.model.to_str_tokens(text) for text in (clean, random))
        assert all(a != b and a[:3] == b[:3] for a, b in zip(ours, theirs, strict=True))
    assert found.random[:3] != found.random[3:]
    assert shortcut.measure(subject, 3, AVERAGE).random == found.random
    assert shortcut.measure(subject, 3, replace(AVERAGE, seed=6)).random != found.random


@pytest.mark.shapes
def test_the_one_question_is_one_that_is_answered(subject: Subject) -> None:
    found = shortcut.measure(subject, 6, ShortcutConfig(n_loops=4))
    assert len(found.texts) == 1
    assert found.clean_margin > 0
    assert found.tokens == tuple(subject.model.to_str_tokens(found.texts[0]))
    assert found.effect.shape == (1 + 4 * 2, 7)
    assert found.steps()[:3] == ["embed", "0.0", "0.1"]


@pytest.mark.shapes
def test_shares_of_a_map_worked_out_by_hand() -> None:
    effect = torch.tensor([[-1.0, 2.0, 0.0, -3.0, 2.0], [0.0, -2.0, 0.0, -5.0, 5.0]])
    tokens = ("<e_1>", "<r_2>", "<r_2>", "<r_0>", "<r_7>")
    names = ("hook_embed", "loops.0.blocks.0.hook_resid_post")
    found = ShortcutMap(4, ("q",), ("<e_5><r_1><r_1><r_1><r_1>",), tokens, names, effect, 1.0)
    assert found.share().tolist() == pytest.approx([0.05, 0.2, 0.0, 0.4, 0.35])
    assert found.last_half() == pytest.approx(0.75)
    assert found.columns() == ["0 <e_1>", "1 <r_2>", "2 <r_2>", "3 <r_0>", "4 <r_7>"]
    assert replace(found, texts=("q", "p")).columns() == ["head", "r1", "r2", "r3", "r4"]
    row = Shortcut((Panel("run", None, None),), (found,)).summary().iloc[0]
    assert (row["on the last half"], row["on the head"], row["largest effect"]) == pytest.approx(
        (0.75, 0.05, -5.0)
    )
    assert row["at"] == "loops.0.blocks.0.hook_resid_post at 3 <r_0>"


def test_maps_of_unlike_models_are_drawn_on_one_scale() -> None:
    record = shortcut.run(
        ShortcutConfig(n_loops=2, checkpoints=("mini/shortcut", "mini/multi_hop/r2"), hops=4)
    )
    figure = shortcut.figure(record)
    assert [trace.type for trace in figure.data] == ["bar", "heatmap"] * 2
    most = max(float(each.effect.abs().max()) for each in record.maps)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == pytest.approx(
        (-most, most)
    )
    assert figure.data[3].z[1] == pytest.approx(record.maps[1].effect[1].tolist())
    assert sum(figure.data[0].y) == pytest.approx(1.0)
    random = record.maps[0].random[0]
    assert figure.data[1].customdata[0][2] == "hook_embed<br>embedding<br>" + label(
        f"in the random run <{random.split('<')[3]}"
    )
    assert len(record.frame()) == 2 * 5 * 5


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one random run, got draws=0"):
        shortcut.run(ShortcutConfig(draws=0))
    with pytest.raises(ValueError, match="1 to 12 hops, got hops=13"):
        shortcut.run(ShortcutConfig(hops=13))


def test_without_a_trained_depth_the_hops_must_be_said(subject: Subject) -> None:
    with pytest.raises(
        ValueError,
        match="the card of mini/shortcut does not say how many hops were trained; pass --hops",
    ):
        shortcut._hops(replace(subject, card={}), None)
    with pytest.raises(ValueError, match="needs a second token of the kind of </a>"):
        shortcut._random_question(subject, "</a>", torch.Generator())


@pytest.mark.slow
def test_the_miniature_on_the_random_graph_takes_no_shortcut() -> None:
    claim = shortcut_on_random_graph()
    assert claim.verdict == "no"
    assert (
        "0.66 on the random graph (6 hops), 0.66 on the permutation graph (8 hops; 0.67 on 6)"
        in claim.found
    )
