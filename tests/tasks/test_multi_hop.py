"""Facts of many hops: fresh draws, the hold-out rule, distinct sets and their split; worked
examples and identities.
"""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from loopscope.checkpoints.locate import SHIPPED
from loopscope.models.basis.tokens import Vocabulary
from loopscope.tasks.datasets import write_multi_hop
from loopscope.tasks.facts import (
    FactBatch,
    atomic_facts,
    concatenate,
    draw_facts,
    first_occurrences,
    is_among,
    is_held_out,
    look_up,
    vocabulary,
)
from loopscope.tasks.graphs import PermutationGraph, TableGraph, read_graph
from loopscope.tasks.multi_hop import MultiHopData, draw_distinct, make_multi_hop, sample_facts
from loopscope.tasks.questions import read_questions
from loopscope.tasks.text import to_facts, to_questions

GRAPH = PermutationGraph.random(11, 3, seed=5)
KINDS: list[PermutationGraph | TableGraph] = [
    GRAPH,
    TableGraph.random(11, 3, seed=5),
    TableGraph.two_hop(13, 7, out_degree=3, ood_share=0.2, seed=5),
]
every_kind = pytest.mark.parametrize("graph", KINDS, ids=["permutation", "random", "two_hop"])


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def relations(facts: FactBatch, graph: PermutationGraph | TableGraph) -> np.ndarray:
    return facts.tokens[:, 1:] - 1 - graph.n_entities


def held_out(facts: FactBatch, graph: PermutationGraph | TableGraph) -> np.ndarray:
    return is_held_out(facts.path[:, 0], relations(facts, graph))


def rows(facts: FactBatch) -> list[tuple[int, ...]]:
    return list(map(tuple, facts.rows.tolist()))


# One batch of facts


def test_a_fact_in_ids_and_entities() -> None:
    graph = PermutationGraph(((1, 2, 0), (2, 1, 0)))
    facts = look_up(
        graph, np.array([0, 2]), np.array([[0, 1, 0], [1, 1, 1]])
    )  # <e_0><r_0><r_1><r_0> and <e_2><r_1><r_1><r_1>
    assert facts.tokens.tolist() == [[1, 4, 5, 4], [3, 5, 5, 5]]
    assert facts.path.tolist() == [[0, 1, 1, 2], [2, 0, 2, 0]]
    assert facts.answers.tolist() == [3, 1]
    assert facts.rows.tolist() == [[1, 4, 5, 4, 3], [3, 5, 5, 5, 1]]
    assert (facts.hops, len(facts), len(facts[1:]), len(facts[np.array([1, 0, 1])])) == (3, 2, 1, 3)


def test_the_vocabulary_is_the_released_one() -> None:
    assert vocabulary(2, 1) == [
        "<e_0>",
        "<e_1>",
        "<r_0>",
        "<mask>",
        "<sep>",
        "<a>",
        "</a>",
        "<q>",
        "</q>",
    ]
    assert [len(vocabulary(200, 10)), len(vocabulary(2000, 200))] == [216, 2206]


@every_kind
def test_ids_are_those_of_a_models_vocabulary(graph: PermutationGraph | TableGraph) -> None:
    facts = draw_facts(graph, 4, 19, rng())
    words = Vocabulary(vocabulary(graph.n_entities, graph.n_relations))
    for question, tokens, answer in zip(
        to_questions(facts, graph), facts.tokens.tolist(), facts.answers.tolist(), strict=True
    ):
        assert words.ids(question.text) == tokens
        assert words.ids(question.answer) == [answer]


@every_kind
def test_atomic_facts_are_all_and_each_once(graph: PermutationGraph | TableGraph) -> None:
    facts = atomic_facts(graph)
    assert len(facts) == graph.count(1)
    assert {(int(h), int(r)) for r, h in np.argwhere(graph.table >= 0)} == {
        (h, r - 1 - graph.n_entities) for h, r in facts.tokens - [1, 0]
    }


def test_repetitions_and_members_are_found() -> None:
    facts = draw_facts(GRAPH, 40, 17, rng())
    twice = concatenate([facts, facts[3:5]])
    assert first_occurrences(twice).tolist() == [True] * 17 + [False] * 2
    assert np.flatnonzero(is_among(facts, facts[np.array([4, 9, 4])])).tolist() == [4, 9]
    assert not is_among(facts, facts[:0]).any()
    assert first_occurrences(facts[:0]).tolist() == []


# Fresh draws


@every_kind
@pytest.mark.parametrize(
    ("hops", "kind"),
    [(1, None), (1, False), *((hops, kind) for hops in (2, 7, 40) for kind in (None, False, True))],
)
def test_fresh_facts_have_the_shapes_and_the_answers_of_their_walks(
    graph: PermutationGraph | TableGraph, hops: int, kind: bool | None
) -> None:
    facts = sample_facts(graph, hops, 59, rng(), kind)
    assert (facts.tokens.shape, facts.answers.shape, facts.path.shape) == (
        (59, hops + 1),
        (59,),
        (59, hops + 1),
    )
    assert {facts.tokens.dtype, facts.answers.dtype, facts.path.dtype} == {np.dtype(np.int64)}
    assert (facts.path == graph.paths(facts.path[:, 0], relations(facts, graph))).all()
    assert (facts.answers == 1 + facts.path[:, -1]).all()
    assert (facts.tokens[:, 0] == 1 + facts.path[:, 0]).all()


@every_kind
@pytest.mark.parametrize("kind", [False, True])
def test_fresh_facts_are_held_out_or_not_as_asked(
    graph: PermutationGraph | TableGraph, kind: bool
) -> None:
    for hops in (2, 3, 13):
        assert (held_out(sample_facts(graph, hops, 211, rng(hops), kind), graph) == kind).all()


@pytest.mark.parametrize("kind", [None, False, True])
def test_a_generator_in_the_same_state_draws_the_same_facts(kind: bool | None) -> None:
    first, again, other = (sample_facts(GRAPH, 5, 31, rng(seed), kind) for seed in (3, 3, 4))
    assert rows(first) == rows(again)
    assert rows(first) != rows(other)


@every_kind
@pytest.mark.parametrize("kind", [None, False, True])
def test_every_fact_that_may_be_drawn_is_equally_likely(
    graph: PermutationGraph | TableGraph, kind: bool | None
) -> None:
    possible = draw_distinct(graph, 2, graph.count(2), rng())
    allowed = possible if kind is None else possible[held_out(possible, graph) == kind]
    counts = Counter(rows(sample_facts(graph, 2, 400 * len(allowed), rng(1), kind)))
    assert set(counts) == set(rows(allowed))
    assert all(abs(count - 400) < 5 * 20 for count in counts.values())  # five standard deviations


@pytest.mark.parametrize("kind", [None, False])
def test_one_hop_facts_are_all_drawn(kind: bool | None) -> None:
    assert set(rows(sample_facts(GRAPH, 1, 999, rng(), kind))) == set(rows(atomic_facts(GRAPH)))


@pytest.mark.parametrize("kind", [None, False, True])
def test_no_facts_can_be_asked_for(kind: bool | None) -> None:
    assert sample_facts(GRAPH, 3, 0, rng(), kind).tokens.shape == (0, 4)


@pytest.mark.parametrize(
    ("graph", "hops", "count", "kind", "sentence"),
    [
        (GRAPH, 1, 5, True, "facts of 1 hop are never held out, so hops must be at least 2"),
        (
            GRAPH,
            0,
            5,
            None,
            "at least 1 hop and their number is not negative, got hops=0 and count=5",
        ),
        (GRAPH, 2, -5, None, "got hops=2 and count=-5"),
        (
            PermutationGraph(((0,),)),
            2,
            5,
            False,
            r"5 not held-out facts of 2 hops were asked for, but \d+ draws .* gave 0",
        ),
        (
            TableGraph(((-1, 0), (-1, -1), (1, -1))),
            3,
            7,
            True,
            r"7 held-out facts of 3 hops .* 2 entities and 3 relations gave 0",
        ),
    ],
)
def test_facts_that_cannot_be_drawn_are_refused(
    graph: PermutationGraph, hops: int, count: int, kind: bool, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        sample_facts(graph, hops, count, rng(), kind)


# The hold-out rule


@pytest.mark.parametrize(
    ("head", "path", "out"),
    [
        (3, [1, 2], True),  # 23757 + 1 + 62 = 23820
        (3, [2, 1], True),  # 23757 + 2 + 31 = 23790
        (3, [1, 1], False),  # 23757 + 1 + 31 = 23789
        (0, [0, 0], True),
        (0, [0], False),  # 1 hop
        (10, [4, 5, 1], True),  # 79190 + 4 + 155 + 961 = 80310
    ],
)
def test_the_hold_out_rule_by_hand(head: int, path: list[int], out: bool) -> None:
    assert is_held_out(np.array([head]), np.array([path])).tolist() == [out]


def test_the_hold_out_rule_does_not_overflow() -> None:
    draw = rng()
    heads, many = draw.integers(200, size=301), draw.integers(10, size=(301, 40))
    exact = [
        (7919 * int(h) + sum(31**j * int(r) for j, r in enumerate(row))) % 10 == 0
        for h, row in zip(heads, many, strict=True)
    ]
    assert is_held_out(heads, many).tolist() == exact
    assert 0 < sum(exact) < 60


def test_the_shipped_questions_are_held_out() -> None:
    folder = SHIPPED / "ltg_trained"
    graph = read_graph(folder / "graph.json")
    facts = to_facts(read_questions(folder / "test.json"), graph)
    assert {hops: len(batch) for hops, batch in facts.items()} == dict.fromkeys(range(1, 15), 50)
    assert [hops for hops, batch in facts.items() if not held_out(batch, graph).all()] == [1]
    assert not held_out(facts[1], graph).any()


# Distinct facts, and the set of them


def make(
    graph: PermutationGraph | TableGraph = GRAPH,
    max_hops: int = 5,
    train: int = 47,
    test: int = 13,
    seed: int = 3,
) -> MultiHopData:
    return make_multi_hop(graph, max_hops, train, test, seed)


def all_rows(data: MultiHopData) -> list[tuple[int, ...]]:
    return [
        row
        for batch in (data.atomic, *data.train.values(), *data.test.values())
        for row in rows(batch)
    ]


@every_kind
def test_the_set_has_as_many_facts_as_asked(graph: PermutationGraph | TableGraph) -> None:
    data = make(graph)
    assert {hops: len(facts) for hops, facts in data.train.items()} == dict.fromkeys(
        range(2, 6), 47
    )
    assert {hops: len(facts) for hops, facts in data.test.items()} == dict.fromkeys(range(2, 6), 13)
    assert all(
        facts.hops == hops for split in (data.train, data.test) for hops, facts in split.items()
    )
    assert sorted(rows(data.atomic)) == sorted(rows(atomic_facts(graph)))


@every_kind
def test_train_and_test_never_overlap_and_no_fact_comes_twice(
    graph: PermutationGraph | TableGraph,
) -> None:
    data = make(graph, train=61, test=29)
    assert len(set(all_rows(data))) == len(all_rows(data)) == graph.count(1) + 4 * 90
    for hops in data.train:
        assert not is_among(data.test[hops], data.train[hops]).any()


@every_kind
def test_every_answer_is_the_end_of_the_walk(graph: PermutationGraph | TableGraph) -> None:
    data = make(graph)
    for facts in (data.atomic, *data.train.values(), *data.test.values()):
        for question, path in zip(to_questions(facts, graph), facts.path.tolist(), strict=True):
            assert graph.walk(question.text) == [f"<e_{entity}>" for entity in path]
            assert question.answer == f"<e_{path[-1]}>"


def test_a_seed_gives_the_same_set_and_another_seed_another() -> None:
    assert all_rows(make()) == all_rows(make())
    assert set(all_rows(make())) != set(all_rows(make(seed=4)))


def test_the_facts_of_a_hop_count_do_not_depend_on_the_deepest() -> None:
    assert all_rows(make(max_hops=3))[33:] == [
        row
        for split in ("train", "test")
        for k in (2, 3)
        for row in rows(getattr(make(), split)[k])
    ]


@every_kind
def test_all_facts_there_are_can_be_asked_for(graph: PermutationGraph | TableGraph) -> None:
    facts = draw_distinct(graph, 3, graph.count(3), rng())
    assert len(set(rows(facts))) == len(facts) == graph.n_entities * 27


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (
            lambda: draw_distinct(GRAPH, 2, 100, rng()),
            r"100 distinct facts of 2 hops .* has only 99: 11 entities \* 3 relations each \^ 2",
        ),
        (
            lambda: make(train=90, test=10),
            "100 distinct facts of 2 hops were asked for, but this graph has only 99",
        ),
        (
            lambda: make_multi_hop(PermutationGraph.random(30, 10)),
            "15,750 distinct facts of 2 hops were asked for, .* has only 3,000",
        ),
        (
            lambda: make(max_hops=1),
            "max_hops must be at least 2, and train and test not negative, got 1, 47 and 13",
        ),
        (lambda: make(test=-1), "got 5, 47 and -1"),
    ],
)
def test_more_facts_than_there_are_are_refused(ask: Callable[[], object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ask()


@pytest.mark.slow
def test_the_paper_size_set_is_made_and_written_in_under_half_a_minute(tmp_path: Path) -> None:
    start = time.perf_counter()
    data = make_multi_hop(PermutationGraph.random())
    counts = write_multi_hop(data, tmp_path / "made")
    assert time.perf_counter() - start < 30
    shutil.rmtree(tmp_path / "made")
    assert counts == {
        "train.json": 587_000,
        "test.json": 109_250,
        "test_small.json": 1_950,
        "valid.json": 109_250,
    }
    assert {hops: len(facts) for hops, facts in data.train.items()} == dict.fromkeys(
        range(2, 41), 15_000
    )
    assert {hops: len(facts) for hops, facts in data.test.items()} == dict.fromkeys(
        range(2, 41), 750
    )
    assert len(data.atomic) == 2000
    assert not any(is_among(data.test[hops], data.train[hops]).any() for hops in data.train)
    assert all(
        first_occurrences(facts).all()
        for split in (data.train, data.test)
        for facts in split.values()
    )
