"""The questions of a recipe: fresh random facts, or a fixed data set in shuffled epochs.

The questions of an update depend on the recipe and on the progress alone, so that a resumed run
sees the same ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import ClassVar

import numpy as np
from jaxtyping import Int64

from loopscope.tasks.base import Graph
from loopscope.tasks.facts import FactBatch, concatenate
from loopscope.tasks.graphs import PermutationGraph, TableGraph
from loopscope.tasks.multi_hop import make_multi_hop, sample_facts
from loopscope.tasks.questions import Question
from loopscope.tasks.text import to_questions
from loopscope.tasks.two_hop import TEST_GROUPS, make_two_hop
from loopscope.training.recipes import MultiHopTask, Recipe, Stage, TwoHopTask
from loopscope.training.state import Progress

_BEYOND = 6


class Questions(ABC):
    """The questions of a recipe.

    Attributes:
        recipe: The recipe.
        graph: The graph that answers the questions.
        n_shown: Test questions of each group that travel with a checkpoint, at most.
    """

    graph: Graph
    n_shown: ClassVar[int] = 50

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def batch(self, stage: Stage, progress: Progress, rng: np.random.Generator) -> list[FactBatch]:
        """The facts of an update, by hop count."""

    @abstractmethod
    def groups(self, hops: int) -> list[str]:
        """The test groups of a model trained up to this hop count."""

    @abstractmethod
    def held_out(self, group: str, count: int) -> FactBatch:
        """At most `count` test facts of a group, the same at every call."""

    def beyond(self, hops: int) -> list[str]:
        """The test groups that a model trained up to this hop count is examined on at the end."""
        return self.groups(hops)

    def as_text(self, group: str) -> list[Question]:
        """Questions of `held_out`, for test.json."""
        return to_questions(self.held_out(group, self.n_shown), self.graph, self.label(group))

    def label(self, group: str) -> str:
        """The name of a group in the released files."""
        return group


def questions_of(recipe: Recipe) -> Questions:
    """The questions that a recipe's task describes."""
    if isinstance(recipe.task, TwoHopTask):
        return TwoHop(recipe, recipe.task)
    return (
        FreshFacts(recipe, recipe.task)
        if recipe.task.train is None
        else FixedFacts(recipe, recipe.task)
    )


class _MultiHop(Questions):
    """The graph, and hop counts as test groups, which fresh and fixed facts share."""

    def __init__(self, recipe: Recipe, task: MultiHopTask) -> None:
        super().__init__(recipe)
        self.task = task
        kind = PermutationGraph if task.permutations else TableGraph
        self.graph: PermutationGraph | TableGraph = kind.random(
            task.n_entities, task.n_relations, task.graph_seed
        )

    def groups(self, hops: int) -> list[str]:
        return [str(k) for k in range(1, hops + 1)]

    def beyond(self, hops: int) -> list[str]:
        return self.groups(hops + _BEYOND)

    def label(self, group: str) -> str:
        return "atomic_facts" if group == "1" else f"{group}hop_test"


class FreshFacts(_MultiHop):
    """New random facts of one hop count at every update; a tenth of all facts is held out."""

    def batch(self, stage: Stage, progress: Progress, rng: np.random.Generator) -> list[FactBatch]:
        hops = int(rng.choice(stage.hops))
        return [sample_facts(self.graph, hops, self.recipe.batch_size, rng, held_out=False)]

    def held_out(self, group: str, count: int) -> FactBatch:
        hops = int(group)
        rng = np.random.default_rng((self.recipe.seed, 1 << 40, hops))
        return sample_facts(self.graph, hops, count, rng, held_out=hops > 1)


class _Epochs(Questions):
    """Training facts in shuffled epochs over all facts of the stage's hop counts.

    Attributes:
        train: The training facts of each hop count.
    """

    train: Mapping[int, FactBatch]
    _shuffled: tuple[tuple[int, ...], Int64[np.ndarray, " fact"]] | None = None

    def updates_per_epoch(self, hops: Sequence[int]) -> int:
        """Full batches in an epoch over these hop counts."""
        return max(1, sum(len(self.train[k]) for k in hops) // self.recipe.batch_size)

    def batch(self, stage: Stage, progress: Progress, rng: np.random.Generator) -> list[FactBatch]:
        epoch, index = divmod(progress.stage_update, self.updates_per_epoch(stage.hops))
        order = self._order(progress.stage, epoch, sum(len(self.train[k]) for k in stage.hops))
        chosen = order[index * self.recipe.batch_size :][: self.recipe.batch_size]
        starts = np.cumsum([0, *(len(self.train[k]) for k in stage.hops)])
        parts = [chosen[(chosen >= low) & (chosen < high)] - low for low, high in pairwise(starts)]
        return [self.train[k][rows] for k, rows in zip(stage.hops, parts, strict=True) if len(rows)]

    def _order(self, *key: int) -> Int64[np.ndarray, " fact"]:
        """The shuffle of a (stage, epoch, number of facts); the last one is kept."""
        if self._shuffled is None or self._shuffled[0] != key:
            self._shuffled = (
                key,
                np.random.default_rng((self.recipe.seed, *key[:2])).permutation(key[2]),
            )
        return self._shuffled[1]


class FixedFacts(_Epochs, _MultiHop):
    """The paper's multi-hop data set, up to a few hops beyond the recipe's deepest count."""

    def __init__(self, recipe: Recipe, task: MultiHopTask) -> None:
        super().__init__(recipe, task)
        self.data = make_multi_hop(
            self.graph,
            recipe.trained_hops + _BEYOND,
            task.train or 0,
            task.test,
            recipe.task.graph_seed,
        )
        self.train = {1: self.data.atomic, **self.data.train}

    def held_out(self, group: str, count: int) -> FactBatch:
        return (self.data.atomic if group == "1" else self.data.test[int(group)])[:count]


class TwoHop(_Epochs):
    """Atomic facts and compositions, shuffled together, with the data set's test groups."""

    n_shown = 200

    def __init__(self, recipe: Recipe, task: TwoHopTask) -> None:
        super().__init__(recipe)
        graph = TableGraph.two_hop(
            task.n_entities, task.n_relations, task.out_degree, task.ood_share, task.graph_seed
        )
        data = make_two_hop(graph, task.phi, task.iid_share, task.test, task.graph_seed)
        self.graph, self._tests = graph, data.test
        self.train = {1: concatenate([data.id_atomic, data.ood_atomic]), 2: data.train_inferred}

    def groups(self, hops: int) -> list[str]:
        return list(TEST_GROUPS)

    def held_out(self, group: str, count: int) -> FactBatch:
        return self._tests[group][:count]
