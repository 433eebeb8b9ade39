"""Sources of texts: a batch, texts, rows of tokens, a data set, a file of lines."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from loopscope.interp.common.fingerprint import described, facts_of_inputs
from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

_ROWS = 1000  # rows of a data set that are read at a time for its hash


@runtime_checkable
class Table(Protocol):
    """A data set of Hugging Face's `datasets` as far as it is read here."""

    @property
    def column_names(self) -> list[str]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any) -> Any: ...


Sources = Inputs | Table | Path


@dataclass(frozen=True)
class Source:
    """Examples that are read in pieces.

    Attributes:
        count: How many there are.
        digest: A hash of all of them.
        batches: From some examples, as a range, to their inputs.
    """

    count: int
    digest: str
    batches: Callable[[range], Batch]


def source_of(
    model: LoopedModel,
    inputs: Sources,
    readout: ReadoutColumn = None,
    column: str | None = None,
    context: int | None = None,
) -> Source:
    """The examples of any source.

    Args:
        inputs: A `Batch`, texts, tokens, a data set of `datasets`, or the path of a file with one
            example a line (JSON where its name ends with .jsonl, else text).
        readout: The column at which answers are read, for a tensor of tokens; None is the last.
        column: The column of a data set, or the field of a line of JSON, that holds the text or the
            token ids; None where there is only one.
        context: Cuts texts and rows of ids after so many tokens; None leaves them whole.

    Raises:
        KeyError: No such column.
        ValueError: No example, a stream without a length, a file that is not JSON lines, a file's
            name that is no `Path`, a context below 1, or a context or a column of inputs that have
            none.
    """
    _refuse_unused(inputs, column, context)
    if isinstance(inputs, str) and os.path.isfile(inputs):
        raise ValueError(
            f"a str is one text, but {inputs!r} names a file; pass Path({inputs!r}) for its lines"
        )
    if isinstance(inputs, Path):
        return _of_file(model, inputs, column, context)
    if isinstance(inputs, Batch | Tensor):
        last = -1 if isinstance(inputs, Tensor) and readout is None else readout
        batch = as_batch(model, inputs, last)
        digest = described(facts_of_inputs([batch]))
        return Source(len(batch), digest, lambda rows: batch[slice(rows.start, rows.stop)])
    if readout is not None:
        raise ValueError(
            "readout= goes with a tensor of tokens only; texts and rows of ids are read where the"
            " checkpoint says"
        )
    if not isinstance(inputs, str) and hasattr(inputs, "column_names"):
        return _of_table(model, inputs, column, context)
    rows: list[Any] = [inputs] if isinstance(inputs, str) else list(inputs)
    return _of_rows(model, len(rows), lambda at: rows[at.start : at.stop], context)


def _refuse_unused(inputs: Sources, column: str | None, context: int | None) -> None:
    """Raise where an argument would change nothing."""
    if context is not None:
        checked_count(context, "context")
        if isinstance(inputs, Batch | Tensor):
            raise ValueError(
                "context= cuts texts and rows of ids, but a"
                f" {'Batch' if isinstance(inputs, Batch) else 'tensor of tokens'} is not cut; leave"
                " context out, or cut the rows before"
            )
    fields = hasattr(inputs, "column_names") or getattr(inputs, "suffix", None) == ".jsonl"
    if column is not None and not fields:
        raise ValueError(
            "column= names a column of a data set or a field of a .jsonl file, but these inputs are"
            f" of the type {type(inputs).__name__}; leave column out"
        )


def _of_rows(
    model: LoopedModel, count: int, read: Callable[[range], Sequence[Any]], context: int | None
) -> Source:
    """A source whose rows are texts or lists of ids."""
    if not count:
        raise ValueError("at least one example is needed, got none")

    def batches(rows: range) -> Batch:
        found = read(rows)
        ids = [list(row) for row in found] if not isinstance(found[0], str) else []
        ids = ids or model.texts.ids(list(found))
        return model.texts.padded([row[:context] for row in ids])

    digest = hashlib.sha256(repr(context).encode())
    for start in range(0, count, _ROWS):
        for row in read(range(start, min(start + _ROWS, count))):
            plain = row if isinstance(row, str) else [int(token) for token in row]
            digest.update(hashlib.sha256(repr(plain).encode()).digest())
    return Source(count, digest.hexdigest(), batches)


def _of_table(model: LoopedModel, table: Any, column: str | None, context: int | None) -> Source:
    """A source of one column of a data set."""
    if isinstance(table, dict) or not hasattr(table, "__len__"):
        raise ValueError(
            "a data set must be one split with a length; pick one, as in dataset['train'], or save"
            " a stream first"
        )
    name = _column(table.column_names, column)
    return _of_rows(model, len(table), lambda rows: table[rows.start : rows.stop][name], context)


def _column(names: Sequence[str], column: str | None) -> str:
    chosen = names[0] if column is None and len(names) == 1 else column
    if chosen not in names:
        raise KeyError(
            f"column= names the column that holds the text or the token ids, one of"
            f" {', '.join(names)}, got {column!r}"
        )
    return str(chosen)


def _of_file(model: LoopedModel, path: Path, column: str | None, context: int | None) -> Source:
    """A source of the lines of a file; only where they begin is held in memory."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; a source of texts is a file with one a line")
    starts = torch.tensor(list(_starts(path)), dtype=torch.int64, device="cpu")

    def read(rows: range) -> list[Any]:
        with path.open("rb") as file:
            lines = []
            for start in starts[rows.start : rows.stop].tolist():
                file.seek(start)
                lines.append(file.readline().decode().strip())
        return [_field(path, line, column) for line in lines] if json_lines else lines

    json_lines = path.suffix == ".jsonl"
    return _of_rows(model, len(starts), read, context)


def _starts(path: Path) -> Iterator[int]:
    """Where each line begins that is not empty."""
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield start
            start += len(line)


def _field(path: Path, line: str, column: str | None) -> Any:
    """The text or the ids in a line of JSON."""
    try:
        found = json.loads(line)
    except ValueError:
        raise ValueError(f"{path} must hold one JSON value a line, got {line!r:.60}") from None
    return found[_column(list(found), column)] if isinstance(found, dict) else found
