"""The kinds of knowledge graphs, and how the training graphs are drawn."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from loopscope.tasks.base import ABSENT, Graph, Rows
from loopscope.tasks.jsons import read_json


@dataclass(frozen=True)
class PermutationGraph(Graph):
    """A graph whose relations are permutations: `permutations[r][e]` is the tail of (e, r).

    Raises:
        ValueError: A relation that is not a permutation of all entities.
    """

    permutations: Rows

    def __post_init__(self) -> None:
        _check_rectangle("permutations", self.permutations)
        for relation, row in enumerate(self.permutations):
            if sorted(row) != list(range(len(row))):
                raise ValueError(
                    f"each relation must be a permutation of the entities 0 to {len(row) - 1}, but"
                    f" relation {relation} is not"
                )

    @property
    def rows(self) -> Rows:
        """The permutations."""
        return self.permutations

    def as_dict(self) -> dict[str, Any]:
        """The content of graph.json."""
        return {
            "permutations": [list(row) for row in self.permutations],
            "note": "permutations[r][e] = tail of (e, r)",
        }

    @classmethod
    def read(cls, path: str | Path) -> PermutationGraph:
        """From graph.json, `{"permutations": [[...], ...]}`.

        Raises:
            ValueError: Not such a file.
        """
        rows = _rows(_read(path, ("permutations",))["permutations"], path)
        with _named(path):
            return cls(rows)

    @classmethod
    def random(
        cls, n_entities: int = 200, n_relations: int = 10, seed: int = 42
    ) -> PermutationGraph:
        """Independent random permutations, drawn in the order of the paper's data script, whose
        sizes and seed are the defaults.

        Source:
            arXiv 2604.07822, section on recursion extrapolation, and its data script.
        """
        _check_sizes(n_entities=n_entities, n_relations=n_relations)
        rng = np.random.default_rng(seed)
        return cls(tuple(tuple(rng.permutation(n_entities).tolist()) for _ in range(n_relations)))


@dataclass(frozen=True)
class TableGraph(Graph):
    """A graph whose tails are arbitrary; an entity may lack a relation.

    Attributes:
        tails: `tails[r][e]` is the tail of (e, r), -1 where e lacks r.
        ood: (head, relation) of the atomic facts that no training fact of two hops uses, in
            increasing order.

    Raises:
        ValueError: Tails out of range, entities with unequal numbers of relations, or `ood` facts
            that do not exist.
    """

    tails: Rows
    ood: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        _check_rectangle("tails", self.tails)
        table = self.table
        if table.min() < ABSENT or table.max() >= self.n_entities:
            raise ValueError(
                f"tails must be entities 0 to {self.n_entities - 1}, or {ABSENT} for none, got"
                f" {table.min()} to {table.max()}"
            )
        degrees = (table != ABSENT).sum(0)
        if degrees.min() != degrees.max() or degrees.min() < 1:
            raise ValueError(
                "every entity must have the same number of relations, at least one, got between"
                f" {degrees.min()} and {degrees.max()}"
            )
        known = all(
            0 <= head < self.n_entities and 0 <= relation < self.n_relations
            for head, relation in self.ood
        )
        if not known or any(self.tails[relation][head] == ABSENT for head, relation in self.ood):
            raise ValueError(
                "each pair in ood must be the head and the relation of an atomic fact of the graph"
            )

    @property
    def rows(self) -> Rows:
        """The tails."""
        return self.tails

    @cached_property
    def is_ood(self) -> Bool[np.ndarray, "relation entity"]:
        """Which atomic facts are OOD, as a read-only array."""
        marks = np.zeros((self.n_relations, self.n_entities), dtype=bool)
        for head, relation in self.ood:
            marks[relation, head] = True
        marks.setflags(write=False)
        return marks

    def as_dict(self) -> dict[str, Any]:
        """The content of graph.json."""
        note = (
            "tails[r][e] = tail of (e, r), -1 where e has no r; ood = (e, r) of the atomic facts"
            " kept out of two-hop training facts"
        )
        return {
            "tails": [list(row) for row in self.tails],
            "ood": [list(pair) for pair in self.ood],
            "note": note,
        }

    @classmethod
    def read(cls, path: str | Path) -> TableGraph:
        """From graph.json, `{"tails": [[...], ...], "ood": [[head, relation], ...]}`, the second
        being optional.

        Raises:
            ValueError: Not such a file.
        """
        content = _read(path, ("tails",))
        ood = _rows(content.get("ood", []), path)
        if any(len(pair) != 2 for pair in ood):
            raise ValueError(f"{path} must list in 'ood' pairs of a head and a relation")
        tails = _rows(content["tails"], path)
        with _named(path):
            return cls(tails, tuple((pair[0], pair[1]) for pair in ood))

    @classmethod
    def random(cls, n_entities: int = 200, n_relations: int = 10, seed: int = 42) -> TableGraph:
        """Every entity has every relation, with a random tail, so that long walks meet and a short
        suffix nearly fixes the answer.

        Source:
            arXiv 2604.07822, appendix K (the shortcut of graphs whose relations are no
            permutations).
        """
        _check_sizes(n_entities=n_entities, n_relations=n_relations)
        tails = np.random.default_rng(seed).integers(n_entities, size=(n_relations, n_entities))
        return cls(_tuples(tails))

    @classmethod
    def two_hop(
        cls,
        n_entities: int = 2000,
        n_relations: int = 200,
        out_degree: int = 20,
        ood_share: float = 0.05,
        seed: int = 42,
    ) -> TableGraph:
        """Every entity has a few random relations with random tails, and a share of all atomic
        facts is OOD.

        Args:
            out_degree: Relations of each entity.
            ood_share: Share of atomic facts, between 0 and 1, rounded to a whole number of them.

        Raises:
            ValueError: More relations per entity than there are, or a share outside 0 to 1.

        Source:
            arXiv 2405.15071, section 3.1, and its notebook on composition.
        """
        _check_sizes(n_entities=n_entities, n_relations=n_relations, out_degree=out_degree)
        if out_degree > n_relations:
            raise ValueError(
                f"an entity has each relation at most once, so out_degree is at most {n_relations},"
                f" got {out_degree}"
            )
        if not 0 <= ood_share <= 1:
            raise ValueError(
                f"ood_share is a share of the atomic facts, between 0 and 1, got {ood_share}"
            )
        rng = np.random.default_rng(seed)
        relations = rng.random((n_entities, n_relations)).argsort(axis=1)[:, :out_degree]
        heads = np.repeat(np.arange(n_entities), out_degree)
        tails = np.full((n_relations, n_entities), ABSENT)
        tails[relations.ravel(), heads] = rng.integers(n_entities, size=heads.size)
        chosen = rng.choice(heads.size, round(ood_share * heads.size), replace=False)
        pairs = np.stack([heads[chosen], relations.ravel()[chosen]], axis=1)
        return cls(
            _tuples(tails), tuple((head, relation) for head, relation in sorted(pairs.tolist()))
        )


def from_table(table: Int64[np.ndarray, "relation entity"]) -> PermutationGraph | TableGraph:
    """The graph of a table of tails (-1 for none): a permutation graph where possible."""
    entities = np.arange(table.shape[1])
    kind = PermutationGraph if (np.sort(table, axis=1) == entities).all() else TableGraph
    return kind(_tuples(table))


def read_graph(path: str | Path) -> PermutationGraph | TableGraph:
    """The graph of a graph.json, which holds `permutations`, or `tails` and perhaps `ood`.

    Raises:
        ValueError: Neither.
    """
    kind = (
        PermutationGraph if "permutations" in _read(path, ("permutations", "tails")) else TableGraph
    )
    return kind.read(path)


def _read(path: str | Path, keys: Sequence[str]) -> dict[str, Any]:
    rule = f"{path} must be JSON with {' or '.join(map(repr, keys))}, a list of lists of entities"
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from None
    if not isinstance(content, dict) or not any(key in content for key in keys):
        raise ValueError(f"{rule}, and it has none")
    return content


def _rows(lists: Any, path: str | Path) -> Rows:
    try:
        return tuple(tuple(map(operator.index, row)) for row in lists)
    except TypeError as error:
        raise ValueError(f"{path} must hold lists of lists of whole numbers: {error}") from None


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """A context in which the errors about a graph name its file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _tuples(table: Int64[np.ndarray, "relation entity"]) -> Rows:
    return tuple(map(tuple, table.tolist()))


def _check_rectangle(name: str, rows: Rows) -> None:
    lengths = sorted({len(row) for row in rows})
    if len(lengths) != 1 or lengths[0] < 1:
        raise ValueError(
            f"{name} must be one list per relation, each with one tail per entity, got lists of"
            f" {lengths or 'no'} entities"
        )


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
