"""What every analysis returns: a frozen record with tidy numbers, and how records and figures are written."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from torch import Tensor

from analyses.configs import OutputConfig
from models.files import atomic_path


@dataclass(frozen=True)
class Record:
    """The base of all records."""

    def frame(self) -> pd.DataFrame:
        """The numbers of the figure, one observation per row."""
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """The few numbers that a reader would quote, for the table under the figure."""
        raise NotImplementedError


def write(name: str, record: Record, figure: go.Figure, output: OutputConfig) -> list[Path]:
    """Write a record and its figure as the output config says, each file whole or not at all.

    Returns:
        The files written.
    """
    image = _image(figure) if output.png else None
    texts = {
        ".csv": record.frame().to_csv(index=False) if output.csv else None,
        ".json": json.dumps(_plain(record), separators=(",", ":")) if output.json else None,
        ".html": pio.to_html(figure, include_plotlyjs=True, config=FIGURE_CONFIG) if output.html else None,
    }
    written = [write_text(output.out / (name + suffix), text) for suffix, text in texts.items() if text is not None]
    if image is not None:
        with atomic_path(output.out / f"{name}.png") as temporary:
            temporary.write_bytes(image)
        written.append(output.out / f"{name}.png")
    return written


def _image(figure: go.Figure) -> bytes:
    try:
        image: bytes = pio.to_image(figure, format="png", width=1100, scale=1.5)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"a picture needs kaleido (pip install 'loopscope[dev]') and a Chromium or Chrome: {error}") from None
    return image


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a table of Markdown, numbers that are not whole with two decimals."""
    rows = [list(map(_cell, row)) for row in frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(frame.columns), ["---"] * len(frame.columns), *rows])


def _cell(value: object) -> str:
    return f"{float(value):.2f}".replace("-0.00", "0.00") if isinstance(value, float | np.floating) else str(value)


FIGURE_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["select2d", "lasso2d"]}


def _plain(value: Any) -> Any:
    """JSON for a record: tensors as lists, what is not a number as null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool) or value is None else str(value)
