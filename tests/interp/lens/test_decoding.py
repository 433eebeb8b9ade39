"""Ranks along a lens and decodability by depth, against plain loops over full logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loopscope.checkpoints.load import load
from loopscope.interp.lens.decoding import decodability, rank_trajectory
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.families.recurrent_depth import RecurrentDepth
from loopscope.tasks.graphs import PermutationGraph
from loopscope.tasks.multi_hop import sample_facts
from paths import SHIPPED
from toy import (
    BATCH,
    D_VOCAB,
    LAYERS,
    LENGTHS,
    LOOPS,
    POS,
    assert_close,
    full,
    padded,
    random_tokens,
    toy,
    with_words,
)

TARGETS = torch.tensor([[4, 17], [28, 3], [9, 11]])
GRAPH = SHIPPED / "ltg_trained" / "graph.json"
COLUMNS = torch.tensor([[1, 6], [0, 3], [2, 2]])


def slow_ranks(model: RecurrentDepth, batch: Batch, targets: Tensor, columns: Tensor) -> Tensor:
    """Rank of each target at its column, "visit batch target", one example, visit and target at a
    time.
    """
    logits = logit_lens(model, batch, LOOPS, positions="all", keep_logits=True).logits.view(
        LOOPS * LAYERS, BATCH, POS, D_VOCAB
    )
    found = torch.zeros(len(logits), *targets.shape)
    for visit in range(len(logits)):
        for example in range(BATCH):
            for k in range(targets.shape[1]):
                row = logits[visit, example, columns[example, k]].tolist()
                found[visit, example, k] = sum(other > row[targets[example, k]] for other in row)
    return found


# Ranks of several tokens


@pytest.mark.shapes
def test_ranks_and_probabilities_of_several_tokens(model: RecurrentDepth) -> None:
    lens = logit_lens(model, padded(), LOOPS, keep_logits=True)
    found = rank_trajectory(lens, TARGETS)
    readout = padded().readout[:, None].expand(-1, 2)
    assert found.rank.tolist() == slow_ranks(model, padded(), TARGETS, readout).tolist()
    assert_close(found.prob, lens.logits.softmax(-1)[:, torch.arange(BATCH)[:, None], TARGETS])
    expected = (1 / (found.rank.double() + 1)).sum(1) / BATCH
    assert_close(found.mean_reciprocal_rank(), expected)


@pytest.mark.parametrize("words", [False, True])
def test_frame_of_ranks(words: bool, plain: RecurrentDepth) -> None:
    model = with_words(plain) if words else plain
    found = rank_trajectory(logit_lens(model, padded(), LOOPS), TARGETS)
    frame = found.frame()
    assert list(frame.columns) == [
        "example",
        "position",
        "visit",
        "loop",
        "layer",
        "depth",
        "target",
        "token",
        "rank",
        "prob",
    ]
    assert len(frame) == LOOPS * LAYERS * BATCH * 2
    row = frame[
        (frame.loop == 2) & (frame.layer == 1) & (frame.example == 1) & (frame.target == 0)
    ].to_dict("records")
    assert len(row) == 1
    token = "<t_28>" if words else 28
    assert (row[0]["visit"], row[0]["depth"], row[0]["position"], row[0]["token"]) == (
        "loops.2.blocks.1",
        6,
        LENGTHS[1] - 1,
        token,
    )
    assert row[0]["rank"] == found.rank[5, 1, 0]
    assert row[0]["prob"] == found.prob[5, 1, 0]


def test_ranks_of_whole_iterations_have_no_layer(plain: RecurrentDepth) -> None:
    frame = rank_trajectory(readout_lens(plain, padded(), LOOPS), TARGETS).frame()
    assert frame["layer"].isna().all()
    assert frame["depth"].unique().tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TARGETS[:2], r"the lens has 3 reads, got the shape \[2\]"),
        (TARGETS[:, :0], "at least one target token"),
        (TARGETS + 20, r"tokens must be in 0\.\.28"),
    ],
)
def test_tokens_that_do_not_fit_are_refused(
    tokens: Tensor, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        rank_trajectory(readout_lens(plain, padded(), 2), tokens)


# Decodability


def test_decodability_by_its_definition(model: RecurrentDepth) -> None:
    found = decodability(model, padded(), TARGETS, COLUMNS, LOOPS)
    ranks = slow_ranks(model, padded(), TARGETS, COLUMNS)
    assert_close(found.accuracy, (ranks == 0).double().mean(1))
    assert_close(found.mean_reciprocal_rank, (1 / (ranks.double() + 1)).mean(1))
    assert found.names == tuple(visit.name for visit in model.schedule(LOOPS))
    assert found.n_examples == BATCH


def test_accuracy_counts_the_top_tokens(plain: RecurrentDepth) -> None:
    """The targets are what the lens shows at one depth, at two of three examples."""
    top = (
        logit_lens(plain, padded(), LOOPS, positions="all").top(1).tokens[5, :, 0].view(BATCH, POS)
    )
    targets = torch.stack([top[:, 1], top[:, 3]], dim=1)
    targets[2, 1] = (targets[2, 1] + 1) % D_VOCAB
    found = decodability(plain, padded(), targets, [1, 3], LOOPS)
    assert found.accuracy[5].tolist() == pytest.approx([1.0, 2 / 3])


def test_columns_for_all_examples_and_of_each_are_the_same(plain: RecurrentDepth) -> None:
    shared = decodability(plain, padded(), TARGETS, [5, 1], LOOPS)
    each = decodability(plain, padded(), TARGETS, torch.tensor([[5, 1]] * BATCH), LOOPS)
    assert torch.equal(shared.mean_reciprocal_rank, each.mean_reciprocal_rank)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_decodability_in_pieces_is_the_same(batch_size: int, model: RecurrentDepth) -> None:
    whole = decodability(model, padded(), TARGETS, COLUMNS, LOOPS)
    pieces = decodability(model, padded(), TARGETS, COLUMNS, LOOPS, batch_size=batch_size)
    assert torch.equal(pieces.accuracy, whole.accuracy)
    assert_close(pieces.mean_reciprocal_rank, whole.mean_reciprocal_rank)


def test_tokens_need_no_readout(plain: RecurrentDepth) -> None:
    expected = decodability(plain, full(), TARGETS, COLUMNS)
    assert torch.equal(
        decodability(plain, random_tokens(), TARGETS, COLUMNS).accuracy, expected.accuracy
    )


def test_frame_of_decodability(plain: RecurrentDepth) -> None:
    found = decodability(plain, padded(), TARGETS, COLUMNS, LOOPS)
    frame = found.frame(["bridge", "answer"])
    assert list(frame.columns) == [
        "visit",
        "loop",
        "layer",
        "depth",
        "target",
        "accuracy",
        "mean_reciprocal_rank",
    ]
    row = frame[(frame.depth == 4) & (frame.target == "answer")].to_dict("records")
    assert [(r["visit"], r["loop"], r["layer"]) for r in row] == [("loops.1.blocks.1", 1, 1)]
    assert row[0]["mean_reciprocal_rank"] == found.mean_reciprocal_rank[3, 1]
    assert found.frame()["target"].tolist() == [0, 1] * LOOPS * LAYERS
    with pytest.raises(ValueError, match="there are 2 targets, got 1 names"):
        found.frame(["answer"])


@pytest.mark.parametrize(
    ("targets", "positions", "message"),
    [
        (TARGETS[:2], [1, 2], r"there are 3 examples, got the shape \[2, 2\]"),
        (TARGETS[:, :0], [], r"targets must hold at least one target token .* \[3, 0\]"),
        (TARGETS, [1], r"the targets have the shape \[3, 2\], got \[1\]"),
        (TARGETS, [1, 7], r"positions must be in 0\.\.6, got 1 to 7"),
        (TARGETS, [-1, 2], r"positions must be in 0\.\.6, got -1 to 2"),
        (TARGETS + 20, [1, 2], r"tokens must be in 0\.\.28"),
    ],
)
def test_what_does_not_fit_is_refused(
    targets: Tensor, positions: object, message: str, plain: RecurrentDepth
) -> None:
    with pytest.raises(ValueError, match=message):
        decodability(plain, padded(), targets, positions, LOOPS)


def test_iterations_default_to_what_is_recorded(plain: RecurrentDepth) -> None:
    assert len(decodability(plain, padded(), TARGETS, COLUMNS).accuracy) == LOOPS * LAYERS
    with pytest.raises(ValueError, match="records no number of iterations"):
        decodability(toy(n_loops=None), padded(), TARGETS, COLUMNS)


def test_trained_model_reads_the_bridge_at_its_relation_and_then_the_answer() -> None:
    model = load("ltg_trained")
    graph = PermutationGraph.read(GRAPH)
    facts = sample_facts(graph, 2, 150, np.random.default_rng(0), held_out=True)
    found = decodability(
        model, torch.from_numpy(facts.tokens), torch.from_numpy(facts.path[:, 1:] + 1), [1, 2], 8
    )
    bridge, answer = found.accuracy.T
    assert bridge.min() > 0.95
    assert answer[0] < 0.2
    assert answer[3:].min() > 0.95
