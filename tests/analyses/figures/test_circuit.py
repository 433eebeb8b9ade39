"""The circuit's figure: what its record says, and what is drawn of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loopscope.analyses.common.configs import OutputConfig
from loopscope.analyses.common.pairs_of import open_pairs
from loopscope.analyses.common.records import files_of
from loopscope.analyses.figures.circuit import circuit as page
from loopscope.analyses.figures.circuit.circuit import RANKINGS, SHARES, CircuitConfig, FoundCircuit
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.names import EMBED, FINAL, Edge
from loopscope.interp.circuits.selection import prune_circuit
from loopscope.interp.dictionaries.controls import random_dictionary
from loopscope.interp.dictionaries.graph import feature_graph
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.interp.dictionaries.sae_files import save_dictionary
from loopscope.interp.drawing.circuits import components, folded_scores, moves, spots, strongest
from loopscope.interp.drawing.labels import label
from small_figures import small_config, small_figure


@pytest.fixture(scope="module")
def record() -> FoundCircuit:
    found = small_figure("circuit")[0]
    assert isinstance(found, FoundCircuit)
    return found


def test_the_record_says_what_a_measurement_of_its_circuit_says(record: FoundCircuit) -> None:
    config: CircuitConfig = small_config("circuit")
    subject, pairs = open_pairs(config, config.n_loops)
    both = pairs.clean_batch, pairs.corrupted_batch
    found = evaluate_circuit(subject.model, *both, record.circuit, pairs.metric())
    row = record.summary().query("circuit == 'yes'").iloc[0]
    assert row["edges"] == len(record.circuit) == int(found.edges[0])
    assert row["faithfulness"] == pytest.approx(float(found.faithfulness[0]), abs=1e-5)
    assert row["left without them"] == pytest.approx(float(found.completeness[0]), abs=1e-5)
    assert prune_circuit(record.circuit) == record.circuit


def test_sizes_are_the_shares_and_the_circuits_own(record: FoundCircuit) -> None:
    shares = {max(1, round(share * record.circuit.n_possible)) for share in SHARES}
    assert set(record.sizes) == shares | {len(record.circuit)}
    assert record.faithful.shape == (len(RANKINGS), len(record.sizes))
    assert record.summary()["circuit"].tolist().count("yes") == 1
    assert len(record.frame()) == len(record.circuit)


def test_the_finding_says_edges_faithfulness_and_controls(record: FoundCircuit) -> None:
    faithful = torch.tensor([[0.5], [0.25], [-0.125]], dtype=torch.float64)
    small = replace(
        record,
        sizes=(len(record.circuit),),
        faithful=faithful,
        left=torch.tensor([0.0625], dtype=torch.float64),
    )
    said = page._found(small)
    assert said.startswith(f"{len(record.circuit)} of {record.circuit.n_possible} edges")
    assert "keep 0.50 of the difference" in said
    assert "all others together keep 0.06" in said
    assert "the change of their writers keep 0.25, random ones -0.12" in said


def test_with_a_dictionary_the_viewers_graph_is_of_its_features(
    record: FoundCircuit, tmp_path: Path
) -> None:
    config: CircuitConfig = small_config("circuit")
    subject, pairs = open_pairs(config, config.n_loops)
    reading = Reading.of(subject.model, config.n_loops)
    states = loop_states(subject.model, pairs.clean_batch, reading.n_loops)
    own = random_dictionary(states, reading, n_features=32, k=4)
    save_dictionary(own, tmp_path / "own")
    found = page._features(subject, pairs.first(), replace(config, dictionary=tmp_path / "own"))
    assert found is not None
    first = pairs.first()
    alone = feature_graph(subject.model, own, first.clean_batch, pairs.first().metric())
    assert found.nodes == alone.nodes
    assert found.total == pytest.approx(alone.total)
    with torch.no_grad():
        last = subject.model(first.clean_batch.tokens)[:, -1]
    whole = pairs.metric()(last.expand(len(pairs.clean), -1))
    assert found.value == pytest.approx(float(whole[0]), rel=1e-4)
    graph = json.loads(page._graph(replace(record, features=found)))
    shown = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert len(shown) == sum(node.kind == "feature" for node in found.nodes) > 0
    assert "component" in {
        node["feature_type"] for node in json.loads(page._graph(record))["nodes"]
    }
    more = replace(config, dictionary=tmp_path / "own", n_loops=reading.n_loops + 1)
    with pytest.raises(ValueError, match=f"the dictionary of {reading.n_loops}"):
        page._features(subject, pairs.first(), more)


def test_every_node_has_a_place_of_its_own(record: FoundCircuit) -> None:
    places = spots(record.circuit)
    assert set(places) == set(record.circuit.nodes)
    assert len(set(places.values())) == len(places)
    ends = {node: record.circuit.end(node) for node in places}
    for node, spot in places.items():
        assert abs(spot.x - (ends[node].position or 0)) < 0.5
        visit = {EMBED: -1, FINAL: len(record.circuit.schedule)}.get(ends[node].component)
        if visit is not None:
            assert spot.y == visit
        else:
            assert -1 < spot.y < len(record.circuit.schedule)
    assert components(record.circuit)[-1] == "mlp"


def test_nodes_over_all_positions_stand_by_visit_and_component(record: FoundCircuit) -> None:
    edges = {Edge(*(name.partition("@")[0] for name in edge)): 1.0 for edge in record.circuit.edges}
    found = replace(
        record.circuit, edges=tuple(edges), scores=tuple(edges.values()), positions=None
    )
    places = spots(found)
    assert set(places) == set(found.nodes)
    assert len(set(places.values())) == len(places)
    assert places[EMBED].x < min(spot.x for node, spot in places.items() if node != EMBED)
    assert places[FINAL].x == len(found.schedule)
    assert moves(found) == []
    assert moves(record.circuit)
    assert all(len({record.circuit.end(n).position for n in p}) == 2 for p in moves(record.circuit))


def test_the_folded_view_shares_out_all_scores_but_the_embeddings(record: FoundCircuit) -> None:
    table = folded_scores(record.circuit)
    assert float(table.sum().sum()) == pytest.approx(1.0)
    assert list(table.columns) == list(range(record.circuit.n_loops))
    frame = record.frame()
    own = frame[frame["writer_component"] != EMBED]
    first = own[own["writer"].str.startswith("loops.0.")]
    expected = first["score"].abs().sum() / own["score"].abs().sum()
    assert float(table[0].sum()) == pytest.approx(expected)


def test_the_strongest_edges_are_drawn(record: FoundCircuit) -> None:
    kept = strongest(record.circuit, 3)
    sizes = sorted(map(abs, record.circuit.scores))
    assert sorted(abs(record.circuit.scores[number]) for number in kept) == sizes[-3:]
    figure = small_figure("circuit")[1]
    lines = [
        trace
        for trace in figure.data
        if trace.type == "scatter" and trace.mode == "lines" and trace.line.dash is None
    ]
    assert sum(list(trace.x).count(None) for trace in lines) == len(record.circuit)
    words = [f"{at} {token}" for at, token in enumerate(record.tokens)]
    assert "<e_" in words[0]
    assert list(figure.layout.xaxis.ticktext) == list(map(label, words)), "plotly reads HTML"


def test_a_circuit_has_a_picture_of_its_own(record: FoundCircuit) -> None:
    figure = record.circuit.plot(title="a circuit")
    assert figure.layout.title.text == "a circuit"
    (folded,) = [trace for trace in figure.data if trace.type == "heatmap"]
    assert set(folded.y) <= set(record.circuit.folded()["component"])


def test_the_page_and_the_graph_go_with_the_html_and_the_json(tmp_path: Path) -> None:
    output = OutputConfig(out=tmp_path, csv=False, html=False)
    names = [path.name for path in files_of("circuit", output)]
    assert names == ["circuit.json", "circuit.graph.json", "circuit.settings.json"]
    more = [path.name for path in files_of("circuit", replace(output, json=False, html=True))]
    assert more == ["circuit.html", "circuit.page.html", "circuit.settings.json"]
