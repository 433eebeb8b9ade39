"""The two-hop task: a worked example, what goes into which group, and the paper's counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from loopscope.tasks.facts import FactBatch, is_among
from loopscope.tasks.graphs import TableGraph
from loopscope.tasks.two_hop import TEST_GROUPS, TwoHopData, compositions, make_two_hop, uses_ood

GRAPH = TableGraph.two_hop(31, 13, out_degree=9, ood_share=0.2, seed=3)
N_ID, N_OOD = 223, 56  # of 31 * 9 = 279 atomic facts


def make(**changes: Any) -> TwoHopData:
    return make_two_hop(GRAPH, **{"phi": 3.0, "iid_share": 0.05, "test": 47, "seed": 5, **changes})


def rows(facts: FactBatch) -> list[tuple[int, ...]]:
    return list(map(tuple, facts.rows.tolist()))


def all_rows(data: TwoHopData) -> list[list[tuple[int, ...]]]:
    return [
        rows(facts)
        for facts in (data.id_atomic, data.ood_atomic, data.train_inferred, *data.test.values())
    ]


# Compositions


def test_the_compositions_of_three_entities() -> None:
    graph = TableGraph(((1, -1, 2), (0, 0, -1), (-1, 2, 1)), ood=((0, 1), (1, 2)))
    facts = compositions(graph)
    texts = [
        (head, *(relation - 4 for relation in tail)) for (head, *tail) in facts.tokens.tolist()
    ]
    assert [(head - 1, r1, r2) for head, r1, r2 in texts] == [
        (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (1, 1, 0), (1, 1, 1),
        (1, 2, 0), (1, 2, 2), (2, 0, 0), (2, 0, 2), (2, 2, 1), (2, 2, 2),
    ]  # fmt: skip
    assert facts.path[:4].tolist() == [[0, 1, 0], [0, 1, 2], [0, 0, 1], [0, 0, 0]]
    assert uses_ood(graph, facts)[:4].tolist() == [
        [False, False],
        [False, True],
        [True, False],
        [True, True],
    ]


def test_there_are_as_many_compositions_as_the_graph_counts() -> None:
    facts = compositions(GRAPH)
    assert len(set(rows(facts))) == len(facts) == GRAPH.count(2) == 31 * 81
    assert (facts.path == GRAPH.paths(facts.path[:, 0], facts.tokens[:, 1:] - 32)).all()


# The split


def test_the_groups_use_the_atoms_that_they_should() -> None:
    data = make()
    wanted = {
        "id_atomic": [0],
        "ood_atomic": [1],
        "train_inferred": [0, 0],
        "test_inferred_iid": [0, 0],
        "test_inferred_ood": [1, 1],
    }
    assert tuple(data.test) == TEST_GROUPS
    for name, facts in data.test.items():
        assert len(facts) > 0
        assert (uses_ood(GRAPH, facts) == wanted[name]).all()
    assert not uses_ood(GRAPH, data.train_inferred).any()


def test_counts_follow_phi_and_the_share() -> None:
    data = make()
    assert (len(data.id_atomic), len(data.ood_atomic), len(data.train_inferred)) == (
        N_ID,
        N_OOD,
        round(3.0 * N_ID),
    )
    marks = uses_ood(GRAPH, compositions(GRAPH))
    everything = make(test=9999).test
    assert len(everything["test_inferred_ood"]) == marks.all(1).sum()
    assert 0.02 < len(everything["test_inferred_iid"]) / (~marks).all(1).sum() < 0.08
    assert {name: len(facts) for name, facts in everything.items()} | {
        "test_inferred_ood": 0,
        "test_inferred_iid": 0,
    } == {
        "id_atomic": N_ID,
        "ood_atomic": N_OOD,
        "train_inferred": round(3.0 * N_ID),
        "test_inferred_iid": 0,
        "test_inferred_ood": 0,
    }


def test_the_test_holds_a_sample_of_each_group() -> None:
    data, everything = make(), make(test=9999)
    for name, facts in everything.test.items():
        assert len(data.test[name]) == min(47, len(facts))
        assert set(rows(data.test[name])) <= set(rows(facts))
        assert len(set(rows(facts))) == len(facts)
    assert set(rows(data.test["train_inferred"])) <= set(rows(data.train_inferred))


def test_train_and_test_never_overlap_and_no_fact_comes_twice() -> None:
    data = make(test=9999)
    assert len(set(rows(data.train_inferred))) == len(data.train_inferred)
    assert not is_among(data.test["test_inferred_iid"], data.train_inferred).any()
    assert not is_among(data.test["test_inferred_ood"], data.train_inferred).any()
    assert not is_among(data.id_atomic, data.ood_atomic).any()


def test_the_whole_pool_can_be_trained_on() -> None:
    n_both_id = (~uses_ood(GRAPH, compositions(GRAPH))).all(1).sum()
    data = make(iid_share=0.0, phi=float(n_both_id / N_ID))
    assert len(data.train_inferred) == n_both_id
    assert len(data.test["test_inferred_iid"]) == 0


def test_a_seed_gives_the_same_split_and_another_seed_another() -> None:
    assert all_rows(make()) == all_rows(make())
    assert all_rows(make())[2] != all_rows(make(seed=6))[2]


def test_a_graph_without_ood_atoms_has_no_ood_questions() -> None:
    data = make_two_hop(TableGraph.two_hop(31, 13, out_degree=9, ood_share=0.0), phi=3.0)
    assert [
        len(data.ood_atomic),
        len(data.test["ood_atomic"]),
        len(data.test["test_inferred_ood"]),
    ] == [0, 0, 0]
    assert len(data.id_atomic) == 279


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (
            lambda: make(phi=9.5),
            (
                r"phi=9.5 asks for 2,11\d distinct training facts of 2 hops \(223 ID atoms \*"
                r" 9.5\), .* only 1,\d\d\d; .* at most \d"
            ),
        ),
        (
            lambda: make_two_hop(TableGraph.two_hop(31, 13, out_degree=5)),
            r"phi=7.2 asks for .*, but this graph has only \d+",
        ),
        (
            lambda: make(phi=-1.0),
            "must not be negative and iid_share is between 0 and 1, got -1.0, 47 and 0.05",
        ),
        (lambda: make(iid_share=1.5), "got 3.0, 47 and 1.5"),
        (lambda: make(test=-2), "got 3.0, -2 and 0.05"),
    ],
)
def test_a_split_that_cannot_be_is_refused(ask: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ask()


@pytest.mark.slow
def test_the_papers_counts() -> None:
    data = make_two_hop(TableGraph.two_hop())
    assert (len(data.id_atomic), len(data.ood_atomic), len(data.train_inferred)) == (
        38_000,
        2_000,
        273_600,
    )
    counts = {name: len(facts) for name, facts in data.test.items()}
    n_ood = counts.pop("test_inferred_ood")
    assert counts == {
        "id_atomic": 3000,
        "ood_atomic": 2000,
        "train_inferred": 3000,
        "test_inferred_iid": 3000,
    }
    assert 1800 < n_ood < 2200
    assert not is_among(data.test["test_inferred_iid"], data.train_inferred).any()
    assert np.unique(data.train_inferred.tokens, axis=0).shape == (273_600, 3)
