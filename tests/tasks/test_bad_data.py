"""Data folders that cannot be read, each for one reason, and the sentence that says it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loopscope.tasks.datasets import read_multi_hop, read_two_hop, write_multi_hop, write_two_hop
from loopscope.tasks.facts import vocabulary
from loopscope.tasks.graphs import PermutationGraph, TableGraph
from loopscope.tasks.multi_hop import make_multi_hop
from loopscope.tasks.questions import Question
from loopscope.tasks.text import to_facts
from loopscope.tasks.two_hop import make_two_hop

PERMUTATION = PermutationGraph.random(11, 3, seed=5)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    write_multi_hop(
        make_multi_hop(PERMUTATION, max_hops=5, train=47, test=13, seed=3), tmp_path / "made"
    )
    return tmp_path / "made"


@pytest.fixture
def made_two_hop(tmp_path: Path) -> Path:
    graph = TableGraph.two_hop(31, 13, out_degree=9, ood_share=0.2, seed=3)
    write_two_hop(make_two_hop(graph, phi=3.0, iid_share=0.05, seed=5), tmp_path / "made_two_hop")
    return tmp_path / "made_two_hop"


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def answered(item: dict[str, str], answer: str) -> dict[str, str]:
    return item | {"target_text": f"{item['input_text']}{answer}</a>"}


def wrong_answer(content: list[dict[str, str]]) -> list[dict[str, str]]:
    right = PERMUTATION.walk(content[-1]["input_text"])[-1]
    return [*content[:-1], answered(content[-1], "<e_0>" if right != "<e_0>" else "<e_1>")]


@pytest.mark.parametrize(
    ("file", "edit", "sentence"),
    [
        (
            "train.json",
            wrong_answer,
            r"the data answer '<e_\d+>(<r_\d>){5}' with <e_[01]>, but the graph with <e_\d+>",
        ),
        (
            "train.json",
            lambda c: [answered(c[0], "<r_1>")],
            r"at least one of 3 relations, .* got '<e_\d+><r_\d>' with '<r_1>'",
        ),
        (
            "test.json",
            lambda c: [c[0] | {"input_text": "<e_11><r_0><r_0>"}],
            "got '<e_11><r_0><r_0>' with",
        ),
        ("test.json", lambda c: [c[0] | {"input_text": "<e_1>"}], "got '<e_1>' with"),
        (
            "test.json",
            lambda c: [c[0] | {"input_text": "<e_1><sep><r_0><r_0>"}],
            "got '<e_1><sep><r_0><r_0>' with",
        ),
        (
            "test.json",
            lambda c: [c[0] | {"input_text": "<e_1> <r_0><r_0>"}],
            "got '<e_1> <r_0><r_0>' with",
        ),
        (
            "test.json",
            lambda c: [c[0] | {"input_text": "<r_1><r_0><e_0>"}],
            "got '<r_1><r_0><e_0>' with",
        ),
        ("test.json", lambda c: 7, r"test\.json must be a JSON list of items"),
        (
            "vocab.json",
            lambda c: c[1:],
            r"vocab\.json must be a JSON list of entities from <e_0>, .*, but its words are others",
        ),
        ("vocab.json", lambda c: {}, "but its words are others"),
        ("vocab.json", lambda c: [*c, "<pad>"], "but its words are others"),
        (
            "vocab.json",
            lambda c: vocabulary(13, 3),
            r"has 13 entities and 3 relations, but graph\.json 11 and 3",
        ),
    ],
)
def test_files_that_contradict_each_other_are_refused(
    file: str, edit: Callable[[Any], Any], sentence: str, made: Path
) -> None:
    change(made / file, edit)
    with pytest.raises(ValueError, match=sentence):
        read_multi_hop(made)


def test_a_vocabulary_that_is_no_json_is_refused(made: Path) -> None:
    (made / "vocab.json").write_text("<e_0>")
    with pytest.raises(ValueError, match=r"vocab\.json must be a JSON list .*is not valid JSON"):
        read_multi_hop(made)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (
            lambda c: [item for item in c if item["type"] != "atomic_facts"],
            "has no graph.json, and no facts of 1 hop in train.json",
        ),
        (lambda c: c[1:], "the same number of relations, at least one, got between 2 and 3"),
        (
            lambda c: [c[0], answered(c[0], "<e_0>"), answered(c[0], "<e_1>"), *c],
            "answers the same fact of 1 hop in two ways",
        ),
    ],
)
def test_a_graph_that_cannot_be_made_of_the_facts_is_refused(
    edit: Callable[[Any], Any], sentence: str, made: Path
) -> None:
    (made / "graph.json").unlink()
    change(made / "train.json", edit)
    with pytest.raises(ValueError, match=sentence):
        read_multi_hop(made)


def of_kind(content: list[dict[str, str]], kind: str) -> list[dict[str, str]]:
    return [item for item in content if item["type"] == kind]


@pytest.mark.parametrize(
    ("file", "edit", "sentence"),
    [
        (
            "test.json",
            lambda c: [c[0] | {"type": "2hop_test"}],
            "must be id_atomic, ood_atomic, .*, got '2hop_test'",
        ),
        (
            "test.json",
            lambda c: [c[0] | {"type": "train_inferred"}],
            r"train_inferred facts have 2 hops, but .* has '<e_\d+><r_\d+>'",
        ),
        (
            "train.json",
            lambda c: [*c, {"input_text": "<e_1><r_1><r_1><r_1>", "target_text": "<e_1></a>"}],
            "has some of 3",
        ),
        (
            "test.json",
            lambda c: (
                of_kind(c, "ood_atomic")
                + [item | {"type": "test_inferred_iid"} for item in of_kind(c, "train_inferred")]
            ),
            "no training fact of 2 hops may be in test_inferred_iid, but 669 of those",
        ),
        (
            "test.json",
            lambda c: [item | {"type": "ood_atomic"} for item in of_kind(c, "id_atomic")],
            "no training fact of 2 hops may use an OOD atom, but 669 of those",
        ),
    ],
)
def test_two_hop_files_that_contradict_each_other_are_refused(
    file: str, edit: Callable[[Any], Any], sentence: str, made_two_hop: Path
) -> None:
    (made_two_hop / "graph.json").unlink()
    change(made_two_hop / file, edit)
    with pytest.raises(ValueError, match=sentence):
        read_two_hop(made_two_hop)


def test_facts_of_an_unknown_relation_are_refused() -> None:
    with pytest.raises(ValueError, match=r"of 11 entities .* got '<e_1><r_3>' with '<e_2>'"):
        to_facts(
            [
                Question("<e_1><r_0>", PERMUTATION.walk("<e_1><r_0>")[-1], 1),
                Question("<e_1><r_3>", "<e_2>", 1),
            ],
            PERMUTATION,
        )
