"""The circuits that a search finds: the edges of a multi-hop miniature, and what they become over
the stages of training of a two-hop one.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import pandas as pd

from loopscope.analyses.circuit_controls import FoundCircuit
from loopscope.analyses.common.configs import PairConfig, SourceConfig
from loopscope.analyses.common.look import GROUP_NAMES
from loopscope.analyses.common.pairs_of import TextPairs, make_pairs, rows_of
from loopscope.analyses.common.records import markdown_table
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.analyses.common.two_hop import GROUPS, ask, with_other_start
from loopscope.analyses.figures.circuit.circuit import CircuitConfig, measure
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.record import Circuit
from loopscope.interp.circuits.scores import Method, circuit_scores
from loopscope.interp.circuits.search import compare_scores, exact_scores
from loopscope.interp.circuits.selection import smallest_circuit
from loopscope.interp.common.inputs import Metric
from loopscope.interp.common.metrics import logit_margin
from loopscope.interp.drawing.circuits import folded_scores
from loopscope.interp.lens.lens import readout_lens
from loopscope.models.basis.tokens import Batch

WANTED, TOP, QUESTIONS = 0.9, 50, 24
METHODS: tuple[Method, ...] = ("eap", "eap-ig-inputs", "ig-edges")
EXACT_HOPS, EXACT_QUESTIONS, EXACT_EDGES = 2, 8, 400
STAGES = ("train", "id", "ood")
_FOLDER = "mini/systematicity/r4_l2"


def section(subject: Subject, hops: int, movers: pd.DataFrame) -> str:
    """The section of the page of findings.

    Args:
        subject: The multi-hop checkpoint.
        hops: Hop count of its questions.
        movers: What single heads restore, found by hand: hop, loop, block, head, restores.
    """
    pairs = make_pairs(subject, rows_of(subject, PairConfig(hops=hops)))
    found = measure(subject, pairs, CircuitConfig(wanted=WANTED))
    opened = {s: open_subject(SourceConfig(checkpoint=f"{_FOLDER}/{s}")) for s in STAGES}
    stages = {(s, g): Stage.of(opened[s], g) for s in STAGES for g in GROUPS[1:]}
    heads, changed = by_hand(found.circuit, movers), changes(stages)
    same = changed["first half at"] == changed["second half at"]
    text = _TEXT.format(
        hops=hops,
        possible=found.circuit.n_possible,
        wanted=WANTED,
        share=f"{found.circuit.share:.1%}",
        exact_hops=EXACT_HOPS,
        exact_questions=EXACT_QUESTIONS,
        exact_edges=EXACT_EDGES,
        same=int((heads["most by hand"] == heads["most in the circuit"]).sum()),
        steps=len(heads),
        top=TOP,
        left=f"{float(found.left[found.own]):.2f}".replace("-0.00", "0.00"),
        between=f"{changed.loc[~same, 'overlap'].mean():.2f}",
        within=f"{changed.loc[same, 'overlap'].mean():.2f}",
        folder=_FOLDER,
        questions=QUESTIONS,
    )
    tables = {
        "SHARES": shares(pairs, subject),
        "SIZES": sizes(found),
        "EXACT": against_exact(subject),
        "FOLDED": folded(found.circuit),
        "HEADS": heads,
        "STAGES": by_stage(stages),
        "CHANGES": changed,
    }
    for mark, table in tables.items():
        text = text.replace(mark, markdown_table(table))
    return text


def sizes(found: FoundCircuit) -> pd.DataFrame:
    """Faithfulness over sizes, with the controls."""
    table = found.summary()
    return table[["share", *list(table.columns)[2:6]]].rename(columns={"share": "share of edges"})


def folded(circuit: Circuit) -> pd.DataFrame:
    """The share of the score that each component writes in each loop."""
    table = folded_scores(circuit).fillna(0.0)
    return table.rename(columns=lambda loop: f"loop {loop}").reset_index()


def by_hand(circuit: Circuit, movers: pd.DataFrame) -> pd.DataFrame:
    """For each step the head whose clean output restores most, and the one with the largest score
    in the circuit at the position of the step's relation.
    """
    frame = circuit.unrolled()
    frame = frame[frame["writer_component"].str.startswith("attn.")]
    frame = frame.assign(size=frame["score"].abs())
    sides = ["position", "writer_loop", "writer_layer", "writer_component"]
    scores = frame.groupby(sides)["size"].sum()
    rows = []
    for (hop, loop, block), heads in movers.groupby(["hop", "loop", "block"]):
        best = int(heads.nlargest(1, "restores")["head"].tolist()[0])
        here = scores.get((hop, loop, block))
        most = -1 if here is None else int(str(here.idxmax()).removeprefix("attn."))
        rows.append((hop, loop, block, best, most))
    columns = ["hop", "loop", "block", "most by hand", "most in the circuit"]
    return pd.DataFrame(rows, columns=columns)


def shares(pairs: TextPairs, subject: Subject) -> pd.DataFrame:
    """The share of edges that is wanted by two ways to score them, over all positions and by
    position.
    """
    both = pairs.clean_batch, pairs.corrupted_batch
    rows = []
    for method in METHODS[1:]:
        for by in (False, True):
            given = subject.model, *both
            scores = circuit_scores(*given, pairs.metric(), method=method, steps=10, by_position=by)
            found = smallest_circuit(*given, scores, pairs.metric(), WANTED, rule="top")
            where = "by position" if by else "over all positions"
            rows.append((method, where, len(scores), len(found), found.share))
    return pd.DataFrame(rows, columns=["scores", "edges", "all", "circuit", "share"])


def against_exact(subject: Subject) -> pd.DataFrame:
    """How well the ways to score edges agree with exact patching, on some edges by position of a
    shorter question.
    """
    pairs = make_pairs(subject, rows_of(subject, PairConfig(hops=EXACT_HOPS)))
    rows = slice(0, EXACT_QUESTIONS)
    given = (subject.model, pairs.clean_batch[rows], pairs.corrupted_batch[rows])
    metric = logit_margin(pairs.answers.ids[rows])
    measured: Circuit | None = None
    table = []
    for method in METHODS:
        scores = circuit_scores(*given, metric, method=method, steps=10, by_position=True)
        chosen = random.Random(0).sample(range(len(scores)), EXACT_EDGES)
        scores = scores.take(chosen, "some")
        measured = measured or exact_scores(*given, scores, metric)
        found = compare_scores(scores, measured, (TOP,)).iloc[0]
        table.append((method, float(found["overlap"]), float(found["rank correlation"])))
    return pd.DataFrame(table, columns=["scores", "overlap", "rank correlation"])


@dataclass(frozen=True)
class Stage:
    """A two-hop checkpoint on one group of facts.

    Attributes:
        subject: The checkpoint.
        clean, corrupted: The questions, and the same ones with another head entity and first
            relation.
        metric: The answer's margin.
        halves: The scores of all edges by the first and by the second half of the questions.
        answered: The share of right answers.
    """

    subject: Subject
    clean: Batch
    corrupted: Batch
    metric: Metric
    halves: tuple[Circuit, Circuit]
    answered: float

    @classmethod
    def of(cls, subject: Subject, group: str) -> Stage:
        """Score one group of facts at one stage of training."""
        asked = ask(subject, group, QUESTIONS)
        answers = asked.targets[:, 1]
        others = subject.model.encode(with_other_start(subject, asked.questions))
        half = len(answers) // 2
        first, second = (
            circuit_scores(
                subject.model,
                asked.batch[rows],
                others[rows],
                logit_margin(answers[rows]),
            )
            for rows in (slice(0, half), slice(half, None))
        )
        right = readout_lens(subject.model, asked.batch).correct(answers)[-1].float().mean()
        metric = logit_margin(answers)
        return cls(subject, asked.batch, others, metric, (first, second), float(right))

    @cached_property
    def scores(self) -> Circuit:
        """The scores by all questions."""
        return circuit_scores(self.subject.model, self.clean, self.corrupted, self.metric)

    @cached_property
    def circuit(self) -> Circuit:
        """The smallest circuit that is faithful enough."""
        both = self.clean, self.corrupted
        return smallest_circuit(self.subject.model, *both, self.scores, self.metric, WANTED)

    def measured(self, circuit: Circuit) -> tuple[float, float]:
        """A circuit's faithfulness here, and what is left without it."""
        both = self.clean, self.corrupted
        found = evaluate_circuit(self.subject.model, *both, circuit, self.metric)
        return float(found.faithfulness[0]), float(found.completeness[0])


Stages = Mapping[tuple[str, str], Stage]


def by_stage(stages: Stages) -> pd.DataFrame:
    """The circuit of each group at each stage, and that of the ID facts on the group."""
    rows = []
    for (name, group), stage in stages.items():
        other = stages[name, GROUPS[1]].circuit
        circuit, (kept, left) = stage.circuit, stage.measured(stage.circuit)
        carried = stage.measured(other)[0] if other is not circuit else kept
        call = stage.scores.call
        margins = (float(call.clean or 0), float(call.corrupted or 0))
        row = (name, GROUP_NAMES[group], stage.answered, *margins)
        rows.append((*row, circuit.share, kept, left, carried))
    columns = ["stage", "facts", "answered", "margin", "corrupted", "share of edges"]
    return pd.DataFrame(rows, columns=[*columns, "kept", "left without", "kept by the ID circuit"])


def changes(stages: Stages) -> pd.DataFrame:
    """How alike the scores of two stages are; the same stage twice is the control."""
    pairs = [*((stage, stage) for stage in STAGES), *pairwise(STAGES)]
    rows = []
    for group in GROUPS[1:]:
        for before, after in pairs:
            first, second = stages[before, group].halves[0], stages[after, group].halves[1]
            found = compare_scores(first, second, (TOP,)).iloc[0]
            likeness = float(found["overlap"]), float(found["rank correlation"])
            rows.append((GROUP_NAMES[group], before, after, *likeness))
    columns = ["facts", "first half at", "second half at", "overlap", "rank correlation"]
    return pd.DataFrame(rows, columns=columns)


_TEXT = """
## The circuit that a search finds

A [circuit](glossary.md#circuit) is a set of edges; an edge is what one head or MLP adds to the
input of a later one, here at one position. `loopscope circuit --hops {hops}` scores all {possible}
edges of all iterations. The score is the integrated gradient over how much of every edge is kept
("ig-edges"). Then edges are chosen from the answer backwards, the largest first, until they alone
keep {wanted} of the difference between the clean and the corrupted margin; all other edges are
given the corrupted run. This takes {share} of the edges. If these edges are removed instead, {left}
of the difference is left. The circuit is measured on the queries on which it was found.

In the table, *faithfulness* is the share that a circuit of this size keeps. *Left without them* is
the share that is left if these edges are removed. There are two controls with as many edges: those
whose writers change most between the two runs (*ranked by change*), and random ones.

SIZES

Two choices matter: whether an edge is one position or all positions together, and how edges are
scored. "eap-ig-inputs" (integrated gradients of the embedding) and edges over all positions need a
larger share of the edges for the same faithfulness. In this table the edges with the largest scores
are taken, wherever they are.

SHARES

How well do the scores agree with exact patching? {exact_edges} edges were drawn at random from
those of {exact_hops} hops, and each one alone was given the corrupted run, on {exact_questions}
queries. The table shows the share of the {top} edges with the largest exact effect that are also
among the {top} with the largest score, and Spearman's rank correlation over the {exact_edges}
edges.

EXACT

The next table adds the scores of the circuit's edges up by the component that writes them. It shows
the share that each component of the two blocks has in each loop.

FOLDED

Does the search find the heads that were found by hand? For each step of the tables above: the head
whose clean output alone restores most, and the head with the largest score in the circuit at that
position. They are the same in {same} of {steps} steps. The two need not agree, as a score also
counts what a head does for later iterations.

HEADS

## Does the circuit change when a model begins to generalise?

`{folder}` was kept at three stages of training: when it had learnt its training facts ("train"),
the held-out combinations of facts that were also combined with others ("id"), and the combinations
of facts that were never combined in training ("ood"). Each group has {questions} queries, paired
with the same query of another head entity and first relation. For each group and stage the table
shows the smallest circuit that keeps {wanted} of the difference between the margins. *Kept by the
ID circuit* is the share that the circuit of the ID facts of the same stage keeps. Where a group is
hardly answered, the difference is small, and a share of it says little.

STAGES

Do the scores of the edges change from one stage to the next? Each row compares the scores on one
half of the queries at one stage with those on the other half, at the same stage (the control) or at
the next one: the overlap of the {top} edges with the largest scores, and Spearman's rank
correlation over all edges. The mean overlap is {between} between stages and {within} within one
stage. So most of what differs between two stages also differs between two halves of the queries.
The scores do show something else about a stage: how many edges the ID facts need (the table
before).

CHANGES
"""
