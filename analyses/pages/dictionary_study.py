"""A multi-hop checkpoint and what its graph says of dictionaries: the entity after each hop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from loopscope.analyses.common.configs import SourceConfig
from loopscope.analyses.common.subject import Subject, answer_logits, open_subject
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.labels import FeatureLabels, feature_labels
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.interp.dictionaries.splice import FeatureEdit, splice
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.registry import build
from loopscope.models.core.state import checked_loops
from loopscope.tasks.base import Graph
from loopscope.tasks.facts import FactBatch, words
from loopscope.tasks.graphs import PermutationGraph, TableGraph
from loopscope.tasks.multi_hop import sample_facts

TRAIN, HELD, SWAPS = 250, 30, 40  # facts of each hop count
ALL, FIRST = "all that follow", "its first"
ARRIVED = 0.9  # the share of facts whose entity is the top answer of a position that has it


@dataclass(frozen=True)
class AskedFacts:
    """Facts of one side of the split, as inputs.

    Attributes:
        batch: The inputs, of 2 hops to as many as were trained.
        entities: Int[Tensor, "batch pos"], the entity after the hop of each position; -1 for
            padding.
        states: Float[Tensor, "read loop d_model"].
        position, entity: Int[Tensor, " read"], of each token.
    """

    batch: Batch
    entities: Tensor
    states: Tensor
    position: Tensor
    entity: Tensor


@dataclass(frozen=True)
class Study:
    """A checkpoint with its graph, and facts to train and to test dictionaries on.

    Attributes:
        subject: The checkpoint.
        graph: The graph that answers its questions.
        hops: The deepest hop count that is asked.
        n_loops: Iterations of all runs.
    """

    subject: Subject
    graph: PermutationGraph | TableGraph
    hops: int
    n_loops: int

    @classmethod
    def of(cls, checkpoint: str) -> Study:
        """Open a checkpoint.

        Raises:
            ValueError: It has no graph, or its card does not say how many hops it was trained on.
        """
        subject = open_subject(SourceConfig(checkpoint=checkpoint))
        if subject.graph is None or subject.trained_hops is None:
            raise ValueError(
                "the study of dictionaries needs a checkpoint with graph.json and with trained_hops"
                f" in its card, got {checkpoint}"
            )
        n_loops = checked_loops(None, subject.model.cfg.n_loops)
        return cls(subject, subject.graph, subject.trained_hops, n_loops)

    @property
    def model(self) -> LoopedModel:
        """The model."""
        return self.subject.model

    @cached_property
    def reading(self) -> Reading:
        """The residual after the last block of every iteration."""
        return Reading.of(self.model, self.n_loops)

    def draw(self, hops: int, count: int, held_out: bool, seed: int) -> FactBatch:
        """Random facts of one hop count, from the ones trained on or from the ones held out."""
        return sample_facts(self.graph, hops, count, np.random.default_rng((seed, hops)), held_out)

    def encode(self, facts: FactBatch) -> Batch:
        """Facts as inputs."""
        return self.subject.batch(_texts(self.graph, facts))

    @cached_property
    def train(self) -> AskedFacts:
        """Facts that the checkpoint was trained on; features are trained and chosen on them."""
        return self.asked(self.model, TRAIN, held_out=False, seed=0)

    @cached_property
    def held(self) -> AskedFacts:
        """Facts held out in the checkpoint's training; all numbers are of them."""
        return self.asked(self.model, HELD, held_out=True, seed=11)

    def asked(self, model: LoopedModel, count: int, held_out: bool, seed: int) -> AskedFacts:
        """Facts of every hop count, with the states of a model."""
        facts = [self.draw(hops, count, held_out, seed) for hops in range(2, self.hops + 1)]
        batch = self.subject.batch([text for part in facts for text in _texts(self.graph, part)])
        entities = torch.full(batch.tokens.shape, -1)
        row = 0
        for part in facts:
            entities[row : row + len(part), : part.hops + 1] = torch.from_numpy(part.path)
            row += len(part)
        shown = batch.mask.bool()
        columns = torch.arange(entities.shape[1]).expand_as(entities)
        states = loop_states(model, batch, self.n_loops, hook=self.reading.hook)
        return AskedFacts(batch, entities, states, columns[shown], entities[shown])

    @cached_property
    def arrived(self) -> Tensor:
        """Bool[Tensor, "pos loop"]: whether a position has its entity after an iteration and all
        that follow, by the model's own readout there on the facts trained on. The head entity
        stands at position 0 from the beginning, and is not counted.
        """
        found = torch.zeros(self.hops + 1, self.n_loops, dtype=torch.bool)
        batch, entities = self.train.batch, self.train.entities
        first = self.model.to_single_token("<e_0>")
        for position in range(1, self.hops + 1):
            rows = (entities[:, position] >= 0).nonzero().flatten()[::7]
            lens = readout_lens(self.model, batch[rows], self.n_loops, positions=[position])
            right = lens.correct(entities[rows, position] + first).float().mean(1)
            right_from_on = (right.flatten() >= ARRIVED).int().flip(0).cumprod(0).flip(0)
            found[position] = right_from_on.bool()
        return found

    def labels(self, asked: AskedFacts) -> Tensor:
        """Int[Tensor, "read loop"]: the entity of each token where it has arrived, else -1."""
        there = self.arrived[asked.position]
        return asked.entity[:, None].where(there, -1)

    def named(self, dictionary: Dictionary, states: tuple[Tensor, Tensor]) -> FeatureLabels:
        """The feature of each entity: chosen on some of the facts trained on, measured on those
        held out.

        Args:
            states: Of the facts trained on, and of those held out.
        """
        chosen = slice(None, None, 3)
        labels = self.labels(self.train)[chosen], self.labels(self.held)
        return feature_labels(dictionary, states[0][chosen], labels[0], states[1], labels[1])

    def untrained(self) -> LoopedModel:
        """The same architecture with random weights."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = build(self.model.cfg)
        model.vocab, model.read_at = self.model.vocab, self.model.read_at
        return model.eval()


def _texts(graph: Graph, facts: FactBatch) -> list[str]:
    vocabulary = words(graph.n_entities, graph.n_relations)
    return ["".join(vocabulary[token] for token in row) for row in facts.tokens.tolist()]


@dataclass(frozen=True)
class Swap:
    """Held-out facts of one hop count, of which the entity at one position is to become another.

    Attributes:
        batch: The inputs.
        position: Of the entity; hops count as positions do.
        first: The iteration at which it is there for the first time.
        own, other: Int[Tensor, " batch"], the entity, and the one it is to become.
        before, after: Int[Tensor, " batch"], the answer, and the answer that the graph then gives.
    """

    batch: Batch
    position: int
    first: int
    own: Tensor
    other: Tensor
    before: Tensor
    after: Tensor


def swaps(study: Study, whole: bool) -> list[Swap]:
    """Swaps of the answer at its own position (`whole`), or of an entity on the way, halfway or
    earlier.

    An entity on the way is taken where the next hop comes in a later iteration: what the same
    iteration has done with it already cannot be changed after its last block.
    """
    found, rng = [], np.random.default_rng(7)
    entities = study.graph.n_entities
    first = (study.n_loops - study.arrived.sum(1)).tolist()  # of each position; n_loops for never
    for hops in range(2, study.hops + 1):
        way = [p for p in range(1, hops // 2 + 1) if first[p + 1] > first[p]]
        there = [p for p in ([hops] if whole else way[-1:]) if first[p] < study.n_loops]
        for position in there:
            facts = study.draw(hops, SWAPS, held_out=True, seed=12)
            own = facts.path[:, position]
            other = (own + rng.integers(1, entities, len(own))) % entities
            relations = facts.tokens[:, 1 + position :] - 1 - entities
            after = study.graph.paths(other, relations)[:, -1]
            tensors = map(torch.from_numpy, (own, other, facts.path[:, -1], after))
            found.append(Swap(study.encode(facts), position, first[position], *tensors))
    return found


Pairing = Callable[[Swap, int], tuple[Tensor, Tensor | None]]


def outcome(
    study: Study, dictionary: Dictionary, swap: Swap, pairing: Pairing, every: bool
) -> tuple[float, float]:
    """The share of answers that become the predicted ones, and of answers that change.

    Args:
        pairing: The features, one for each row, that are taken out at an iteration, and those that
            take over their activations (None for nothing).
        every: Edit from the iteration on at which the entity is there; else in this one alone.
    """
    loops = range(swap.first, study.n_loops if every else swap.first + 1)
    edits = []
    for loop in loops:
        out, into = pairing(swap, loop)
        into = None if into is None else into[:, None]
        edits.append(FeatureEdit(out[:, None], [loop], [swap.position], into=into))
    reference = swap.batch if dictionary.kind == "crosscoder" else None
    first = study.model.to_single_token("<e_0>")
    with splice(study.model, dictionary, edits, loops=list(loops), reference=reference):
        answers = answer_logits(study.model, swap.batch, study.n_loops).argmax(-1) - first
    agree = [(answers == swap.after), (answers != swap.before)]
    return float(agree[0].float().mean()), float(agree[1].float().mean())


def causal(study: Study, named: dict[str, tuple[Dictionary, FeatureLabels]]) -> pd.DataFrame:
    """One row per dictionary and place of the edit: the causal precision of the entities' features,
    of random ones, and what their ablation changes.
    """
    rows = []
    kinds = [("answer", True, True), ("answer", True, False), ("on the way", False, True)]
    for name, (dictionary, labels) in named.items():
        live = live_features(study, dictionary)

        def some(swap: Swap, loop: int, seed: int, live: Sequence[Tensor] = live) -> Tensor:
            generator = torch.Generator().manual_seed(100 * swap.position + seed)
            drawn = torch.rand(len(swap.own), generator=generator)  # the same at every iteration
            return live[loop][(drawn * len(live[loop])).long()]

        def of(entities: Tensor, loop: int, labels: FeatureLabels = labels) -> Tensor:
            return labels.feature[loop][entities]

        tried: list[Pairing] = [
            lambda swap, loop, of=of: (of(swap.own, loop), of(swap.other, loop)),  # type: ignore[misc]
            lambda swap, loop, of=of, some=some: (of(swap.own, loop), some(swap, loop, 0)),  # type: ignore[misc]
            lambda swap, loop, some=some: (some(swap, loop, 1), some(swap, loop, 2)),  # type: ignore[misc]
            lambda swap, loop, of=of: (of(swap.own, loop), None),  # type: ignore[misc]
        ]
        for what, whole, every in kinds:
            group = swaps(study, whole)
            found = torch.tensor(
                [
                    [outcome(study, dictionary, swap, pairing, every) for pairing in tried]
                    for swap in group
                ]
            ).mean(0)
            changed = float(found[3, 1])
            place = ALL if every else FIRST
            rows.append((name, what, place, *found[:3, 0].tolist(), changed))
    columns = ["dictionary", "swapped", "at iterations", "entity's features"]
    columns += ["into a random feature", "random features", "ablation changes"]
    return pd.DataFrame(rows, columns=columns)


def live_features(study: Study, dictionary: Dictionary) -> list[Tensor]:
    """For each iteration the features that are on in at least one of the facts trained on: at any
    iteration where features are the same at all, else at this one.
    """
    on = (dictionary.encode(study.train.states[::3]) > 0).any(0).expand(study.n_loops, -1)
    on = on.any(0).expand_as(on) if dictionary.same_features else on
    return [row.nonzero().flatten() for row in on]
