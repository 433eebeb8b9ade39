"""The records that figures are drawn from, and the files of a record and its figure."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from torch import Tensor

from loopscope.analyses.common.config_files import MADE_WITH, settings
from loopscope.analyses.common.configs import OutputConfig, RunConfig
from loopscope.analyses.common.figures import FIGURES
from loopscope.models.basis.arguments import Argument, ArgumentError
from loopscope.models.basis.files import atomic_path


@dataclass(frozen=True)
class Record:
    """The base of all records."""

    def frame(self) -> pd.DataFrame:
        """The numbers of the figure, one observation per row."""
        raise NotImplementedError

    def summary(self) -> pd.DataFrame:
        """The few numbers that a reader would quote, for the table under the figure."""
        raise NotImplementedError

    def heading(self) -> str:
        """The input and the answer in words, for the title; empty where the settings say them."""
        return ""


_PICTURES = ("png", "svg", "pdf")


def files_of(name: str, output: OutputConfig) -> list[Path]:
    """The files that an analysis writes for an output config.

    Raises:
        ArgumentError: The folder's name ends as a file's does (`--out lens.pdf`).
    """
    known = ("csv", "json", "html", *_PICTURES)
    asked = output.out.suffix.removeprefix(".").lower()
    if asked in known:
        raise ArgumentError(
            Argument("out"),
            f" names a folder, got {output.out}; for {name}.{asked} in it pass ",
            Argument("out", str(output.out.with_suffix(""))),
            " and ",
            Argument(asked, True),
        )
    kinds = [kind for kind in known if getattr(output, kind)]
    kinds += [each for each in _more(name) if getattr(output, each.rpartition(".")[2])]
    return [output.out / f"{name}.{kind}" for kind in kinds] + [
        output.out / f"{name}.settings.json"
    ]


def _more(name: str) -> dict[str, Callable[[Any], bytes]]:
    """The other files of a figure, by their ending; none for a name that is no figure's."""
    return FIGURES[name].files() if name in FIGURES else {}


def refuse_unwritable(files: Sequence[Path], overwrite: bool) -> None:
    """Raise, before anything is computed, where a file cannot be written.

    Raises:
        FileExistsError: One of the files exists and `overwrite` is False, or is a folder.
        OSError: A folder cannot be made or written into.
    """
    refuse_existing(files, overwrite)
    for path in files:
        if path.is_dir():
            raise FileExistsError(f"{path} is a folder; pass --out with another name")
    for folder in dict.fromkeys(path.parent for path in files):
        there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise OSError(
                f"nothing can be written into {folder} ({error.strerror} at {there}); pass another"
                " --out"
            ) from None


def refuse_existing(files: Sequence[Path], overwrite: bool) -> None:
    """Raise where a file that is to be written is there already.

    Raises:
        FileExistsError: One of them exists and `overwrite` is False.
    """
    there = [path for path in files if path.exists()]
    if there and not overwrite:
        raise FileExistsError(
            f"{there[0]} is there already; pass --overwrite to replace it, or another --out"
        )


def write(
    name: str,
    record: Record,
    figure: go.Figure,
    output: OutputConfig,
    config: RunConfig,
    made_with: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a record, its figure and the settings that made it as the output config says: all files
    or none.

    Args:
        made_with: What else the settings file says: versions, and what was read from checkpoints.

    Returns:
        The files written.

    Raises:
        FileExistsError: One of the files exists, and the output config does not say to replace it.
        ValueError: A picture without kaleido or a browser; nothing is written then.
    """
    files = files_of(name, output)
    refuse_existing(files, output.overwrite)
    told = settings(config) | ({MADE_WITH: dict(made_with)} if made_with else {})
    contents: dict[str, Callable[[], bytes]] = {
        ".csv": lambda: record.frame().to_csv(index=False).encode(),
        ".json": lambda: json.dumps(_plain(record), separators=(",", ":")).encode(),
        ".html": lambda: pio.to_html(figure, include_plotlyjs=True, config=FIGURE_CONFIG).encode(),
        ".settings.json": lambda: (json.dumps(told, indent=1) + "\n").encode(),
        **{f".{kind}": partial(picture, figure, kind) for kind in _PICTURES},
        **{f".{ending}": partial(make, record) for ending, make in _more(name).items()},
    }
    write_all({path: contents[path.name.removeprefix(name)]() for path in files})
    return files


def write_all(contents: Mapping[Path, bytes]) -> None:
    """Write some files, all of them or none: each stands whole beside its place before the first
    one is put there.
    """
    with ExitStack() as drafts:
        for path, content in contents.items():
            drafts.enter_context(atomic_path(path)).write_bytes(content)


def picture(figure: go.Figure, kind: str = "png", width: int = 1100) -> bytes:
    """A figure as a picture: "png", "svg" or "pdf".

    Raises:
        ValueError: kaleido or a browser is missing.
    """
    try:
        image: bytes = pio.to_image(figure, format=kind, width=width, scale=1.5)
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "a picture needs kaleido (pip install 'loopscope[figures]') and a Chromium or Chrome:"
            f" {error}"
        ) from None
    return image


def write_text(path: Path, text: str) -> Path:
    """Write a text file, whole or not at all."""
    write_all({path: text.encode()})
    return path


def markdown_table(frame: pd.DataFrame) -> str:
    """A frame as a table of Markdown, numbers that are not whole with two decimals."""
    rows = [list(map(_cell, row)) for row in frame.itertuples(index=False)]
    return "\n".join(
        f"| {' | '.join(row)} |"
        for row in [list(frame.columns), ["---"] * len(frame.columns), *rows]
    )


def _cell(value: object) -> str:
    return f"{float(value):z.2f}" if isinstance(value, float | np.floating) else str(value)


FIGURE_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    "modeBarButtonsToRemove": ["select2d", "lasso2d"],
}


def _plain(value: Any) -> Any:
    """JSON for a record: tensors as lists, and None for numbers that are not finite."""
    if isinstance(value, type):
        return str(value)
    if dataclasses.is_dataclass(value):
        return _plain({each.name: getattr(value, each.name) for each in dataclasses.fields(value)})
    if isinstance(value, Tensor):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
