"""Folders in the released format: what each file holds, that reading undoes writing, and what is
refused.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from loopscope.checkpoints.locate import SHIPPED
from loopscope.tasks import datasets, text
from loopscope.tasks.datasets import (
    read_multi_hop,
    read_two_hop,
    read_vocabulary,
    write_multi_hop,
    write_two_hop,
)
from loopscope.tasks.facts import FactBatch
from loopscope.tasks.graphs import PermutationGraph, TableGraph, read_graph
from loopscope.tasks.multi_hop import MultiHopData, make_multi_hop
from loopscope.tasks.questions import by_hops, read_questions
from loopscope.tasks.text import to_facts, to_questions
from loopscope.tasks.two_hop import TEST_GROUPS, TwoHopData, make_two_hop

MULTI_FILES = [
    "graph.json",
    "test.json",
    "test_small.json",
    "train.json",
    "valid.json",
    "vocab.json",
]
TWO_FILES = ["graph.json", "test.json", "train.json", "valid.json", "vocab.json"]
PERMUTATION, RANDOM = PermutationGraph.random(11, 3, seed=5), TableGraph.random(11, 3, seed=5)


def small(graph: PermutationGraph | TableGraph = PERMUTATION) -> MultiHopData:
    return make_multi_hop(graph, max_hops=5, train=47, test=13, seed=3)


def small_two_hop() -> TwoHopData:
    return make_two_hop(
        TableGraph.two_hop(31, 13, out_degree=9, ood_share=0.2, seed=3),
        phi=3.0,
        iid_share=0.05,
        seed=5,
    )


def items(path: Path) -> list[dict[str, str]]:
    content: list[dict[str, str]] = json.loads(path.read_text())
    return content


def change(path: Path, edit: Callable[[Any], Any]) -> None:
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def batches(data: MultiHopData | TwoHopData) -> Iterator[tuple[str, FactBatch]]:
    if isinstance(data, MultiHopData):
        yield "atomic", data.atomic
        yield from (
            (f"{kind} {hops}", facts)
            for kind in ("train", "test")
            for hops, facts in getattr(data, kind).items()
        )
    else:
        yield from (
            ("id", data.id_atomic),
            ("ood", data.ood_atomic),
            ("train", data.train_inferred),
            *data.test.items(),
        )


def plain(data: MultiHopData | TwoHopData) -> dict[str, tuple[list[list[int]], list[list[int]]]]:
    return {name: (facts.rows.tolist(), facts.path.tolist()) for name, facts in batches(data)}


# The multi-hop files


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[MultiHopData, Path, dict[str, int]]:
    """Large enough for every cap: 2321 atomic facts, 2003 to train on, 57 to test on."""
    data = make_multi_hop(PermutationGraph.random(211, 11), max_hops=4, train=2003, test=57)
    folder = tmp_path_factory.mktemp("data") / "multi_hop"
    return data, folder, write_multi_hop(data, folder)


def test_the_files_hold_as_many_of_each_type_as_the_release(
    large: tuple[MultiHopData, Path, dict[str, int]],
) -> None:
    _, folder, counts = large
    kinds = {name: Counter(item["type"] for item in items(folder / name)) for name in counts}
    tests = {f"{hops}hop_test": 57 for hops in (2, 3, 4)}
    assert sorted(path.name for path in folder.iterdir()) == MULTI_FILES
    assert kinds["train.json"] == {
        "atomic_facts": 2321,
        "2hop_train": 2003,
        "3hop_train": 2003,
        "4hop_train": 2003,
    }
    assert kinds["test.json"] == {
        **tests,
        "atomic_facts": 2000,
        "2hop_train": 2000,
        "3hop_train": 2000,
        "4hop_train": 2000,
    }
    assert kinds["test_small.json"] == {"2hop_test": 50, "3hop_test": 50, "4hop_test": 50}
    assert (folder / "valid.json").read_bytes() == (folder / "test.json").read_bytes()
    assert counts == {name: sum(kind.values()) for name, kind in kinds.items()}


def test_the_files_are_those_that_json_would_write(
    large: tuple[MultiHopData, Path, dict[str, int]],
) -> None:
    for path in large[1].iterdir():
        assert path.read_text() == json.dumps(json.loads(path.read_text()))


def test_items_are_tokens_without_spaces_and_the_label_tells_the_hops(
    large: tuple[MultiHopData, Path, dict[str, int]],
) -> None:
    data, folder, _ = large
    words = set(json.loads((folder / "vocab.json").read_text()))
    for item in items(folder / "test.json"):
        assert list(item) == ["input_text", "target_text", "type"]
        tokens = re.findall(r"<[^>]+>", item["target_text"])
        assert "".join(tokens) == item["target_text"]
        assert set(tokens) <= words
        assert (
            item["target_text"]
            == f"{item['input_text']}{data.graph.walk(item['input_text'])[-1]}</a>"
        )
        assert (
            item["type"] == "atomic_facts"
            if len(tokens) == 4
            else item["type"].startswith(f"{len(tokens) - 3}hop_")
        )


def test_tests_and_what_is_trained_on_are_told_apart_by_the_label(
    large: tuple[MultiHopData, Path, dict[str, int]],
) -> None:
    trained = {item["input_text"] for item in items(large[1] / "train.json")}
    assert all(
        (item["input_text"] in trained) != item["type"].endswith("_test")
        for item in items(large[1] / "test.json")
    )


# Reading what was written


@pytest.mark.parametrize("graph", [PERMUTATION, RANDOM], ids=["permutation", "random"])
@pytest.mark.parametrize("with_graph", [True, False])
def test_reading_undoes_writing(
    graph: PermutationGraph | TableGraph, with_graph: bool, tmp_path: Path
) -> None:
    data = small(graph)
    write_multi_hop(data, tmp_path / "first")
    if not with_graph:
        (tmp_path / "first" / "graph.json").unlink()
    again = read_multi_hop(tmp_path / "first")
    assert again.graph == graph
    assert plain(again) == plain(data)
    write_multi_hop(again, tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first") | {
        "graph.json": json.dumps(graph.as_dict()).encode()
    }


@pytest.mark.parametrize("with_graph", [True, False])
def test_reading_undoes_writing_two_hop_data(with_graph: bool, tmp_path: Path) -> None:
    data = small_two_hop()
    counts = write_two_hop(data, tmp_path / "first")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == TWO_FILES
    assert counts["train.json"] == 279 + 669
    if not with_graph:
        (tmp_path / "first" / "graph.json").unlink()
    again = read_two_hop(tmp_path / "first")
    assert again.graph == data.graph
    assert plain(again) == plain(data)
    write_two_hop(again, tmp_path / "second")
    assert contents(tmp_path / "second") == contents(tmp_path / "first") | {
        "graph.json": json.dumps(data.graph.as_dict()).encode()
    }


def test_two_hop_files_hold_their_groups(tmp_path: Path) -> None:
    data = small_two_hop()
    write_two_hop(data, tmp_path / "made")
    kinds = {
        name: Counter(item["type"] for item in items(tmp_path / "made" / f"{name}.json"))
        for name in ("train", "test", "valid")
    }
    assert kinds["train"] == {"id_atomic": 223, "ood_atomic": 56, "train_inferred": 669}
    assert kinds["test"] == {name: len(facts) for name, facts in data.test.items()}
    assert kinds["valid"] == {"test_inferred_ood": len(data.test["test_inferred_ood"])}
    assert list(kinds["test"]) == list(TEST_GROUPS)


def test_two_hop_data_without_ood_atoms_are_read(tmp_path: Path) -> None:
    data = make_two_hop(
        TableGraph.two_hop(31, 13, out_degree=9, ood_share=0.0), phi=3.0, iid_share=0.0
    )
    write_two_hop(data, tmp_path / "made")
    (tmp_path / "made" / "graph.json").unlink()
    assert plain(read_two_hop(tmp_path / "made")) == plain(data)


def test_a_released_folder_is_read_whatever_its_labels(tmp_path: Path) -> None:
    data = small()
    write_multi_hop(data, tmp_path / "made")
    (tmp_path / "made" / "graph.json").unlink()

    def relabel(content: list[dict[str, str]]) -> list[dict[str, str]]:
        hops = [item["input_text"].count("<r_") for item in content]
        return [
            item | {"type": "atomic" if k == 1 else f"{k - 2}hop_train"}
            for item, k in zip(content, hops, strict=True)
        ]

    change(tmp_path / "made" / "train.json", relabel)
    change(tmp_path / "made" / "vocab.json", lambda words: ["<pad>", *words])
    assert plain(read_multi_hop(tmp_path / "made")) == plain(data)


def test_questions_and_facts_are_each_others_inverse() -> None:
    for name, facts in batches(small()):
        questions = to_questions(facts, PERMUTATION, kind=name)
        (again,) = to_facts(questions, PERMUTATION).values()
        assert again.rows.tolist() == facts.rows.tolist()
        assert {question.kind for question in questions} == {name}
    assert to_facts([], PERMUTATION) == {}


def test_the_shipped_questions_are_read_as_facts() -> None:
    folder = SHIPPED / "ltg_trained"
    graph, questions = read_graph(folder / "graph.json"), read_questions(folder / "test.json")
    facts = to_facts(questions, graph)
    assert (
        read_vocabulary(folder / "vocab.json") == (graph.n_entities, graph.n_relations) == (30, 10)
    )
    assert list(facts) == list(range(1, 15))
    for hops, group in by_hops(questions).items():
        assert to_questions(facts[hops], graph) == group
        assert facts[hops].path.tolist() == [
            [int(entity[3:-1]) for entity in graph.walk(question.text)] for question in group
        ]


# All or nothing, into a new folder


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_multi_hop(small(), folder),
        lambda folder: write_two_hop(small_two_hop(), folder),
    ],
)
def test_a_folder_with_something_in_it_is_refused_and_left(
    write: Callable[[Path], object], tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    write(tmp_path / "made")  # an empty folder is taken
    assert len(list((tmp_path / "made").iterdir())) >= 5
    before = contents(tmp_path / "made")
    with pytest.raises(
        ValueError,
        match=(
            r"into a new or empty folder, but .*made is a folder that is not empty; name"
            r" another one"
        ),
    ):
        write(tmp_path / "made")
    with pytest.raises(ValueError, match=r"but .*vocab\.json is a file"):
        write(tmp_path / "made" / "vocab.json")
    assert contents(tmp_path / "made") == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_an_error_on_the_way_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = iter([text.write_items])

    def fail_the_second_time(*args: Any) -> int:
        for write in writers:
            return write(*args)
        raise OSError("the disk is full")

    monkeypatch.setattr(datasets, "write_items", fail_the_second_time)
    with pytest.raises(OSError, match="the disk is full"):
        write_multi_hop(small(), tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
