"""Facts as arrays: token ids, answers and the entities in between; the vocabulary; which facts are
held out.

Ids follow the released vocabularies: 0 is <pad>, then the entities, then the relations, then the
special tokens. Axes: fact, pos (the head and then one relation per hop), hop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from loopscope.tasks.base import Graph

PAD = "<pad>"
SPECIAL = ("<mask>", "<sep>", "<a>", "</a>", "<q>", "</q>")
FIRST_ENTITY = 1  # the id of <e_0>; 0 is <pad>
HELD_OUT_ONE_IN = 10


@dataclass(frozen=True, eq=False)
class FactBatch:
    """Facts of one hop count.

    Attributes:
        tokens: Int64[np.ndarray, "fact pos"], ids of the head entity and its relations: the model's
            input.
        answers: Int64[np.ndarray, " fact"], ids of the entities to predict.
        path: Int64[np.ndarray, "fact pos"], entities (not ids) along the walk: head, every
            intermediate one, answer.
    """

    tokens: Int64[np.ndarray, "fact pos"]
    answers: Int64[np.ndarray, " fact"]
    path: Int64[np.ndarray, "fact pos"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(
        self, facts: slice | Int64[np.ndarray, " some"] | Bool[np.ndarray, " fact"]
    ) -> FactBatch:
        return FactBatch(self.tokens[facts], self.answers[facts], self.path[facts])

    @property
    def hops(self) -> int:
        """Relations of each fact."""
        return int(self.tokens.shape[1]) - 1

    @property
    def rows(self) -> Int64[np.ndarray, "fact word"]:
        """Ids of head, relations and answer, hops + 2 of them."""
        return np.concatenate([self.tokens, self.answers[:, None]], axis=1)


def concatenate(batches: Sequence[FactBatch]) -> FactBatch:
    """All facts of several batches of one hop count, in order."""
    return FactBatch(
        *(
            np.concatenate([getattr(b, name) for b in batches])
            for name in ("tokens", "answers", "path")
        )
    )


def first_relation(n_entities: int) -> int:
    """The id of <r_0>."""
    return FIRST_ENTITY + n_entities


def vocabulary(n_entities: int, n_relations: int) -> list[str]:
    """The content of vocab.json: entities, relations, special tokens. The file leaves out <pad>,
    which has the id 0.
    """
    return [
        *(f"<e_{i}>" for i in range(n_entities)),
        *(f"<r_{j}>" for j in range(n_relations)),
        *SPECIAL,
    ]


def words(n_entities: int, n_relations: int) -> list[str]:
    """The words in the order of their ids: <pad> and then the vocabulary."""
    return [PAD, *vocabulary(n_entities, n_relations)]


def look_up(
    graph: Graph, heads: Int64[np.ndarray, " fact"], relations: Int64[np.ndarray, "fact hop"]
) -> FactBatch:
    """The facts with these heads and relations (counted from 0), completed by the graph.

    Raises:
        ValueError: An entity lacks a relation, or there is no such entity or relation.
    """
    return _complete(graph, graph.paths(heads, relations), relations)


def no_facts(graph: Graph, hops: int) -> FactBatch:
    """A batch of this hop count with nothing in it."""
    return look_up(graph, np.empty(0, dtype=np.int64), np.empty((0, hops), dtype=np.int64))


def atomic_facts(graph: Graph) -> FactBatch:
    """Every fact of one hop, by head and then by relation."""
    heads = np.repeat(np.arange(graph.n_entities), graph.out_degree)
    return look_up(graph, heads, graph.relations_of.reshape(-1, 1))


def draw_facts(graph: Graph, hops: int, count: int, rng: np.random.Generator) -> FactBatch:
    """Independent random walks, each from a random atomic fact; the same fact may come twice.

    Raises:
        ValueError: Fewer than 1 hop, or a negative count.
    """
    if hops < 1 or count < 0:
        raise ValueError(
            f"facts have at least 1 hop and their number is not negative, got hops={hops} and"
            f" count={count}"
        )
    path = np.empty((count, hops + 1), dtype=np.int64)
    relations = rng.integers(graph.out_degree, size=(count, hops))
    path[:, 0] = rng.integers(graph.n_entities, size=count)
    for hop in range(hops):
        relations[:, hop] = graph.relations_of[path[:, hop], relations[:, hop]]
        path[:, hop + 1] = graph.table[relations[:, hop], path[:, hop]]
    return _complete(graph, path, relations)


def _complete(
    graph: Graph, path: Int64[np.ndarray, "fact pos"], relations: Int64[np.ndarray, "fact hop"]
) -> FactBatch:
    tokens = np.concatenate(
        [FIRST_ENTITY + path[:, :1], first_relation(graph.n_entities) + relations], axis=1
    )
    return FactBatch(tokens, FIRST_ENTITY + path[:, -1], path)


def is_held_out(
    heads: Int64[np.ndarray, " fact"], relations: Int64[np.ndarray, "fact hop"]
) -> Bool[np.ndarray, " fact"]:
    """Which facts a training on fresh random facts never sees.

    A fact of two or more hops is held out when (7919 * head + sum over j of 31^j * relation_j) is a
    multiple of 10, with entities, relations and j counted from 0; a fact of one hop never is. The
    powers are taken modulo 10, so that no hop count overflows.
    """
    if relations.shape[1] < 2:
        return np.zeros(len(heads), dtype=bool)
    powers = np.array([pow(31, j, HELD_OUT_ONE_IN) for j in range(relations.shape[1])])
    marks: Bool[np.ndarray, " fact"] = (7919 * heads + relations @ powers) % HELD_OUT_ONE_IN == 0
    return marks


def first_occurrences(facts: FactBatch) -> Bool[np.ndarray, " fact"]:
    """Which facts have not come before in the batch."""
    marks = np.zeros(len(facts), dtype=bool)
    marks[np.unique(_keys(facts), return_index=True)[1]] = True
    return marks


def is_among(facts: FactBatch, others: FactBatch) -> Bool[np.ndarray, " fact"]:
    """Which facts are among the others, which have the same hop count."""
    return np.isin(_keys(facts), _keys(others))


def _keys(facts: FactBatch) -> np.ndarray:
    """The question of each fact as one opaque value; 40 relations do not fit into an integer."""
    words = np.ascontiguousarray(facts.tokens, dtype=np.int32)
    return words.view(np.dtype((np.void, words.itemsize * words.shape[1]))).ravel()
