"""The circuit's figure: what its record says, and what is drawn of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loopscope.analyses.circuit_controls import RANKINGS, SHARES, FoundCircuit
from loopscope.analyses.cli import main
from loopscope.analyses.common.configs import OutputConfig, ReportConfig
from loopscope.analyses.common.pairs_of import open_pairs
from loopscope.analyses.common.records import files_of
from loopscope.analyses.common.sections import Opened
from loopscope.analyses.common.subject import open_subject
from loopscope.analyses.figures.circuit import circuit as page
from loopscope.analyses.figures.circuit.circuit import CircuitConfig
from loopscope.interp.circuits.faithfulness import evaluate_circuit
from loopscope.interp.circuits.names import EMBED, FINAL, Edge
from loopscope.interp.circuits.selection import prune_circuit
from loopscope.interp.dictionaries.controls import random_dictionary
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.interp.dictionaries.sae_files import save_dictionary
from loopscope.interp.drawing.circuit_places import components, moves, spots
from loopscope.interp.drawing.circuits import folded_scores, strongest
from loopscope.interp.drawing.labels import label
from small_figures import SMALL, small_config, small_figure


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


@pytest.mark.parametrize(("hops", "measured"), [(4, 16), (None, 16)])
def test_the_report_measures_the_first_pairs(
    hops: int | None, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ReportConfig(checkpoint="mini/multi_hop/r2", hops=hops)
    opened = Opened(config, open_subject(config, needs_questions=False))
    monkeypatch.setattr(page, "measure", lambda subject, pairs, config: pairs)
    found = page.SECTION.measure(opened)
    assert len(opened.pairs.clean) > measured == len(found.clean) == len(found.clean_batch)
    assert found.clean == opened.pairs.clean[:measured]


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
    assert said.startswith(
        f"Over 3 pairs of inputs, {len(record.circuit)} of {record.circuit.n_possible} edges"
    )
    assert "keep 0.50 of the difference" in said
    assert "all others together keep 0.06" in said
    assert "the change of their writers keep 0.25, random ones -0.12" in said


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dictionary, Path]:
    """A dictionary of the small figure's checkpoint, and the folder where it lies."""
    config: CircuitConfig = small_config("circuit")
    subject, pairs = open_pairs(config, config.n_loops)
    reading = Reading.of(subject.model, config.n_loops)
    states = loop_states(subject.model, pairs.clean_batch, reading.n_loops)
    made, folder = random_dictionary(states, reading, 32, 4), tmp_path_factory.mktemp("a") / "own"
    save_dictionary(made, folder)
    return made, folder


def written(folder: Path, *more: str) -> dict[str, Any]:
    """The graph for viewers that the command writes."""
    given: dict[str, Any] = {**SMALL["circuit"], "steps": 1, "out": folder}
    checkpoint = given.pop("checkpoint")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    main(["circuit", checkpoint, *flags, "--no-html", "--no-csv", *more])
    graph: dict[str, Any] = json.loads((folder / "circuit.graph.json").read_text())
    return graph


@pytest.mark.parametrize("readout", ["last_real", "first_pad"])
def test_with_a_dictionary_the_viewers_graph_is_of_its_features(
    readout: str, own: tuple[Dictionary, Path], tmp_path: Path
) -> None:
    dictionary, folder = own
    graph = written(tmp_path, f"--dictionary={folder}", f"--readout={readout}")
    config: CircuitConfig = small_config("circuit", readout=readout)
    subject, pairs = open_pairs(config, config.n_loops)
    model, batch, n_loops = subject.model, pairs.clean_batch[:1], dictionary.n_loops
    at, right = int(batch.readout[0]), int(pairs.answers.ids[0])
    assert bool(batch.mask[0, at]) == (readout == "last_real")
    words = list(model.to_str_tokens(batch.tokens[0, : at + 1]))
    assert graph["metadata"]["prompt_tokens"] == words
    _, cache = model.run_with_cache(batch.tokens, n_loops=n_loops, mask=batch.mask)
    codes = [dictionary.coder(0).encode(cache[name][0]) for name in dictionary.reading.names]
    shown = [node for node in graph["nodes"] if node["feature_type"] == "cross layer transcoder"]
    layers = {node["layer"] for node in shown if node["ctx_idx"] == at}
    assert layers == set(map(str, range(n_loops)))
    for node in shown:
        code = codes[int(node["layer"])][node["ctx_idx"], node["feature"]]
        assert node["activation"] == pytest.approx(float(code), rel=1e-4)

    def answer(last: Tensor) -> Tensor:
        end = [(dictionary.reading.names[-1], lambda value, hook: last)]
        with model.hooks(end, n_loops=n_loops), torch.no_grad():
            return model(batch.tokens, n_loops=n_loops, mask=batch.mask)[0, at]

    last = cache[dictionary.reading.names[-1]]
    whole, constant = answer(last), answer(last * 0)  # 0 over any divisor: the rest is linear
    wrong = int(whole.index_fill(0, torch.tensor([right]), -torch.inf).argmax())
    added = (whole - constant)[right] - (whole - constant)[wrong]
    (end,) = [node["node_id"] for node in graph["nodes"] if node["is_target_logit"]]
    into = [link["weight"] for link in graph["links"] if link["target"] == end]
    assert sum(into) == pytest.approx(float(added), rel=1e-4)
    assert end.endswith(f"_{at}")


def test_an_answer_that_is_read_at_padding_has_its_token_in_the_circuits_graph(
    tmp_path: Path,
) -> None:
    graph = written(tmp_path, "--readout=first_pad")
    *texts, padding = graph["metadata"]["prompt_tokens"]
    assert len(texts) == 3
    assert padding == "<pad>"
    (end,) = [node for node in graph["nodes"] if node["is_target_logit"]]
    assert end["ctx_idx"] == len(texts)


def test_a_dictionary_of_another_number_of_iterations_is_refused(
    own: tuple[Dictionary, Path], tmp_path: Path
) -> None:
    config = small_config("circuit", dictionary=own[1], n_loops=own[0].n_loops + 1)
    with pytest.raises(ValueError, match=f"the dictionary of {own[0].n_loops}"):
        page.run(config)


def test_edges_that_hold_no_path_to_the_answer_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"the first 1 of \d+ edges hold none; take more with edges="
    ):
        page.run(small_config("circuit", edges=1))


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
