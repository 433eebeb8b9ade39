"""Causal tracing: each cell is one run with that one state patched."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.interp.common.metrics import margin
from loopscope.interp.patching.tracing import Trace, causal_tracing, denoising_map, noising_map
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.facts import first_relation, look_up
from loopscope.tasks.graphs import PermutationGraph
from loopscope.tasks.multi_hop import sample_facts
from paths import SHIPPED
from toy import (
    BATCH,
    LAYERS,
    LENGTHS,
    POS,
    SHORTEST,
    assert_close,
    cached,
    full,
    hook_count,
    index_at,
    padded,
    put,
    random_tokens,
    run,
    run_hooked,
)

GRAPH = SHIPPED / "ltg_trained" / "graph.json"
ANSWERS = torch.tensor([4, 17, 28])
DEPTHS = [
    "hook_embed",
    *(
        f"loops.{t}.blocks.{layer}.hook_resid_post"
        for t in range(SHORTEST)
        for layer in range(LAYERS)
    ),
]


def at_readout(batch: Batch, logits: Tensor) -> Tensor:
    return logits[torch.arange(BATCH), batch.readout]


def one_by_one(
    model: LoopedModel, base: Batch, source: Batch, positions: list[int]
) -> Iterator[Tensor]:
    """Logits at the readout with one state of the source's run put into the base's, by depth and
    then position.
    """
    values = cached(model, source, DEPTHS, SHORTEST)
    for name in DEPTHS:
        for position in positions:
            yield at_readout(
                base,
                run_hooked(
                    model, base, name, put(values[name], index_at(name, position)), SHORTEST
                ),
            )


def test_strength_is_the_share_of_top_tokens_that_change(model: RecurrentDepth) -> None:
    clean, corrupted = padded(1), padded(2)
    found = causal_tracing(model, clean, corrupted, ANSWERS, 3, SHORTEST)
    before = at_readout(clean, run(model, clean, SHORTEST)).argmax(-1)
    patched = list(one_by_one(model, clean, corrupted, [3]))
    expected = [(logits.argmax(-1) != before).double().mean().item() for logits in patched]
    assert found.effect[:, 0].tolist() == pytest.approx(expected, abs=1e-6)
    assert 0 < sum(expected) < len(expected)
    margins = torch.stack([margin(logits, ANSWERS) for logits in patched])
    assert_close(found.sweep.also["logit_margin"].values, margins)
    assert found.sweep.clean.tolist() == [0.0] * BATCH


def test_denoising_is_the_margin_that_comes_back(model: RecurrentDepth) -> None:
    clean, corrupted = padded(1), padded(2)
    found = denoising_map(model, clean, corrupted, ANSWERS, [4, 1], SHORTEST)
    low, high = (
        margin(at_readout(batch, run(model, batch, SHORTEST)), ANSWERS)
        for batch in (corrupted, clean)
    )
    patched = [margin(logits, ANSWERS) for logits in one_by_one(model, corrupted, clean, [4, 1])]
    expected = []
    for value, position in zip(patched, [4, 1] * len(DEPTHS), strict=True):
        has = clean.readout >= position  # the others have no such position
        expected.append((value - low)[has].mean() / (high - low)[has].mean())
    assert_close(found.effect, torch.stack(expected).view(-1, 2))
    assert found.positions == (4, 1)
    assert found.frame()["examples"].tolist() == [2, 3] * len(DEPTHS)


def test_noising_is_the_margin_that_is_lost(model: RecurrentDepth) -> None:
    clean, corrupted = padded(1), padded(2)
    found = noising_map(model, clean, corrupted, ANSWERS, n_loops=SHORTEST)
    before = margin(at_readout(clean, run(model, clean, SHORTEST)), ANSWERS)
    patched = list(one_by_one(model, clean, corrupted, list(range(POS))))
    expected = [
        (margin(logits, ANSWERS) - before)[clean.readout >= position].mean()
        for logits, position in zip(patched, [*range(POS)] * len(DEPTHS), strict=True)
    ]
    assert_close(found.effect, torch.stack(expected).view(-1, POS))
    assert found.positions == tuple(range(POS))


def test_restoring_the_whole_embedding_that_differs_restores_everything(
    plain: RecurrentDepth,
) -> None:
    clean, corrupted = full(1), full(1)
    corrupted.tokens[:, 3] = corrupted.tokens[:, 3] % 28 + 1
    found = denoising_map(plain, clean, corrupted, ANSWERS, n_loops=SHORTEST)
    assert_close(found.effect[0], torch.eye(POS, dtype=torch.float64)[3])


def test_depths_and_their_names(plain: RecurrentDepth) -> None:
    found = noising_map(plain, padded(1), padded(2), ANSWERS, [0, 3], SHORTEST)
    assert found.names == tuple(DEPTHS)
    assert found.loops == (None, 0, 0, 1, 1)
    assert found.layers == (None, 0, 1, 0, 1)
    frame = found.frame()
    assert list(frame.columns) == [
        "depth",
        "name",
        "loop",
        "layer",
        "position",
        "effect",
        "examples",
    ]
    assert len(frame) == len(DEPTHS) * 2
    row = frame[(frame.depth == 4) & (frame.position == 3)].to_dict("records")
    assert [(r["name"], r["loop"], r["layer"], r["effect"]) for r in row] == [
        (DEPTHS[4], 1, 1, found.effect[4, 1].item())
    ]


METHODS: list[Callable[..., Trace]] = [
    lambda *inputs, **options: causal_tracing(*inputs, ANSWERS, 2, 2, **options),
    lambda *inputs, **options: denoising_map(*inputs, ANSWERS, n_loops=2, **options),
    lambda *inputs, **options: noising_map(*inputs, ANSWERS, n_loops=2, **options),
]


@pytest.mark.parametrize("method", METHODS)
def test_inputs_may_be_tokens_with_a_column(
    method: Callable[..., Trace], plain: RecurrentDepth
) -> None:
    expected = method(plain, full(1), full(2))
    assert torch.equal(
        method(plain, random_tokens(1), random_tokens(2), readout=-1).effect, expected.effect
    )
    assert not expected.effect.requires_grad
    assert hook_count(plain) == 0


@pytest.mark.parametrize("method", METHODS)
def test_inputs_that_do_not_match_are_refused(
    method: Callable[..., Trace], plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match="each clean input must be as long as its corrupted one"):
        method(plain, padded(1), padded(2, lengths=LENGTHS[::-1]))


def test_what_cannot_be_traced_is_refused(plain: RecurrentDepth) -> None:
    with pytest.raises(ValueError, match=r"positions must be in 0\.\.6, got 7"):
        causal_tracing(plain, padded(1), padded(2), ANSWERS, 7)
    with pytest.raises(ValueError, match="have the same mean logit_margin"):
        denoising_map(plain, padded(1), padded(1), ANSWERS)


def test_trained_model_needs_the_bridge_at_the_first_relation_until_the_second_has_read_it() -> (
    None
):
    """Two hops: the state at r1 decides the answer until the second iteration's first block has
    read it.
    """
    model, graph, rng = load("ltg_trained"), PermutationGraph.read(GRAPH), np.random.default_rng(0)
    facts = sample_facts(graph, 2, 40, rng, held_out=True)
    heads, relations = facts.path[:, 0], facts.tokens[:, 1:] - first_relation(graph.n_entities)
    other = relations.copy()
    other[:, 0] = (other[:, 0] + rng.integers(1, graph.n_relations, len(facts))) % graph.n_relations
    tokens, answers = torch.from_numpy(facts.tokens), torch.from_numpy(facts.answers)
    strength = causal_tracing(
        model,
        tokens,
        torch.from_numpy(look_up(graph, heads, other).tokens),
        answers,
        1,
        4,
        readout=-1,
    ).effect
    assert strength[:3].min() > 0.8
    assert strength[3:].max() < 0.05
    both = look_up(
        graph, (heads + rng.integers(1, graph.n_entities, len(facts))) % graph.n_entities, other
    )
    recovery = denoising_map(
        model, tokens, torch.from_numpy(both.tokens), answers, n_loops=4, readout=-1
    ).effect
    assert recovery[1, 1] > 0.9
    assert recovery[:, 0].abs().max() < 0.1
    assert recovery[3:, 2].min() > 0.9
