"""Data sets as folders in the released format: train.json, test.json, valid.json, vocab.json, and
our graph.json.

An item of a file is `{"input_text": "<e_12><r_3>", "target_text": "<e_12><r_3><e_99></a>", "type":
"atomic_facts"}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tqdm.auto import tqdm

from loopscope.tasks.base import ABSENT, Graph
from loopscope.tasks.facts import (
    FIRST_ENTITY,
    PAD,
    SPECIAL,
    FactBatch,
    first_relation,
    is_among,
    no_facts,
    vocabulary,
)
from loopscope.tasks.files import new_folder
from loopscope.tasks.graphs import PermutationGraph, TableGraph, from_table, read_graph
from loopscope.tasks.jsons import read_json
from loopscope.tasks.multi_hop import MultiHopData
from loopscope.tasks.questions import Question, read_questions
from loopscope.tasks.text import to_facts, to_rows, write_items
from loopscope.tasks.two_hop import TEST_GROUPS, TwoHopData, uses_ood

_LARGE, _SMALL = 2000, 50
_Groups = Mapping[str, FactBatch]


def write_multi_hop(
    data: MultiHopData, folder: str | Path, progress: bool = False
) -> dict[str, int]:
    """Write a multi-hop data set as the released files and graph.json, all or none of them.

    test.json has all test facts, up to 2000 atomic ones and up to 2000 training facts of each hop
    count. test_small.json has 50 test facts of each hop count, and valid.json equals test.json. The
    labels are right; in the released train.json the labels are two hops too low.

    Returns:
        How many facts each file holds.

    Raises:
        ValueError: The folder is there and not empty.
    """
    tests = {f"{hops}hop_test": facts for hops, facts in data.test.items()}
    trains = {
        "atomic_facts": data.atomic,
        **{f"{hops}hop_train": facts for hops, facts in data.train.items()},
    }
    asked = tests | _first(_LARGE, trains)
    files: dict[str, _Groups] = {
        "train.json": trains,
        "test.json": asked,
        "test_small.json": _first(_SMALL, tests),
        "valid.json": asked,
    }
    return _write(folder, data.graph, files, progress)


def write_two_hop(data: TwoHopData, folder: str | Path, progress: bool = False) -> dict[str, int]:
    """Write a two-hop data set as the released files and graph.json, all or none of them.

    train.json has all atomic facts and the inferred ones to train on; test.json the test groups;
    valid.json the OOD group of them.

    Returns:
        How many facts each file holds.

    Raises:
        ValueError: The folder is there and not empty.

    Source:
        The composition notebook of arXiv 2405.15071.
    """
    train = {
        "id_atomic": data.id_atomic,
        "ood_atomic": data.ood_atomic,
        "train_inferred": data.train_inferred,
    }
    valid = {"test_inferred_ood": data.test["test_inferred_ood"]}
    return _write(
        folder,
        data.graph,
        {"train.json": train, "test.json": data.test, "valid.json": valid},
        progress,
    )


def read_multi_hop(folder: str | Path, progress: bool = False) -> MultiHopData:
    """Read a multi-hop data set. Hops are counted from the tokens; a fact of train.json is no test.

    Without graph.json the graph is made of the facts of 1 hop in train.json.

    Args:
        progress: Show progress bars.

    Raises:
        ValueError: Files that are not of the format, or contradict each other.
    """
    folder = Path(folder)
    trained, asked = (
        read_questions(folder / "train.json", progress),
        read_questions(folder / "test.json", progress),
    )
    graph = _graph(folder, trained)
    train, test = to_facts(trained, graph, progress), to_facts(asked, graph, progress)
    atomic = train.pop(1, no_facts(graph, 1))
    test.pop(1, None)
    new = {
        hops: facts[~is_among(facts, train[hops])] if hops in train else facts
        for hops, facts in test.items()
    }
    return MultiHopData(
        graph, atomic, train, {hops: facts for hops, facts in new.items() if len(facts)}
    )


def read_two_hop(folder: str | Path, progress: bool = False) -> TwoHopData:
    """Read a two-hop data set, with the test groups that test.json names.

    Without graph.json the graph is made of the facts of 1 hop in train.json, and those that
    test.json calls ood_atomic are OOD.

    Args:
        progress: Show progress bars.

    Raises:
        ValueError: Files that are not of the format, or contradict each other.
    """
    folder = Path(folder)
    trained, groups = (
        read_questions(folder / "train.json", progress),
        _test_groups(folder / "test.json"),
    )
    hops = {question.hops for question in trained}
    if hops - {1, 2}:
        raise ValueError(
            f"two-hop data have facts of 1 and 2 hops, but {folder / 'train.json'} has some of"
            f" {max(hops)}"
        )
    graph = _graph(folder, trained, groups["ood_atomic"])
    if isinstance(graph, PermutationGraph):
        graph = TableGraph(graph.rows)
    train = {1: no_facts(graph, 1), 2: no_facts(graph, 2)} | to_facts(trained, graph)
    tests = {
        name: to_facts(group, graph).get(_hops_of(name), no_facts(graph, _hops_of(name)))
        for name, group in groups.items()
    }
    for name, wrong in {
        "use an OOD atom": uses_ood(graph, train[2]).any(1),
        "be in test_inferred_iid": is_among(train[2], tests["test_inferred_iid"]),
    }.items():
        if wrong.any():
            raise ValueError(
                f"no training fact of 2 hops may {name}, but {wrong.sum():,} of those in"
                f" {folder} do"
            )
    is_ood = uses_ood(graph, train[1])[:, 0]
    return TwoHopData(graph, train[1][~is_ood], train[1][is_ood], train[2], tests)


def read_vocabulary(path: str | Path) -> tuple[int, int]:
    """The numbers of entities and relations of a vocab.json, with or without <pad>.

    Raises:
        ValueError: Not the entities, the relations and the special tokens in this order.
    """
    rule = (
        f"{path} must be a JSON list of entities from <e_0>, relations from <r_0>, then"
        f" {' '.join(SPECIAL)}, in this order"
    )
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{rule}: {error}") from None
    found = [str(word) for word in content] if isinstance(content, list) else []
    n_entities, n_relations = (
        sum(word.startswith(start) for word in found) for start in ("<e_", "<r_")
    )
    expected = vocabulary(n_entities, n_relations)
    if found not in (expected, [PAD, *expected]):
        raise ValueError(f"{rule}, but its words are others")
    return n_entities, n_relations


def _graph(
    folder: Path, trained: Sequence[Question], ood: Sequence[Question] = ()
) -> PermutationGraph | TableGraph:
    sizes = read_vocabulary(folder / "vocab.json")
    if (folder / "graph.json").exists():
        graph = read_graph(folder / "graph.json")
        if (graph.n_entities, graph.n_relations) != sizes:
            raise ValueError(
                f"{folder / 'vocab.json'} has {sizes[0]} entities and {sizes[1]} relations, "
                f"but graph.json {graph.n_entities} and {graph.n_relations}"
            )
        return graph
    atoms = [question for question in trained if question.hops == 1]
    if not atoms:
        raise ValueError(
            f"{folder} has no graph.json, and no facts of 1 hop in train.json to make the graph of"
        )
    heads, relations, tails = _triples(atoms, *sizes)
    table = np.full(sizes[::-1], ABSENT)
    table[relations, heads] = tails
    if (table[relations, heads] != tails).any():
        raise ValueError(f"{folder / 'train.json'} answers the same fact of 1 hop in two ways")
    graph = from_table(table)
    return (
        TableGraph(graph.rows, tuple(sorted(map(tuple, _triples(ood, *sizes)[:2].T.tolist()))))
        if ood
        else graph
    )


def _triples(
    atoms: Sequence[Question], n_entities: int, n_relations: int
) -> Int64[np.ndarray, "3 fact"]:
    """Head, relation and tail of facts of 1 hop, counted from 0."""
    firsts = np.array([FIRST_ENTITY, first_relation(n_entities), FIRST_ENTITY])
    triples: Int64[np.ndarray, "3 fact"] = (to_rows(atoms, n_entities, n_relations) - firsts).T
    return triples


def _test_groups(path: Path) -> dict[str, list[Question]]:
    groups: dict[str, list[Question]] = {name: [] for name in TEST_GROUPS}
    for question in read_questions(path):
        if question.kind not in groups:
            raise ValueError(
                f"the types in {path} must be {', '.join(TEST_GROUPS)}, got {question.kind!r}"
            )
        if question.hops != _hops_of(question.kind):
            raise ValueError(
                f"{question.kind} facts have {_hops_of(question.kind)} hops, but {path} has"
                f" {question.text!r} among them"
            )
        groups[question.kind].append(question)
    return groups


def _hops_of(group: str) -> int:
    return 1 if group.endswith("atomic") else 2


def _first(count: int, groups: _Groups) -> dict[str, FactBatch]:
    return {kind: facts[:count] for kind, facts in groups.items()}


def _write(
    folder: str | Path, graph: Graph, files: Mapping[str, _Groups], progress: bool
) -> dict[str, int]:
    total = sum(len(facts) for groups in files.values() for facts in groups.values())
    counts = {}
    with (
        new_folder(folder) as temporary,
        tqdm(total=total, desc="writing", unit="fact", disable=not progress) as bar,
    ):
        (temporary / "vocab.json").write_text(
            json.dumps(vocabulary(graph.n_entities, graph.n_relations))
        )
        graph.write(temporary / "graph.json")
        for name, groups in files.items():
            counts[name] = write_items(temporary / name, groups, graph, bar.update)
    return counts
