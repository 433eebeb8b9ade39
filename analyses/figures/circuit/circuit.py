"""Which edges between components of all iterations carry the answer? A circuit found by the
machine, against two controls.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.analyses.circuit_controls import SHARES, FoundCircuit, found_circuit
from loopscope.analyses.common.configs import PairConfig
from loopscope.analyses.common.pairs_of import TextPairs, open_pairs
from loopscope.analyses.common.sections import Opened, Section, of_pairs
from loopscope.analyses.common.subject import Subject
from loopscope.interp.circuits.building import aligned, graph_of
from loopscope.interp.circuits.scores import Method, circuit_scores
from loopscope.interp.circuits.selection import select_circuit, smallest_circuit
from loopscope.interp.dictionaries.graphs.graph import feature_graph
from loopscope.interp.dictionaries.graphs.record import FeatureGraph
from loopscope.interp.dictionaries.sae_files import load_dictionary
from loopscope.interp.drawing.circuit_page import circuit_page
from loopscope.interp.drawing.circuits import MOST, add_folded, add_unrolled
from loopscope.interp.drawing.look import CATEGORIES, FAINT, INK, MARK, styled
from loopscope.interp.viewer.graph import viewer_graph
from loopscope.models.basis.arguments import Argument, ArgumentError
from loopscope.models.core.state import checked_loops


@dataclass(frozen=True, kw_only=True)
class CircuitConfig(PairConfig):
    """The smallest circuit by edge scores: the edges between heads and MLPs of all iterations
    that keep the answer's margin if all other edges carry the corrupted run.
    """

    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    wanted: float = 0.9
    """The share of the margin's difference between clean and corrupted run that the circuit is to
    keep.
    """
    edges: int | None = None
    """Take so many edges instead."""
    method: Method = "ig-edges"
    """How edges are scored."""
    steps: int = 10
    """Steps of integrated gradients."""
    by_position: bool | None = None
    """Whether a component is another node at each position; by default where all texts have one
    length and edges times positions are at most a hundred thousand.
    """
    heads: bool | None = None
    """Whether heads are nodes; by default where the family lets them be told apart."""
    dictionary: Path | None = None
    """Folder of a dictionary of the checkpoint: the graph for viewers then shows its features in
    the first clean text, with what each gives to later ones and to the answer.
    """


MOST_EDGES = 100_000
"""Edges of a circuit by position, above which it must be asked for."""
_PAIRS_OF_REPORT = 16
"""So many pairs show which edges matter; the command measures all of them."""


def run(config: CircuitConfig) -> FoundCircuit:
    """Score all edges of one pair, or of all pairs of the data, or of the questions of one hop
    count; choose, and measure.

    Raises:
        ValueError: The scored edges cannot reach what is wanted, or the model has no such edges.
    """
    subject, pairs = open_pairs(config, config.n_loops)
    return measure(subject, pairs, config)


def measure(subject: Subject, pairs: TextPairs, config: CircuitConfig) -> FoundCircuit:
    """The record for some pairs of an open checkpoint.

    Raises:
        ValueError: As for `run`; or so few edges that none of them is left by pruning.
    """
    model, both, metric = subject.model, (pairs.clean_batch, pairs.corrupted_batch), pairs.metric()
    features = _features(subject, pairs.first(), config)
    scores = circuit_scores(
        model,
        *both,
        metric,
        config.n_loops,
        method=config.method,
        steps=config.steps,
        heads=config.heads,
        by_position=_by_position(subject, pairs, config),
        checkpoint=subject.name,
    )
    if config.edges is None:
        chosen = smallest_circuit(model, *both, scores, metric, config.wanted)
    else:
        chosen = select_circuit(scores, config.edges)
    if not len(chosen):
        raise ArgumentError(
            "a circuit needs a path from the embedding to the answer, but the first"
            f" {config.edges or 'few'} of {len(scores)} edges hold none; take more with ",
            Argument("edges"),
        )
    return replace(found_circuit(subject, pairs, scores, chosen), features=features)


def _features(subject: Subject, pair: TextPairs, config: CircuitConfig) -> FeatureGraph | None:
    """The graph of the features of a clean text, where a dictionary is given."""
    if config.dictionary is None:
        return None
    dictionary = load_dictionary(config.dictionary).to(subject.model.device)
    n_loops = checked_loops(config.n_loops, subject.model.cfg.n_loops)
    if dictionary.n_loops != n_loops:
        raise ArgumentError(
            f"the circuit and its features must be of one run, but the circuit is of {n_loops}"
            f" iterations and the dictionary of {dictionary.n_loops}; pass ",
            Argument("n_loops", dictionary.n_loops),
        )
    return feature_graph(subject.model, dictionary, pair.clean_batch, pair.metric())


def _by_position(subject: Subject, pairs: TextPairs, config: CircuitConfig) -> bool:
    """Whether components at different positions are different nodes."""
    batch, model = pairs.clean_batch, subject.model
    if config.by_position is not None or not aligned(batch):
        return bool(config.by_position)
    n_loops = checked_loops(config.n_loops, model.cfg.n_loops)
    graph = graph_of(model, batch, n_loops, config.heads)
    return graph.n_edges * batch.tokens.shape[1] <= MOST_EDGES


def figure(record: FoundCircuit) -> go.Figure:
    """Above the edges between visits; below the folded view, and faithfulness over sizes."""
    drawn = min(MOST, len(record.circuit))
    plot = make_subplots(
        2,
        2,
        specs=[[{"colspan": 2}, None], [{}, {}]],
        row_heights=[0.55, 0.45],
        horizontal_spacing=0.12,
        vertical_spacing=0.18,
        subplot_titles=(
            f"the {drawn} strongest of {len(record.circuit)} edges",
            "what each component writes, by iteration",
            "circuits of other sizes, and controls",
        ),
    )
    plot.update_annotations(font_size=13)
    add_unrolled(plot, record.circuit, 1, 1, record.tokens)
    add_folded(plot, record.circuit, 2, 1)
    _add_curves(plot, record)
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": -0.12, "yanchor": "top"}
    return styled(plot, 800).update_layout(legend=legend, margin={"l": 110, "b": 110})


def _graph(record: FoundCircuit) -> bytes:
    """The circuit, or the features where there are some, for viewers of attribution graphs, on the
    tokens of the first clean text.
    """
    slug = re.sub("[^a-z0-9]+", "-", f"loopscope-{record.circuit.call.checkpoint}".lower())
    shown = record.features or record.circuit
    graph = viewer_graph(shown, record.tokens, record.measured, slug)
    return json.dumps(graph, separators=(",", ":")).encode()


def _page(record: FoundCircuit) -> bytes:
    """The circuit as a page to act on."""
    name = record.circuit.call.checkpoint or "a model"
    lead = f"{record.heading()}. {_found(record)}"
    return circuit_page(record.circuit, name, lead, record.tokens).encode()


FILES = {"graph.json": _graph, "page.html": _page}
"""The files that only this command writes."""


def _add_curves(plot: go.Figure, record: FoundCircuit) -> None:
    table, place = record.summary(), {"row": 2, "col": 2}
    curves = {
        "faithfulness": ("edges of largest score", CATEGORIES[0], "solid"),
        "left without them": ("all but those", CATEGORIES[0], "dot"),
        "ranked by change": ("edges of largest change", INK, "solid"),
        "random": ("random edges", FAINT, "solid"),
    }
    for column, (name, color, dash) in curves.items():
        plot.add_scatter(
            x=table["share"].tolist(),
            y=table[column].tolist(),
            name=name,
            mode="lines+markers",
            line={"color": color, "dash": dash},
            **place,
        )
    plot.add_scatter(
        x=[record.circuit.share],
        y=[float(record.faithful[0, record.own])],
        name="the circuit",
        mode="markers",
        marker={"color": MARK, "size": 12, "symbol": "diamond"},
        **place,
    )
    plot.update_xaxes(
        title="share of all edges", type="log", tickformat=".0%", tickvals=list(SHARES), **place
    )
    plot.update_yaxes(title="share of the margin kept", range=[-0.1, 1.1], **place)


def _of_report(opened: Opened) -> FoundCircuit:
    pairs = opened.pairs.first(_PAIRS_OF_REPORT)
    return measure(opened.subject, pairs, CircuitConfig(n_loops=opened.n_loops))


def _found(record: FoundCircuit) -> str:
    kept, left = float(record.faithful[0, record.own]), float(record.left[record.own])
    change, chance = record.faithful[1:, record.own].tolist()
    heard = record.circuit.folded().query("visits > 1")
    where = " by position" if record.circuit.positions else ""
    most = next(heard.nlargest(1, "score").itertuples(), None)
    again = (
        f" The component of largest score is {most.component}, in {most.visits} visits."
        if most is not None
        else ""
    )
    share = f"{record.circuit.share:.1%}"
    pairs = len(record.clean)
    over = f"Over {pairs} pairs of inputs, " * (pairs > 1)
    said = (
        f"{over}{len(record.circuit)} of {record.circuit.n_possible} edges{where} ({share}) keep"
        f" {kept:.2f} of the difference between the margins of the clean and the corrupted run; all"
        f" others together keep {left:.2f}. As many edges by the change of their writers keep"
        f" {change:.2f}, random ones {chance:.2f}.{again}"
    )
    return said.replace("-0.00", "0.00")


SECTION = Section(
    title="The circuit that carries the answer",
    look_for=(
        "A line is an edge: the output of one component as one later component reads it. Blue"
        f" edges move the margin towards the clean run, orange ones away from it; the {MOST}"
        " strongest are drawn. Everything outside the circuit is given the corrupted run. If all"
        " texts have one length, columns are positions, and a dotted line is what a head moves"
        " from one position to another. Below, each component of the shared blocks has one row: a"
        " row that is filled over several loops does its work again at each of them. The last"
        " panel shows the share of the margin that circuits of each size keep. A circuit means"
        " something if the blue curve rises long before the two controls, and the dotted one, the"
        " share that is left without the circuit, stays at 0."
    ),
    measure=_of_report,
    found=_found,
    serves=of_pairs,
)

EXAMPLE = 'plots.circuit("mini/multi_hop/r2", hops=2, per_hop=3, edges=20)'
