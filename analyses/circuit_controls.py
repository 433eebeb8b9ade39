"""A found circuit beside its controls: circuits of other sizes, by score, by change, at random."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.pairs_of import TextPairs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.subject import Subject, words
from loopscope.interp.circuits.changes import writer_changes
from loopscope.interp.circuits.faithfulness import shares_of
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.selection import ranked
from loopscope.interp.common.columns import used_columns
from loopscope.interp.common.pairs import Pair
from loopscope.interp.dictionaries.graphs.record import FeatureGraph
from loopscope.models.basis.tokens import Batch

SHARES = (0.02, 0.05, 0.1, 0.2, 0.5)
"""Sizes of the curve, as shares of all edges; the circuit's own size is put among them."""
RANKINGS = ("score", "change", "random")


@dataclass(frozen=True)
class FoundCircuit(Record):
    """A circuit, and how faithful circuits of other sizes and of two controls are.

    Attributes:
        circuit: The circuit.
        clean, corrupted: The texts, pair by pair.
        measured: The answer in words, with the token that it is compared with.
        tokens: Of the first clean text, by column; a padding column before the one that is read is
            a token too.
        sizes: Numbers of edges.
        faithful: Float[Tensor, "ranking size"], the share of the margin's difference that is kept:
            by edges of largest score, by edges whose writers' output changes most between the two
            runs, and by edges in random order.
        left: Float[Tensor, " size"], the share that is kept without the edges of largest score.
        features: The features of the first clean text; None without a dictionary.
    """

    circuit: Circuit
    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    measured: str
    tokens: tuple[str, ...]
    sizes: tuple[int, ...]
    faithful: Float[Tensor, "ranking size"]
    left: Float[Tensor, " size"]
    features: FeatureGraph | None = None

    @property
    def own(self) -> int:
        """The number of the circuit's own size."""
        return self.sizes.index(len(self.circuit))

    def heading(self) -> str:
        """The pair, or the first of several, with the answer."""
        many = f" and {len(self.clean) - 1} more pairs" * (len(self.clean) > 1)
        return f"{self.clean[0]} against {self.corrupted[0]}{many}, answer {self.measured}"

    def frame(self) -> pd.DataFrame:
        """The edges of the circuit, as `Circuit.unrolled` gives them."""
        return self.circuit.unrolled()

    def summary(self) -> pd.DataFrame:
        """One row per size: edges, their share, faithfulness of the edges of largest score, what is
        left without them, and faithfulness of the two controls.
        """
        score, change, chance = (row.tolist() for row in self.faithful)
        return pd.DataFrame(
            {
                "edges": self.sizes,
                "share": [size / self.circuit.n_possible for size in self.sizes],
                "faithfulness": score,
                "left without them": self.left.tolist(),
                "ranked by change": change,
                "random": chance,
                "circuit": ["yes" if number == self.own else "" for number in range(len(score))],
            }
        )


def found_circuit(
    subject: Subject, pairs: TextPairs, scores: Circuit, chosen: Circuit
) -> FoundCircuit:
    """Measure a circuit, circuits of other sizes, and the controls.

    Args:
        scores: All edges.
        chosen: The circuit.
    """
    sizes = sorted({len(chosen), *(max(1, round(share * len(scores))) for share in SHARES)})
    orders = ranked(scores, "greedy"), _by_change(subject, pairs, scores), _at_random(len(scores))
    number = {edge: i for i, edge in enumerate(scores.edges)}
    taken = [order[:size] for order in orders for size in sizes]
    taken[sizes.index(len(chosen))] = [number[edge] for edge in chosen.edges]
    both = Pair(pairs.clean_batch, pairs.corrupted_batch)
    kept, left = shares_of(subject.model, both, scores, pairs.metric(), taken, taken[: len(sizes)])
    return FoundCircuit(
        circuit=chosen,
        clean=pairs.clean,
        corrupted=pairs.corrupted,
        measured=pairs.measured,
        tokens=_tokens(subject, pairs.clean_batch),
        sizes=tuple(sizes),
        faithful=kept.view(len(RANKINGS), -1).double().cpu(),
        left=left.double().cpu(),
    )


def _tokens(subject: Subject, batch: Batch) -> tuple[str, ...]:
    """The words of the first text, up to the last column that holds a token or is read."""
    last = int(used_columns(batch)[0].nonzero().max())
    return words(subject.model, batch.tokens[0, : last + 1])


def _by_change(subject: Subject, pairs: TextPairs, scores: Circuit) -> list[int]:
    """The edges' numbers by how much the output of their writer changes between the two runs."""
    change = writer_changes(subject.model, pairs.clean_batch, pairs.corrupted_batch, scores)
    return sorted(range(len(scores)), key=lambda number: -change[scores.edges[number].writer])


def _at_random(count: int) -> list[int]:
    """The edges' numbers in random order."""
    return random.Random(0).sample(range(count), count)
