"""The calls that every knowledge graph has: walks, counts of facts, writing.

Axes: relation, entity, fact, hop. A graph's `table[relation, entity]` is the tail of that atomic
fact, -1 where there is none.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from loopscope.tasks.files import whole_file

ABSENT = -1
Rows = tuple[tuple[int, ...], ...]


class Graph(ABC):
    """A knowledge graph. Every entity has the same number of relations, so that a random walk gives
    every fact of k hops with equal probability.
    """

    @property
    @abstractmethod
    def rows(self) -> Rows:
        """`rows[relation][entity]` is the tail, -1 where the entity lacks the relation."""

    @abstractmethod
    def as_dict(self) -> dict[str, Any]:
        """The content of graph.json."""

    @property
    def n_relations(self) -> int:
        """Relations of the vocabulary."""
        return len(self.rows)

    @property
    def n_entities(self) -> int:
        """Entities of the vocabulary."""
        return len(self.rows[0])

    @property
    def out_degree(self) -> int:
        """Relations that each entity has."""
        return int(self.relations_of.shape[1])

    @cached_property
    def table(self) -> Int64[np.ndarray, "relation entity"]:
        """The rows as a read-only array."""
        table = np.array(self.rows, dtype=np.int64)
        table.setflags(write=False)
        return table

    @cached_property
    def relations_of(self) -> Int64[np.ndarray, "entity edge"]:
        """The relations that each entity has, in increasing order, as a read-only array."""
        relations = np.nonzero(self.table.T != ABSENT)[1].reshape(self.n_entities, -1)
        relations.setflags(write=False)
        return relations

    def count(self, hops: int) -> int:
        """How many distinct facts of this many hops there are."""
        return int(self.n_entities * self.out_degree**hops)

    def paths(
        self, heads: Int64[np.ndarray, " fact"], relations: Int64[np.ndarray, "fact hop"]
    ) -> Int64[np.ndarray, "fact entity"]:
        """The entities that facts pass: the head, every intermediate one, and the answer.

        Raises:
            ValueError: An entity or relation that the graph does not have.
        """
        for name, ids, size in (
            ("entities", heads, self.n_entities),
            ("relations", relations, self.n_relations),
        ):
            if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < size:
                raise ValueError(
                    f"this graph has {name} 0 to {size - 1}, got {int(ids.min())} to"
                    f" {int(ids.max())}"
                )
        path = np.empty((len(heads), relations.shape[1] + 1), dtype=np.int64)
        path[:, 0] = heads
        for hop, relation in enumerate(relations.T):
            path[:, hop + 1] = self.table[relation, path[:, hop]]
        if (path == ABSENT).any():
            fact, hop = np.argwhere(path == ABSENT)[0]
            raise ValueError(
                f"in this graph entity {path[fact, hop - 1]} has no relation"
                f" {relations[fact, hop - 1]}"
            )
        return path

    def walk(self, text: str) -> list[str]:
        """The entities that a question passes: the head, every intermediate one, and the answer.

        Args:
            text: An entity and its relations, such as "<e_12><r_3><r_7>".

        Raises:
            ValueError: Not of that form, or not in this graph.
        """
        if not re.fullmatch(r"<e_\d+>(<r_\d+>)*", text):
            raise ValueError(
                f"a question is an entity and its relations, as in '<e_12><r_3><r_7>', got {text!r}"
            )
        head, *relations = map(int, re.findall(r"\d+", text))
        if head >= self.n_entities or any(relation >= self.n_relations for relation in relations):
            raise ValueError(
                f"this graph has {self.n_entities} entities and {self.n_relations} relations, so it"
                f" does not know {text!r}"
            )
        path = self.paths(np.array([head]), np.array([relations], dtype=np.int64))
        return [f"<e_{entity}>" for entity in path[0]]

    def write(self, path: str | Path) -> None:
        """Write graph.json, whole or not at all."""
        with whole_file(path) as temporary:
            temporary.write_text(json.dumps(self.as_dict()))
