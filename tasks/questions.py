"""Questions in the released file format, and the permutation graph that answers them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TOKEN = re.compile(r"<[^<>]*>")


@dataclass(frozen=True)
class Question:
    """One fact to complete: "<e_12><r_3><r_7>" asks for the entity two relations away from e_12.

    Attributes:
        text: The input, tokens joined without spaces.
        answer: The token to predict.
        hops: Relations in the input, counted from its tokens (the files' own `type` labels are offset in places).
    """

    text: str
    answer: str
    hops: int

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> Question:
        """From `{"input_text": ..., "target_text": ...}`; the answer is the last token before `</a>`."""
        text, target = str(item["input_text"]), str(item["target_text"])
        tokens = _TOKEN.findall(target.partition("</a>")[0])
        return cls(text, tokens[-1], sum(token.startswith("<r_") for token in _TOKEN.findall(text)))


def read_questions(path: str | Path) -> list[Question]:
    """All questions of a dataset file (test.json, train.json, ...).

    Raises:
        ValueError: Not a JSON list of items with input_text and target_text.
    """
    try:
        return [Question.from_item(item) for item in json.loads(Path(path).read_text())]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{path} must be a JSON list of items with 'input_text' and 'target_text': {error!r}") from None


def by_hops(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """The questions of each hop count, in order of hops and then of the file."""
    found: dict[int, list[Question]] = {}
    for question in questions:
        found.setdefault(question.hops, []).append(question)
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class PermutationGraph:
    """Every relation is a permutation of the entities: `permutations[r][e]` is the entity that r leads to from e."""

    permutations: tuple[tuple[int, ...], ...]

    @classmethod
    def read(cls, path: str | Path) -> PermutationGraph:
        """From graph.json, `{"permutations": [[...], ...]}`."""
        try:
            rows = json.loads(Path(path).read_text())["permutations"]
            return cls(tuple(tuple(map(int, row)) for row in rows))
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} must be JSON with 'permutations', a list of lists of entities: {error!r}") from None

    def walk(self, text: str) -> list[str]:
        """The entities that a question passes: its head, every intermediate one, and the answer."""
        n_relations, n_entities = len(self.permutations), len(self.permutations[0])
        if not re.fullmatch(r"<e_\d+>(<r_\d+>)*", text):
            raise ValueError(f"a question is an entity and its relations, as in '<e_12><r_3><r_7>', got {text!r}")
        head, *relations = map(int, re.findall(r"\d+", text))
        if head >= n_entities or any(relation >= n_relations for relation in relations):
            raise ValueError(f"this graph has {n_entities} entities and {n_relations} relations, so it does not know {text!r}")
        entities = [head]
        for relation in relations:
            entities.append(self.permutations[relation][entities[-1]])
        return [f"<e_{entity}>" for entity in entities]
