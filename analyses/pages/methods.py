"""The table of all methods: written from the list of public calls and their docstrings."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import pandas as pd

import loopscope
from loopscope.analyses.common.records import markdown_table, write_text

_HEAD = """# Methods

Written by `loopscope methods`. This page has one line for each public call, from its docstring; the
[reference](reference/index.md) has all arguments and an example.

A method is a function of a model, imported from `loopscope`. Its usual arguments are:

* inputs: texts, a `Batch` from `model.encode`, or tokens with `readout=` (the position at which the
  answer is read);
* `n_loops`: the number of iterations; None means the number that the checkpoint records.

It returns a [result object](glossary.md#result-object-record) with `frame()`, a pandas table. If a
method cannot serve a family, it raises a ValueError that says why; [families](families.md) lists
all of these.

Several processes can share a call in two ways. Under `accelerate launch`, `activation_patch` shares
its cells among the processes, and the lenses share their examples. Each process returns the whole
result, so all of them must make the same calls. Independent processes take `shard=(i, n)` and write
to one folder: see [work that outgrows one process](scale.md)."""


def run() -> dict[str, pd.DataFrame]:
    """The public calls of each room of `loopscope.interp`, with what they do and return."""
    rooms: dict[str, list[tuple[str, ...]]] = {}
    for name, home in loopscope._HOME.items():
        if home.startswith("loopscope.interp."):
            rooms.setdefault(home.split(".")[2], []).append(_row(name))
    columns = ["call", "what it does", "returns", "source"]
    return {room: pd.DataFrame(rows, columns=columns) for room, rows in rooms.items()}


def page() -> str:
    """The page: one table for each room."""
    parts = [_HEAD]
    for room, rows in run().items():
        about = (inspect.getdoc(import_module(f"loopscope.interp.{room}")) or "").partition("\n\n")[
            0
        ]
        parts += [f"## {room}", " ".join(about.split()), _linked(markdown_table(rows), room)]
    return "\n\n".join(parts) + "\n"


def write(path: Path) -> Path:
    """Write the page."""
    return write_text(path, page())


def _linked(table: str, room: str) -> str:
    """A table whose calls are links to their sections of the reference."""

    def link(row: re.Match[str]) -> str:
        return f"| [`{row[1]}`](reference/{room}.md#{row[1].lower()}) |"

    return re.sub(r"^\| `(\w+)` \|", link, table, flags=re.M)


def _row(name: str) -> tuple[str, str, str, str]:
    call = getattr(loopscope, name)
    text = inspect.getdoc(call) or ""
    source = re.search(r"^Source:\s+(.*?)(?:\n\n|\Z)", text, flags=re.S | re.M)
    returns = "" if inspect.isclass(call) else _returned(call)
    cells = (f"`{name}`", text.partition("\n\n")[0], returns, source[1] if source else "")
    return tuple(" ".join(cell.replace("|", "\\|").split()) for cell in cells)  # type: ignore[return-value]


def _returned(call: object) -> str:
    """The annotation of what a call returns; "a context" for a context manager."""
    written = str(inspect.signature(call).return_annotation)  # type: ignore[arg-type]
    return "a context" if written.startswith("Iterator") else f"`{written}`"
