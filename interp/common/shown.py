"""How the records of methods show themselves: as a tidy frame, and on one screen, in a terminal and
in a notebook.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import pandas as pd
from torch import Tensor, nn

_WIDTH, _ITEMS, _ROWS = 88, 4, 16


def tidy(columns: Mapping[str, Tensor], **axes: Iterable[object]) -> pd.DataFrame:
    """A frame with one row per entry of tensors of one shape.

    Args:
        columns: The tensors by the names of their columns.
        axes: The coordinates along each axis, by the names of the first columns.
    """
    rows = pd.MultiIndex.from_product([*axes.values()], names=[*axes])
    values = {name: value.flatten().cpu().numpy() for name, value in columns.items()}
    return pd.DataFrame(values, index=rows).reset_index()


class OneScreen:
    """A record whose repr fits one screen: a tensor is its dtype and shape, and of a long sequence
    the first entries are shown and their number.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "__repr__" not in vars(cls):  # a dataclass writes its own where the class has none
            cls.__repr__ = OneScreen.__repr__  # type: ignore[method-assign]

    def __repr__(self) -> str:
        lines = [
            f"  {each.name}: {short(getattr(self, each.name))}"
            for each in fields(self)  # type: ignore[arg-type]  # every record is a dataclass
        ]
        return "\n".join([type(self).__name__, *lines])

    def _repr_html_(self) -> str:
        """The record in a notebook: its repr, and the first and last rows of its frame."""
        table = self._table()
        shown = "" if table is None else table.to_html(max_rows=_ROWS, border=0)
        return f"<pre>{html.escape(repr(self))}</pre>{shown}"

    def _table(self) -> pd.DataFrame | None:
        """The numbers to show in a notebook; by default those of `frame()`."""
        frame = getattr(self, "frame", None)
        return None if frame is None else frame()


def short(value: object) -> str:
    """A value of a record in one line."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}, {sum(p.numel() for p in value.parameters()):,} parameters"
    if isinstance(value, OneScreen):
        return f"{type(value).__name__}(...)"
    if isinstance(value, tuple | list) and len(value) > _ITEMS:
        first = ", ".join(map(short, value[:_ITEMS]))
        return f"{len(value)} of them: {_cut(first)}, ..."
    return _cut(repr(value))


def _cut(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDTH else f"{line[:_WIDTH]}..."
