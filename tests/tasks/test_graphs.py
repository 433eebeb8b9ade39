"""Knowledge graphs: worked examples on three entities, how the training graphs are drawn, and their
files.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loopscope.checkpoints.locate import SHIPPED
from loopscope.tasks.base import ABSENT, Graph
from loopscope.tasks.graphs import PermutationGraph, TableGraph, from_table, read_graph
from loopscope.tasks.questions import read_questions

TRAINED = SHIPPED / "ltg_trained"
GRAPH = PermutationGraph(((1, 2, 0), (2, 1, 0)))
SPARSE = TableGraph(((1, -1, 2), (0, 0, -1), (-1, 2, 1)), ood=((0, 1), (2, 0)))
KINDS: list[PermutationGraph | TableGraph] = [
    PermutationGraph.random(11, 3, seed=5),
    TableGraph.random(11, 3, seed=5),
    TableGraph.two_hop(13, 7, out_degree=3, ood_share=0.2, seed=5),
]
NAMES = ["permutation", "random", "two_hop"]


# Walks


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("<e_0>", [0]),
        ("<e_0><r_0>", [0, 1]),
        ("<e_2><r_1>", [2, 0]),
        ("<e_0><r_0><r_1>", [0, 1, 1]),
        ("<e_0><r_1><r_0>", [0, 2, 0]),
        ("<e_1><r_0><r_0><r_0>", [1, 2, 0, 1]),
    ],
)
def test_a_walk_passes_these_entities(text: str, path: list[int]) -> None:
    assert GRAPH.walk(text) == [f"<e_{entity}>" for entity in path]


@pytest.mark.parametrize(
    ("text", "path"), [("<e_0><r_0><r_1>", [0, 1, 0]), ("<e_2><r_2><r_2><r_0>", [2, 1, 2, 2])]
)
def test_a_walk_on_a_graph_without_some_relations(text: str, path: list[int]) -> None:
    assert SPARSE.walk(text) == [f"<e_{entity}>" for entity in path]


@pytest.mark.parametrize(
    ("text", "entity", "relation"),
    [("<e_1><r_0>", 1, 0), ("<e_0><r_0><r_0>", 1, 0), ("<e_0><r_0><r_2><r_1><r_1>", 2, 1)],
)
def test_a_walk_that_lacks_a_relation_is_refused(text: str, entity: int, relation: int) -> None:
    with pytest.raises(
        ValueError, match=f"in this graph entity {entity} has no relation {relation}"
    ):
        SPARSE.walk(text)


@pytest.mark.parametrize("text", ["", "<r_1>", "<e_1><e_2>", "e_1", "<e_1> <r_1>"])
def test_walk_needs_an_entity_and_its_relations(text: str) -> None:
    with pytest.raises(ValueError, match="a question is an entity and its relations"):
        GRAPH.walk(text)


@pytest.mark.parametrize("text", ["<e_3>", "<e_0><r_2>", "<e_0><r_0><r_9>"])
def test_walk_refuses_what_the_graph_does_not_know(text: str) -> None:
    with pytest.raises(ValueError, match="3 entities and 2 relations, so it does not know"):
        GRAPH.walk(text)


@pytest.mark.parametrize("graph", KINDS, ids=NAMES)
def test_many_paths_at_once_are_the_walks_one_by_one(graph: Graph) -> None:
    heads = np.arange(7)
    relations = np.empty((7, 5), dtype=np.int64)
    path = heads
    for hop in range(5):
        relations[:, hop] = graph.relations_of[path, (heads + hop) % graph.out_degree]
        path = graph.table[relations[:, hop], path]
    walks = [
        graph.walk(f"<e_{head}>" + "".join(f"<r_{r}>" for r in row))
        for head, row in zip(heads, relations, strict=True)
    ]
    assert [[f"<e_{entity}>" for entity in row] for row in graph.paths(heads, relations)] == walks


@pytest.mark.parametrize(
    ("head", "relation", "sentence"),
    [(3, 0, "entities 0 to 2, got 3 to 3"), (0, -1, "relations 0 to 1, got -1 to -1")],
)
def test_paths_refuse_what_the_graph_does_not_have(head: int, relation: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GRAPH.paths(np.array([head]), np.array([[relation]]))


def test_facts_are_counted() -> None:
    assert [GRAPH.count(hops) for hops in (1, 2, 5)] == [6, 12, 96]
    assert [SPARSE.count(hops) for hops in (1, 2)] == [6, 12]
    assert PermutationGraph.random().count(40) == 200 * 10**40


# How they are drawn


def test_every_random_relation_is_a_permutation() -> None:
    graph = PermutationGraph.random(17, 5, seed=3)
    assert (graph.n_entities, graph.n_relations, graph.out_degree) == (17, 5, 5)
    assert all(sorted(row) == list(range(17)) for row in graph.permutations)
    assert len(set(graph.permutations)) == 5


def test_the_default_graph_is_the_one_of_the_papers_generator() -> None:
    rng = np.random.default_rng(42)
    assert PermutationGraph.random() == PermutationGraph(
        tuple(tuple(rng.permutation(200).tolist()) for _ in range(10))
    )


def test_random_tails_repeat_and_miss_some_entities() -> None:
    graph = TableGraph.random(101, 7)
    assert (graph.n_entities, graph.n_relations, graph.out_degree, graph.ood) == (101, 7, 7, ())
    assert all(50 < len(set(row)) < 80 for row in graph.tails)  # 101 * (1 - 1/e) = 64 on average


def test_the_two_hop_graph_has_the_papers_sizes() -> None:
    graph = TableGraph.two_hop()
    present = graph.table != ABSENT
    assert present.shape == (200, 2000)
    assert (present.sum(0) == 20).all()
    assert present.sum() == 40_000
    assert (
        130 < present.sum(1).min() <= present.sum(1).max() < 270
    )  # each relation has about 200 heads
    assert len(set(graph.ood)) == 2000
    assert graph.is_ood.sum() == 2000
    assert (present | ~graph.is_ood).all()


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.2, 8), (1.0, 39)])
def test_a_share_of_atomic_facts_is_ood(share: float, count: int) -> None:
    graph = TableGraph.two_hop(13, 7, out_degree=3, ood_share=share)
    assert len(graph.ood) == count
    assert list(graph.ood) == sorted(graph.ood)


def test_every_entity_may_have_every_relation() -> None:
    assert (TableGraph.two_hop(13, 7, out_degree=7).table != ABSENT).all()


@pytest.mark.parametrize("draw", [PermutationGraph.random, TableGraph.random, TableGraph.two_hop])
def test_a_seed_gives_the_same_graph_and_another_seed_another(draw: Any) -> None:
    first, again, other = (draw(23, 21, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


@pytest.mark.parametrize("draw", [PermutationGraph.random, TableGraph.random, TableGraph.two_hop])
@pytest.mark.parametrize("sizes", [{"n_entities": 0}, {"n_relations": -2}])
def test_a_graph_has_entities_and_relations(draw: Any, sizes: dict[str, int]) -> None:
    ((name, size),) = sizes.items()
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got {size}"):
        draw(**sizes)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"out_degree": 8},
            "an entity has each relation at most once, so out_degree is at most 7, got 8",
        ),
        ({"out_degree": 0}, "out_degree must be at least 1, got 0"),
        ({"out_degree": 3, "ood_share": 1.5}, "between 0 and 1, got 1.5"),
    ],
)
def test_a_two_hop_graph_that_cannot_be_is_refused(sizes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TableGraph.two_hop(13, 7, **sizes)


# What a graph may be


@pytest.mark.parametrize("rows", [((0, 0, 1),), ((1, 2, 0), (1, 2, 3)), ((1, 2, 0), (0, -1, 1))])
def test_a_relation_that_is_no_permutation_is_named(rows: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(
        ValueError,
        match=f"a permutation of the entities 0 to 2, but relation {len(rows) - 1} is not",
    ):
        PermutationGraph(rows)


@pytest.mark.parametrize("kind", [PermutationGraph, TableGraph])
@pytest.mark.parametrize(
    ("rows", "got"), [((), "no entities"), (((),), r"\[0\]"), (((0, 1), (0,)), r"\[1, 2\]")]
)
def test_relations_have_one_tail_per_entity(
    kind: Any, rows: tuple[tuple[int, ...], ...], got: str
) -> None:
    with pytest.raises(
        ValueError,
        match=f"one list per relation, each with one tail per entity, got lists of {got}",
    ):
        kind(rows)


@pytest.mark.parametrize(
    ("rows", "ood", "sentence"),
    [
        (((0, 3, 1),), (), "entities 0 to 2, or -1 for none, got 0 to 3"),
        (((0, -2, 1),), (), "got -2 to 1"),
        (((0, -1, 1),), (), "the same number of relations, at least one, got between 0 and 1"),
        (((-1, -1, -1),), (), "got between 0 and 0"),
        (
            ((1, -1, 2), (0, 0, -1), (-1, 2, 1)),
            ((1, 0),),
            "the head and the relation of an atomic fact",
        ),
        (((1, 0),), ((2, 0),), "the head and the relation of an atomic fact"),
        (((1, 0),), ((0, -1),), "the head and the relation of an atomic fact"),
    ],
)
def test_a_table_that_is_no_graph_is_refused(
    rows: tuple[tuple[int, ...], ...], ood: tuple[tuple[int, int], ...], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        TableGraph(rows, ood)


@pytest.mark.parametrize("graph", KINDS, ids=NAMES)
def test_the_arrays_of_a_graph_are_read_only(graph: Graph) -> None:
    for array in (graph.table, graph.relations_of):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1


def test_the_relations_of_an_entity_are_those_with_a_tail() -> None:
    assert SPARSE.relations_of.tolist() == [[0, 1], [1, 2], [0, 2]]
    assert SPARSE.is_ood.tolist() == [
        [False, False, True],
        [True, False, False],
        [False, False, False],
    ]


def test_a_table_gives_the_narrowest_kind() -> None:
    assert from_table(np.array(GRAPH.permutations)) == GRAPH
    assert from_table(np.array(SPARSE.tails)) == TableGraph(SPARSE.tails)


# Files


@pytest.mark.parametrize("graph", KINDS, ids=NAMES)
def test_a_graph_is_written_and_read(graph: PermutationGraph | TableGraph, tmp_path: Path) -> None:
    graph.write(tmp_path / "graph.json")
    assert read_graph(tmp_path / "graph.json") == graph
    assert type(graph).read(tmp_path / "graph.json") == graph
    assert [path.name for path in tmp_path.iterdir()] == ["graph.json"]
    assert json.loads((tmp_path / "graph.json").read_text()) == graph.as_dict()


def test_a_permutation_graph_is_written_as_the_shipped_one_is(tmp_path: Path) -> None:
    shipped = TRAINED / "graph.json"
    PermutationGraph.read(shipped).write(tmp_path / "graph.json")
    assert json.loads((tmp_path / "graph.json").read_text()) == json.loads(shipped.read_text())


def test_other_keys_of_the_file_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(
        json.dumps({"permutations": [[1, 2, 0], [2, 1, 0]], "seed": 3})
    )
    assert PermutationGraph.read(tmp_path / "graph.json") == GRAPH


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            "{}",
            (
                "must be JSON with 'permutations' or 'tails', a list of lists of entities, and it"
                " has none"
            ),
        ),
        ("[]", "and it has none"),
        ("7", "and it has none"),
        ("{", "must be JSON with .*is not valid JSON"),
        ('{"permutations": 7}', "must hold lists of lists of whole numbers"),
        ('{"permutations": [["a"]]}', "must hold lists of lists of whole numbers"),
        ('{"tails": [[0]], "ood": 3}', "must hold lists of lists of whole numbers"),
        ('{"tails": [[0]], "ood": [[0]]}', "in 'ood' pairs of a head and a relation"),
    ],
)
def test_a_file_that_holds_no_graph_is_refused(content: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "graph.json").write_text(content)
    with pytest.raises(ValueError, match=rf"graph\.json .*{sentence}|graph\.json {sentence}"):
        read_graph(tmp_path / "graph.json")


def test_the_other_kind_of_file_is_refused(tmp_path: Path) -> None:
    SPARSE.write(tmp_path / "graph.json")
    with pytest.raises(
        ValueError, match=r"graph\.json must be JSON with 'permutations', a list of lists"
    ):
        PermutationGraph.read(tmp_path / "graph.json")
    GRAPH.write(tmp_path / "graph.json")
    with pytest.raises(ValueError, match=r"graph\.json must be JSON with 'tails', a list of lists"):
        TableGraph.read(tmp_path / "graph.json")


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    GRAPH.write(tmp_path / "graph.json")

    def fail(content: Any) -> str:
        raise OSError("the disk is full")

    monkeypatch.setattr(json, "dumps", fail)
    with pytest.raises(OSError, match="the disk is full"):
        SPARSE.write(tmp_path / "graph.json")
    assert [path.name for path in tmp_path.iterdir()] == ["graph.json"]
    assert read_graph(tmp_path / "graph.json") == GRAPH


# The shipped graph


def test_the_shipped_graph_answers_every_shipped_question() -> None:
    graph, questions = (
        PermutationGraph.read(TRAINED / "graph.json"),
        read_questions(TRAINED / "test.json"),
    )
    walks = [graph.walk(question.text) for question in questions]
    assert len(questions) == 700
    assert [q.text for q, walk in zip(questions, walks, strict=True) if walk[-1] != q.answer] == []
    assert [len(walk) - 1 for walk in walks] == [question.hops for question in questions]


def test_every_shipped_relation_is_a_permutation() -> None:
    graph = PermutationGraph.read(TRAINED / "graph.json")
    assert (graph.n_entities, graph.n_relations) == (30, 10)
    assert Counter(len(set(row)) for row in graph.permutations) == {30: 10}
