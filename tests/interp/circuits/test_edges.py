"""Edge attribution: each edge is the derivative through one reader alone, and edges sum to what
they are parts of.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from circuits.compiled import NoNorm
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.circuits.edge_attribution import (
    ComponentEnd,
    EdgeAttribution,
    edge_attribution,
)
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.core.hooks import Taps
from loopscope.models.families.recurrent_depth import RecurrentDepth
from toy import (
    BATCH,
    D_MODEL,
    LAYERS,
    LOOPS,
    POS,
    BatchCentred,
    assert_close,
    odd_one,
    padded,
    projection,
    run_hooked,
    toy,
)

SHORT = 2


def rank(end: tuple, n_visits: int) -> int:
    """When a writer writes or a reader reads: attention of visit i at 2i, its MLP at 2i + 1."""
    kind, loop, layer = end
    if loop is None:
        return {"embed": -1, "final": 2 * n_visits}[kind]
    return 2 * (loop * LAYERS + layer) + ["attn", "mlp"].index(kind)


def across(found: EdgeAttribution, cut: int, n_visits: int) -> Tensor:
    """The sum of the edges from what writes before a place of the stream to what reads from there
    on.
    """
    chosen = [
        rank(edge.writer, n_visits) < cut <= rank(edge.reader, n_visits) for edge in found.edges
    ]
    return found.values[torch.tensor(chosen)].sum(0)


@pytest.fixture(params=["none", "learned", "sinusoidal"])
def additive(request: pytest.FixtureRequest) -> RecurrentDepth:
    """A toy whose residual stream is a sum, for each kind of positions."""
    return toy(request.param)


def reader_input(model: RecurrentDepth, end: tuple) -> tuple[str, nn.Module, str]:
    """Which stream a reader reads, through which norm, and the norm's hook point."""
    kind, loop, layer = end
    if loop is None:
        return (
            f"loops.{SHORT - 1}.blocks.{LAYERS - 1}.hook_resid_post",
            model.final_norm,
            "ln_final.hook_out",
        )
    site, norm = {"attn": ("resid_pre", "ln1"), "mlp": ("resid_mid", "ln2")}[kind]
    block = f"loops.{loop}.blocks.{layer}"
    return (
        f"{block}.hook_{site}",
        getattr(model.blocks[layer], norm),
        f"{block}.{norm}.hook_out",
    )


def test_each_edge_is_the_derivative_through_one_reader(additive: RecurrentDepth) -> None:
    """A reader alone is given the stream in which one writer's output moves; every other component
    sees the corrupted run's.
    """
    clean, corrupted = padded(1), padded(2)
    found = edge_attribution(additive, clean, corrupted, projection(), SHORT)
    there, here = (
        additive.run_with_cache(b.tokens, n_loops=SHORT, mask=b.mask, names_filter="**")[1]
        for b in (clean, corrupted)
    )
    written = {ComponentEnd("embed", None, None): "hook_embed"}
    written |= {
        ComponentEnd(kind, t, i): f"loops.{t}.blocks.{i}.hook_{kind}_out"
        for kind in ("attn", "mlp")
        for t in range(SHORT)
        for i in range(LAYERS)
    }
    for reader in dict.fromkeys(edge.reader for edge in found.edges):
        into = [i for i, edge in enumerate(found.edges) if edge.reader == reader]
        names = [written[found.edges[i].writer] for i in into]
        shares = torch.zeros(len(into), BATCH, 1, 1, dtype=torch.float64, requires_grad=True)
        stream, norm, point = reader_input(additive, reader)
        moved = here[stream] + sum(
            share * (there[name] - here[name]) for share, name in zip(shares, names, strict=True)
        )
        read = norm(moved, {})
        logits = run_hooked(additive, corrupted, point, lambda _, hook, read=read: read, SHORT)
        metric = projection()(logits[torch.arange(BATCH), corrupted.readout]).sum()
        assert_close(found.values[into], torch.autograd.grad(metric, shares)[0][..., 0, 0])


def test_edges_across_a_place_sum_to_its_attribution(additive: RecurrentDepth) -> None:
    clean, corrupted = padded(1), padded(2)
    found = edge_attribution(additive, clean, corrupted, projection(), LOOPS)
    for site, half in (("resid_pre", 0), ("resid_mid", 1)):
        whole = attribution_patch(additive, clean, corrupted, projection(), LOOPS, sites=site)
        effects = (whole.values - whole.corrupted).view(LOOPS * LAYERS, POS, BATCH).sum(1)
        for visit, effect in enumerate(effects):
            assert_close(across(found, 2 * visit + half, LOOPS * LAYERS), effect)


def test_edges_of_one_position_sum_to_its_attribution(plain: RecurrentDepth) -> None:
    """Before the first visit only the embedding has written, position by position."""
    found = edge_attribution(plain, padded(1), padded(2), projection(), SHORT)
    embedded = attribution_patch(plain, padded(1), padded(2), projection(), SHORT, sites="embed")
    from_embedding = torch.tensor([edge.writer.kind == "embed" for edge in found.edges])
    assert_close(found.by_position[from_embedding].sum(0).T, embedded.values - embedded.corrupted)


class LinearMLP(nn.Module):
    """One matrix."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x: Tensor, taps: Taps) -> Tensor:
        return x @ self.weight


def linear_model() -> RecurrentDepth:
    """No norms, MLPs of one matrix, and attention whose pattern is the mean over what is seen:
    linear in the embedding.
    """
    model = toy("learned")
    model.final_norm = NoNorm("ln_final")
    for block in model.blocks:
        block.ln1, block.ln2 = NoNorm("ln1"), NoNorm("ln2")
        block.mlp = LinearMLP(
            (block.mlp.W_in[:, :D_MODEL] @ block.mlp.W_out[:D_MODEL]).detach() / 4
        )
        with torch.no_grad():
            block.attn.W_QKV[:, : 2 * D_MODEL] = 0.0
            block.attn.b_QKV[: 2 * D_MODEL] = 0.0
    return model


def test_on_a_linear_model_edges_across_any_place_are_the_whole_change() -> None:
    found = edge_attribution(linear_model(), padded(1), padded(2), projection(), LOOPS)
    for cut in range(2 * LOOPS * LAYERS + 1):
        assert_close(across(found, cut, LOOPS * LAYERS), found.clean - found.corrupted)


def test_on_a_linear_model_edges_into_a_reader_are_its_exact_patch() -> None:
    model, clean, corrupted = linear_model(), padded(1), padded(2)
    found = edge_attribution(model, clean, corrupted, projection(), LOOPS)
    sites = {"attn": "ln1.normalized", "mlp": "ln2.normalized", "final": "ln_final.normalized"}
    exact = activation_patch(
        model, clean, corrupted, projection(), LOOPS, sites=list(sites.values())
    )
    readers = {edge.reader for edge in found.edges}
    assert len(readers) == 2 * LOOPS * LAYERS + 1
    for reader in readers:
        into = torch.tensor([edge.reader == reader for edge in found.edges])
        same = [
            (c.site, c.loop, c.layer) == (sites[reader.kind], reader.loop, reader.layer)
            for c in exact.cells
        ]
        assert_close(
            found.values[into].sum(0), (exact.values - exact.corrupted)[torch.tensor(same)].sum(0)
        )


def test_edges_lead_from_every_writer_to_every_later_reader(plain: RecurrentDepth) -> None:
    found = edge_attribution(plain, padded(1), padded(2), projection(), 3)
    writers = [
        ("embed", None, None),
        *(
            (kind, t, layer)
            for t in range(3)
            for layer in range(LAYERS)
            for kind in ("attn", "mlp")
        ),
    ]
    readers = [*writers[1:], ("final", None, None)]
    expected = [
        (w, r) for r in readers for w in writers if rank(w, 3 * LAYERS) < rank(r, 3 * LAYERS)
    ]
    assert [(tuple(edge.writer), tuple(edge.reader)) for edge in found.edges] == expected
    assert found.by_position.shape == (len(expected), BATCH, POS)
    assert not found.by_position.requires_grad
    exact = activation_patch(plain, padded(1), padded(2), projection(), 3, positions=[0])
    assert_close(found.clean, exact.clean)
    assert_close(found.corrupted, exact.corrupted)


def test_frame_of_edges(plain: RecurrentDepth) -> None:
    found = edge_attribution(plain, padded(1), padded(2), projection(), SHORT)
    frame = found.frame()
    assert list(frame.columns) == [
        "writer",
        "writer_loop",
        "writer_layer",
        "reader",
        "reader_loop",
        "reader_layer",
        "value",
    ]
    assert frame["value"].tolist() == found.values.mean(1).tolist()
    last = frame.iloc[-1]
    assert (last["writer"], last["writer_loop"], last["writer_layer"], last["reader"]) == (
        "mlp",
        1,
        LAYERS - 1,
        "final",
    )
    assert frame.loc[frame["reader"] == "final", "reader_loop"].isna().all()
    assert found.metric == "projection"


# Refusals


def test_edges_are_refused_where_the_stream_is_no_sum() -> None:
    with pytest.raises(
        ValueError,
        match=(
            r"edge_attribution needs a residual stream that is the sum.*adds the input again before"
            r" each"
        ),
    ):
        edge_attribution(toy(injection=True), padded(1), padded(2), projection())
    with pytest.raises(ValueError, match=r"components' outputs must sum to the residual stream"):
        edge_attribution(odd_one(BatchCentred), padded(1), padded(2), projection())


def test_edges_need_the_stream_between_attention_and_mlp(plain: RecurrentDepth) -> None:
    plain._schedules.made[SHORT] = [
        replace(v, sites=tuple(s for s in v.sites if s != "hook_resid_mid"))
        for v in plain.schedule(SHORT)
    ]
    with pytest.raises(
        ValueError,
        match=(
            r"must have the site 'hook_resid_mid', which shows what its components read or add, but"
            r" loops\.0\.blocks\.0 has none"
        ),
    ):
        edge_attribution(plain, padded(1), padded(2), projection(), SHORT)
