"""The JSON for viewers of attribution graphs: its fields and types, and what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from loopscope.interp.circuits.names import Edge, Positions, ScheduleEntry
from loopscope.interp.circuits.record import Circuit, CircuitCall
from loopscope.interp.dictionaries.graphs.record import FeatureGraph, FeatureLink, FeatureNode
from loopscope.interp.viewer.graph import viewer_graph

SCHEDULE = tuple(ScheduleEntry(f"loops.{t}.blocks.0", t, 0, "blocks.0") for t in range(2))
SCORES = {
    ("embed", "loops.0.blocks.0.attn.1.q"): 0.5,
    ("embed", "loops.0.blocks.0.attn.0-1.k"): -2.0,
    ("loops.0.blocks.0.attn.1", "loops.0.blocks.0.mlp"): 3.0,
    ("loops.0.blocks.0.attn.0", "loops.1.blocks.0.attn.1.q"): 1.0,
    ("loops.0.blocks.0.attn.0", "loops.1.blocks.0.attn.1.v"): 0.25,
    ("loops.0.blocks.0.mlp", "final"): 4.0,
    ("loops.1.blocks.0.attn.1", "final"): 0.75,
}
CIRCUIT = Circuit(
    tuple(Edge(*names) for names in SCORES),
    tuple(SCORES.values()),
    CircuitCall("eap", "logit_diff", settings={"steps": 3}, selection="top 7", checkpoint="toy"),
    n_loops=2,
    schedule=SCHEDULE,
    n_possible=40,
)
REQUIRED: dict[str, dict[str, Any]] = {
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "nodes": {
        "node_id": str,
        "feature": int,
        "layer": (str, int),
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
    },
    "links": {"source": str, "target": str, "weight": float},
}
OPTIONAL: dict[str, dict[str, Any]] = {
    "metadata": {
        "info": dict,
        "generation_settings": dict,
        "pruning_settings": dict,
        "node_threshold": float,
        "feature_details": dict,
    },
    "nodes": {
        "influence": (float, type(None)),
        "activation": (float, type(None)),
        "token_prob": float,
        "is_target_logit": bool,
        "run_idx": int,
        "reverse_ctx_idx": int,
    },
    "links": {},
}
PARAMS = {"pinnedIds": list, "supernodes": list, "linkType": str, "clickedId": str, "sg_pos": str}
"""The published schema's fields with their types; `nodes` also has what the viewer's code reads."""


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    made = viewer_graph(CIRCUIT, ["<a>", "<b>", "<c>"], answer="<d>", slug="a-toy")
    return dict(json.loads(json.dumps(made)))


FEATURES = FeatureGraph(
    nodes=(
        FeatureNode("embed", None, 1),
        FeatureNode("feature", 0, 1, 4),
        FeatureNode("error", 0, 1),
        FeatureNode("feature", 1, 1, 4),
        FeatureNode("other", 1, 1),
        FeatureNode("answer", None, 1),
    ),
    links=tuple(FeatureLink(*link) for link in ((0, 1, 2.0), (1, 3, 0.5), (2, 3, -1.0), (3, 5, 3.0),
                                                (4, 5, 0.25))),
    activations=(None, 1.5, None, 2.5, None, None),
    effects=(None, -1.0, None, 3.0, None, None),
    value=3.0, metric="logit_diff", hook="blocks.0.hook_resid_post", n_loops=2, n_features=9,
    same_features=True,
)  # fmt: skip


def test_a_graph_of_features_is_nodes_of_its_dictionary() -> None:
    made = viewer_graph(FEATURES, ["<a>", "<b>"], answer="<d>")
    ids = {node["node_id"]: node["clerp"] for node in made["nodes"]}
    assert ids == {
        "E_0_1": "embed",
        "0_4_1": "feature 4, loop 0",
        "0_9_1": "error, loop 0",
        "1_4_1": "feature 4, loop 1",
        "1_10_1": "other, loop 1",
        "2_0_1": "<d>",
    }
    assert made["qParams"]["supernodes"] == [["feature 4@1", "0_4_1", "1_4_1"]]
    assert [node["influence"] for node in made["nodes"]] == [None, 1.0, None, 0.75, None, None]
    assert made["links"][2] == {"source": "0_9_1", "target": "1_4_1", "weight": -1.0}
    apart = viewer_graph(replace(FEATURES, same_features=False), ["<a>", "<b>"])
    assert apart["qParams"]["supernodes"] == []
    assert apart["nodes"][-1]["clerp"] == "logit_diff"


@pytest.mark.parametrize("which", [CIRCUIT, FEATURES])
def test_every_field_is_one_of_the_schema_and_has_its_type(which: Circuit | FeatureGraph) -> None:
    graph = json.loads(json.dumps(viewer_graph(which, ["<a>", "<b>", "<c>"], answer="<d>")))
    assert list(graph) == ["metadata", "qParams", "nodes", "links"]
    parts = [("metadata", graph["metadata"])]
    parts += [(name, each) for name in ("nodes", "links") for each in graph[name]]
    for name, part in parts:
        assert set(REQUIRED[name]) <= set(part) <= set(REQUIRED[name] | OPTIONAL[name])
        for field, value in part.items():
            assert isinstance(value, (REQUIRED[name] | OPTIONAL[name])[field]), field
    assert {name: type(value) for name, value in graph["qParams"].items()} == PARAMS


def test_nodes_are_visits_and_components(graph: dict[str, Any]) -> None:
    ids = {node["clerp"]: node["node_id"] for node in graph["nodes"]}
    assert ids == {
        "embed": "E_0_2",
        "loops.0.blocks.0.attn.0": "0_0_2",
        "loops.0.blocks.0.attn.1": "0_1_2",
        "loops.0.blocks.0.mlp": "0_3_2",
        "loops.1.blocks.0.attn.1": "1_1_2",
        "<d>": "2_0_2",
    }
    (last,) = [node for node in graph["nodes"] if node["is_target_logit"]]
    assert (last["feature_type"], last["ctx_idx"]) == ("logit", 2)


def test_links_hold_all_scores_and_shared_inputs_are_shared_out(graph: dict[str, Any]) -> None:
    weights = {(link["source"], link["target"]): link["weight"] for link in graph["links"]}
    assert len(weights) == len(graph["links"])
    assert weights["E_0_2", "0_1_2"] == 0.5 - 1.0
    assert weights["E_0_2", "0_0_2"] == -1.0
    assert weights["0_0_2", "1_1_2"] == 1.25
    assert sum(weights.values()) == sum(SCORES.values())
    known = {node["node_id"] for node in graph["nodes"]}
    assert {end for pair in weights for end in pair} <= known


def test_influence_is_the_share_from_the_top(graph: dict[str, Any]) -> None:
    found = {node["clerp"]: node["influence"] for node in graph["nodes"]}
    assert found["loops.0.blocks.0.mlp"] == pytest.approx(4 / 9)
    assert found["loops.0.blocks.0.attn.1"] == pytest.approx(7 / 9)
    assert found["loops.1.blocks.0.attn.1"] == pytest.approx(1.0)
    assert found["embed"] is None
    assert found["<d>"] is None


def test_a_component_of_several_iterations_is_a_group(graph: dict[str, Any]) -> None:
    assert graph["qParams"]["supernodes"] == [["blocks.0.attn.1", "0_1_2", "1_1_2"]]
    assert graph["qParams"]["pinnedIds"] == ["0_1_2", "1_1_2"]
    assert graph["qParams"]["clickedId"] == "2_0_2"


def test_a_graph_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="needs the tokens of an input, got none"):
        viewer_graph(CIRCUIT, [])


def test_nodes_of_a_circuit_by_position_stand_at_its_tokens() -> None:
    ends = (
        ("embed@0", "loops.0.blocks.0.attn.0-1.k@0"),
        ("embed@1", "loops.0.blocks.0.attn.1.q@1"),
        ("loops.0.blocks.0.attn.0@2", "final@2"),
        ("loops.0.blocks.0.attn.1@1", "loops.0.blocks.0.mlp@1"),
    )
    found = Circuit(
        tuple(Edge(*names) for names in ends), (4.0, 1.0, 2.0, 3.0), CIRCUIT.call, 2, SCHEDULE, 90,
        Positions(3, 2, True),
    )  # fmt: skip
    made = viewer_graph(found, ["<a>", "<b>", "<c>"])
    at = {node["clerp"]: node["ctx_idx"] for node in made["nodes"]}
    assert at["embed@0"] == 0
    assert at["loops.0.blocks.0.attn.0@2"] == at["final@2"] == 2
    names = {node["node_id"]: node["clerp"] for node in made["nodes"]}
    links = {(names[x["source"]], names[x["target"]]): x["weight"] for x in made["links"]}
    assert links["embed@0", "loops.0.blocks.0.attn.0@2"] == 2.0
    assert links["embed@0", "loops.0.blocks.0.attn.1@1"] == 2.0
    assert made["qParams"]["clickedId"] in names
    with pytest.raises(ValueError, match="a token for each of the circuit's 3 positions, got 1"):
        viewer_graph(found, ["<a>"])
