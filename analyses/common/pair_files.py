"""Pairs of texts in a CSV or JSONL file, as people keep them for activation patching."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = (".csv", ".jsonl")


@dataclass(frozen=True)
class PairRow:
    """A clean text with what is known beside it.

    Attributes:
        clean: The clean text.
        corrupted: The corrupted text; None where none is given.
        answer: The token that counts as the answer; None where none is given.
        wrong: The token with which the answer is compared; None where none is given.
        where: The place of the pair, for errors: "row 3 of pairs.csv".
    """

    clean: str
    corrupted: str | None = None
    answer: str | None = None
    wrong: str | None = None
    where: str = "the pair"


def read_pairs(path: Path, columns: Sequence[str]) -> list[PairRow]:
    """All pairs of a file.

    Args:
        columns: How the file calls the clean text, the corrupted text, the answer and the wrong
            answer; only the first column must be there.

    Raises:
        ValueError: No rows, no column of clean texts, or a cell that is empty or no text.
    """
    rows = _csv_rows(path) if path.suffix == ".csv" else _jsonl_rows(path)
    if not rows:
        raise ValueError(f"{path} must hold at least one row, got none")
    known = set().union(*rows)
    if columns[0] not in known:
        raise ValueError(
            f"{path} must have a column {columns[0]!r} with the clean texts, got"
            f" {', '.join(sorted(map(str, known)))}; name the columns with --columns"
        )
    names = ("clean", "corrupted", "answer", "wrong")
    kept = [(name, column) for name, column in zip(names, columns, strict=True) if column in known]
    return [_pair(path, number, row, kept) for number, row in enumerate(rows)]


def _pair(
    path: Path, number: int, row: dict[str, Any], columns: Sequence[tuple[str, str]]
) -> PairRow:
    where = f"row {number} of {path.name}"
    for _, column in columns:
        if not isinstance(row.get(column), str) or not row[column]:
            raise ValueError(
                f"{where} must have a text in the column {column!r}, got {row.get(column)!r}"
            )
    return PairRow(**{name: row[column] for name, column in columns}, where=where)


def _csv_rows(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, strict=True))
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid CSV: {error}") from None


def _jsonl_rows(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows = list(map(json.loads, lines))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSONL, one object per line: {error}") from None
    wrong = [row for row in rows if not isinstance(row, dict)]
    if wrong:
        raise ValueError(f"{path} must hold one JSON object per line, got {wrong[0]!r:.60}")
    return rows
