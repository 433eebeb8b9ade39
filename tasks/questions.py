"""Questions in the released file format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from loopscope.tasks.jsons import read_json

_RELATION = re.compile(r"<r_[^<>]*>")
_LAST_TOKEN = re.compile(r".*(<[^<>]*>)", re.DOTALL)


@dataclass(frozen=True)
class Question:
    """One fact to complete: "<e_12><r_3><r_7>" asks for the entity two relations away from e_12.

    Attributes:
        text: The input, tokens joined without spaces.
        answer: The token to predict.
        hops: Relations in the input, counted from its tokens (the files' own `type` labels are
            offset in places).
        kind: The file's label, such as "test_inferred_ood"; empty where it has none. Equality of
            questions leaves the label out.
    """

    text: str
    answer: str
    hops: int
    kind: str = field(default="", compare=False)

    @classmethod
    def from_item(cls, item: dict[str, Any]) -> Question:
        """From `{"input_text": ..., "target_text": ...}`; the answer is the last token of the form
        `<...>` before `</a>`, or what follows the input where it is a token of another form.
        """
        text, target = item["input_text"], item["target_text"]
        if not isinstance(text, str) or not isinstance(target, str):
            raise ValueError(f"input_text and target_text must be text, got {text!r}, {target!r}")
        told = target.partition("</a>")[0].removeprefix(text)
        last = _LAST_TOKEN.match(told)
        answer = last[1] if last else told
        if not answer:
            raise ValueError(f"a target must hold a token before </a>, got {target!r}")
        return cls.of(text, answer, str(item.get("type", "")))

    @classmethod
    def of(cls, text: str, answer: str, kind: str = "") -> Question:
        """The question of a text, whose hops are counted."""
        return cls(text, answer, len(_RELATION.findall(text)), kind)

    def to_item(self) -> dict[str, str]:
        """The file format's item; the inverse of `from_item`."""
        return {
            "input_text": self.text,
            "target_text": f"{self.text}{self.answer}</a>",
            "type": self.kind,
        }


def read_questions(path: str | Path, progress: bool = False) -> list[Question]:
    """All questions of a dataset file (test.json, train.json, ...).

    Args:
        progress: Show a progress bar.

    Raises:
        ValueError: Not a JSON list of items with input_text and target_text.
    """
    rule = f"{path} must be a JSON list of items with 'input_text' and 'target_text'"
    try:
        items = read_json(path)
        if not isinstance(items, list) or not items:
            raise ValueError("got an empty list" if items == [] else f"got {type(items).__name__}")
        return [
            Question.from_item(item)
            for item in tqdm(
                items, desc=f"reading {Path(path).name}", unit="fact", disable=not progress
            )
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{rule}: {error}") from None


def by_hops(questions: Sequence[Question]) -> dict[int, list[Question]]:
    """The questions of each hop count, in order of hops and then of the file."""
    found: dict[int, list[Question]] = {}
    for question in questions:
        found.setdefault(question.hops, []).append(question)
    return dict(sorted(found.items()))
