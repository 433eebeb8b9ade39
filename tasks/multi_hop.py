"""The multi-hop task: facts of 2 to 40 hops, drawn fresh for training or as a fixed set that is
split into train and test.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tqdm.auto import tqdm

from loopscope.tasks.facts import (
    FactBatch,
    atomic_facts,
    concatenate,
    draw_facts,
    first_occurrences,
    first_relation,
    is_held_out,
)
from loopscope.tasks.graphs import PermutationGraph, TableGraph

_ROUNDS = 100


@dataclass(frozen=True, eq=False)
class MultiHopData:
    """A fixed set of facts; no fact is in both train and test.

    Attributes:
        graph: The graph that answers all facts.
        atomic: All facts of 1 hop, in random order; they are all trained on.
        train, test: By hop count, from 2; distinct facts in random order.
    """

    graph: PermutationGraph | TableGraph
    atomic: FactBatch
    train: dict[int, FactBatch]
    test: dict[int, FactBatch]


def sample_facts(
    graph: PermutationGraph | TableGraph,
    hops: int,
    count: int,
    rng: np.random.Generator,
    held_out: bool | None = None,
) -> FactBatch:
    """Fresh random facts of one hop count, for training on data without end; the same fact may come
    twice.

    Args:
        hops: Relations of each fact, at least 1.
        count: Number of facts.
        held_out: True draws only facts that `is_held_out` holds out, False only the others, None
            any.

    Raises:
        ValueError: Held-out facts of 1 hop (there are none), or a graph on which no draw is as
            asked for.
    """
    if held_out is None or (hops == 1 and not held_out):
        return draw_facts(graph, hops, count, rng)
    if hops == 1:
        raise ValueError(
            "facts of 1 hop are never held out, so hops must be at least 2 with held_out=True, got"
            " hops=1"
        )
    kept: list[FactBatch] = []
    missing, drawn = count, 0
    share = 0.1 if held_out else 0.9
    for _ in range(_ROUNDS):
        batch = draw_facts(graph, hops, int(1.2 * missing / share) + 16, rng)
        drawn += len(batch)
        wanted = (
            is_held_out(batch.path[:, 0], batch.tokens[:, 1:] - first_relation(graph.n_entities))
            == held_out
        )
        kept.append(batch[wanted][:missing])
        missing -= len(kept[-1])
        if missing == 0:
            return concatenate(kept)
    raise ValueError(
        f"{count} {'held-out' if held_out else 'not held-out'} facts of {hops} hops were asked for,"
        f" but {drawn} draws on this graph of {graph.n_entities} entities and {graph.n_relations}"
        f" relations gave {count - missing}"
    )


def make_multi_hop(
    graph: PermutationGraph | TableGraph,
    max_hops: int = 40,
    train: int = 15_000,
    test: int = 750,
    seed: int = 42,
    progress: bool = False,
) -> MultiHopData:
    """Distinct random facts of 2 to `max_hops` hops, split into train and test; the defaults are
    the paper's.

    The facts of one hop count depend on the graph, the seed, and train + test alone, not on
    `max_hops`.

    Args:
        train, test: Facts of each hop count; those of 1 hop are all for training.
        progress: Show a progress bar.

    Raises:
        ValueError: Fewer than 2 hops, negative numbers, or more distinct facts of a hop count than
            there are.

    Source:
        arXiv 2604.07822, section on recursion extrapolation, and its data scripts.
    """
    if max_hops < 2 or train < 0 or test < 0:
        raise ValueError(
            f"max_hops must be at least 2, and train and test not negative, got {max_hops}, {train}"
            f" and {test}"
        )
    _check_enough(graph, 2, train + test)
    split: tuple[dict[int, FactBatch], dict[int, FactBatch]] = {}, {}
    for hops in tqdm(
        range(2, max_hops + 1), desc="drawing facts", unit="hop count", disable=not progress
    ):
        facts = draw_distinct(graph, hops, train + test, np.random.default_rng((seed, hops)))
        split[0][hops], split[1][hops] = facts[:train], facts[train:]
    atomic = atomic_facts(graph)
    return MultiHopData(
        graph, atomic[np.random.default_rng((seed, 1)).permutation(len(atomic))], *split
    )


def draw_distinct(
    graph: PermutationGraph | TableGraph, hops: int, count: int, rng: np.random.Generator
) -> FactBatch:
    """Distinct facts of one hop count, in random order, each set of them equally likely.

    Raises:
        ValueError: More facts than there are.
    """
    _check_enough(graph, hops, count)
    facts = draw_facts(graph, hops, count, rng)
    while True:
        facts = facts[first_occurrences(facts)]
        if len(facts) >= count:
            return facts[:count]
        facts = concatenate([facts, draw_facts(graph, hops, count, rng)])


def _check_enough(graph: PermutationGraph | TableGraph, hops: int, count: int) -> None:
    total = graph.count(hops)
    if count > total:
        raise ValueError(
            f"{count:,} distinct facts of {hops} hops were asked for, but this graph has only"
            f" {total:,}: {graph.n_entities} entities * {graph.out_degree} relations each ^ {hops}"
        )
