"""Facts as text: questions and JSON items from token ids, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from tqdm.auto import tqdm

from loopscope.tasks.base import Graph
from loopscope.tasks.facts import FIRST_ENTITY, PAD, FactBatch, first_relation, look_up, words
from loopscope.tasks.questions import Question, by_hops

_WORD = re.compile(r"<[^<>]*>")


def to_questions(facts: FactBatch, graph: Graph, kind: str = "") -> list[Question]:
    """The questions of a batch, in order."""
    word = words(graph.n_entities, graph.n_relations)
    texts = ["".join(word[i] for i in row) for row in facts.tokens.tolist()]
    return [
        Question(text, word[answer], facts.hops, kind)
        for text, answer in zip(texts, facts.answers.tolist(), strict=True)
    ]


def to_facts(
    questions: Sequence[Question], graph: Graph, progress: bool = False
) -> dict[int, FactBatch]:
    """Facts by hop count, in the order of the questions, completed by the graph.

    Args:
        progress: Show a progress bar.

    Raises:
        ValueError: A question that is not an entity and its relations, that the graph does not
            know, or answers differently.
    """
    found = {}
    for hops, group in tqdm(
        by_hops(questions).items(), desc="looking up facts", unit="hop count", disable=not progress
    ):
        rows = to_rows(group, graph.n_entities, graph.n_relations)
        facts = look_up(
            graph, rows[:, 0] - FIRST_ENTITY, rows[:, 1:-1] - first_relation(graph.n_entities)
        )
        wrong = np.flatnonzero(facts.answers != rows[:, -1])
        if wrong.size:
            question, answer = group[wrong[0]], facts.path[wrong[0], -1]
            raise ValueError(
                f"the data answer {question.text!r} with {question.answer}, but the graph with"
                f" <e_{answer}>"
            )
        found[hops] = facts
    return found


def to_rows(
    questions: Sequence[Question], n_entities: int, n_relations: int
) -> Int64[np.ndarray, "fact word"]:
    """Ids of head, relations and answer of questions of one hop count.

    Raises:
        ValueError: A question that is not an entity and at least one relation of this vocabulary,
            with an entity as answer.
    """
    known = words(n_entities, n_relations)[: first_relation(n_entities) + n_relations]
    ids = {word: i for i, word in enumerate(known)}
    rows = _parse(questions, ids, n_entities)
    if rows is None:
        wrong = next(
            question for question in questions if _parse([question], ids, n_entities) is None
        )
        raise ValueError(
            f"a fact is one of {n_entities} entities and at least one of {n_relations} relations,"
            f" with an entity as answer, got {wrong.text!r} with {wrong.answer!r}"
        )
    return rows


def _parse(
    questions: Sequence[Question], ids: Mapping[str, int], n_entities: int
) -> Int64[np.ndarray, "fact word"] | None:
    text = "".join(question.text + question.answer for question in questions)
    found, hops = _WORD.findall(text), questions[0].hops
    if hops < 1 or "".join(found) != text or len(found) != len(questions) * (hops + 2):
        return None
    try:
        rows = np.fromiter(map(ids.__getitem__, found), np.int64, len(found)).reshape(
            len(questions), hops + 2
        )
    except KeyError:
        return None
    is_relation = np.array([False, *[True] * hops, False])
    good = (rows != ids[PAD]) & ((rows >= first_relation(n_entities)) == is_relation)
    return rows if good.all() else None


def write_items(
    path: Path, groups: Mapping[str, FactBatch], graph: Graph, done: Callable[[int], object]
) -> int:
    """Write a JSON list of items, as json.dump would, with the label of its batch as each type.

    Args:
        done: A call that is told, after each batch, how many items were written.

    Returns:
        How many items.
    """
    table = np.array(words(graph.n_entities, graph.n_relations), dtype=np.bytes_)
    count = 0
    with path.open("wb") as file:
        file.write(b"[")
        for kind, facts in groups.items():
            if len(facts):
                file.write((b", " if count else b"") + _items(facts, table, kind))
                count += len(facts)
                done(len(facts))
        file.write(b"]")
    return count


def _items(facts: FactBatch, table: np.ndarray, kind: str) -> bytes:
    """The items of a batch: columns of equal width, from which the filling zeros are deleted."""
    text, answer = (_bytes(table[ids]) for ids in (facts.tokens, facts.answers))
    between = ['{"input_text": "', '", "target_text": "', f'</a>", "type": {json.dumps(kind)}}}, ']
    start, middle, end = (
        np.tile(np.frombuffer(piece.encode(), np.uint8), (len(facts), 1)) for piece in between
    )
    return (
        np.hstack([start, text, middle, text, answer, end])
        .tobytes()
        .translate(None, b"\0")
        .removesuffix(b", ")
    )


def _bytes(column: np.ndarray) -> UInt8[np.ndarray, "fact byte"]:
    return np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1)
