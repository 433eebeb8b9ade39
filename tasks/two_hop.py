"""The two-hop task: atomic facts and their compositions, with a share of atoms that no training
composition uses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from loopscope.tasks.facts import FactBatch, atomic_facts, first_relation, look_up
from loopscope.tasks.graphs import TableGraph

TEST_GROUPS = (
    "id_atomic",
    "ood_atomic",
    "train_inferred",
    "test_inferred_iid",
    "test_inferred_ood",
)


@dataclass(frozen=True, eq=False)
class TwoHopData:
    """Atomic facts and two-hop ("inferred") facts; no inferred fact is in both train and a test of
    its kind.

    Attributes:
        graph: The graph that answers all facts, and says which atoms are OOD.
        id_atomic, ood_atomic: All facts of 1 hop; they are all trained on.
        train_inferred: Facts of 2 hops to train on, both atoms ID, in random order.
        test: Facts to test on, for each of TEST_GROUPS: samples of the three above, and facts that
            are not trained on, with both atoms ID (test_inferred_iid) or both OOD
            (test_inferred_ood).
    """

    graph: TableGraph
    id_atomic: FactBatch
    ood_atomic: FactBatch
    train_inferred: FactBatch
    test: dict[str, FactBatch]


def make_two_hop(
    graph: TableGraph, phi: float = 7.2, iid_share: float = 0.005, test: int = 3000, seed: int = 42
) -> TwoHopData:
    """Split all two-hop facts of a graph; the defaults are the paper's.

    A fact with two ID atoms goes to test_inferred_iid with a small probability, and else to the
    training pool, of which a random part is trained on. A fact with two OOD atoms goes to
    test_inferred_ood. A fact with one OOD atom is dropped.

    Args:
        phi: Training facts of 2 hops for each ID atom.
        iid_share: The small probability.
        test: At most this many facts of each test group.

    Raises:
        ValueError: Numbers out of range, or more training facts than the pool has.

    Source:
        arXiv 2405.15071, section 3.1, and its notebook on composition; phi and sizes as arXiv
        2604.07822 uses them.
    """
    if phi < 0 or not 0 <= iid_share <= 1 or test < 0:
        raise ValueError(
            f"phi and test must not be negative and iid_share is between 0 and 1, got {phi}, {test}"
            f" and {iid_share}"
        )
    rng = np.random.default_rng((seed, 2))
    atoms, inferred = atomic_facts(graph), compositions(graph)
    atom_is_ood, first, second = uses_ood(graph, atoms)[:, 0], *uses_ood(graph, inferred).T
    both_id = ~first & ~second
    iid = both_id & (rng.random(len(inferred)) < iid_share)
    pool = inferred[both_id & ~iid]
    n_id = int((~atom_is_ood).sum())
    train = _sample(pool, _training_count(phi, n_id, len(pool)), rng)
    groups = (
        atoms[~atom_is_ood],
        atoms[atom_is_ood],
        train,
        inferred[iid],
        inferred[first & second],
    )
    tests = {
        name: _sample(facts, min(test, len(facts)), rng)
        for name, facts in zip(TEST_GROUPS, groups, strict=True)
    }
    return TwoHopData(graph, groups[0], groups[1], train, tests)


def compositions(graph: TableGraph) -> FactBatch:
    """Every fact of two hops, by head, first relation and second relation."""
    atoms = atomic_facts(graph)
    second = graph.relations_of[atoms.path[:, 1]]
    heads, first = (
        np.repeat(column, graph.out_degree) for column in (atoms.path[:, 0], atoms.tokens[:, 1])
    )
    return look_up(
        graph, heads, np.stack([first - first_relation(graph.n_entities), second.ravel()], axis=1)
    )


def uses_ood(graph: TableGraph, facts: FactBatch) -> Bool[np.ndarray, "fact hop"]:
    """For each hop of each fact, whether its atom is OOD."""
    marks: Bool[np.ndarray, "fact hop"] = graph.is_ood[
        facts.tokens[:, 1:] - first_relation(graph.n_entities), facts.path[:, :-1]
    ]
    return marks


def _training_count(phi: float, n_id: int, pool: int) -> int:
    count = round(phi * n_id)
    if count > pool:
        raise ValueError(
            f"phi={phi:g} asks for {count:,} distinct training facts of 2 hops ({n_id:,} ID atoms *"
            f" {phi:g}), but this graph has only {pool:,}; phi can be at most"
            f" {pool / max(n_id, 1):.2f}"
        )
    return count


def _sample(facts: FactBatch, count: int, rng: np.random.Generator) -> FactBatch:
    return facts[rng.choice(len(facts), count, replace=False)]
