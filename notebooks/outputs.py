"""Run notebooks and store them with their outputs: `python -m notebooks.outputs [NAME ...]`.

Figures are stored as interactive JSON with a static picture beside, which GitHub shows. The
pictures need kaleido and a Chromium or Chrome.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).parent
_COLOURS = 128
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"


def names() -> list[str]:
    """The notebooks, in order."""
    return sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def stored(name: str) -> NotebookNode:
    """A notebook as it is stored."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(name: str, pictures: bool) -> NotebookNode:
    """A notebook after a fresh run from top to bottom in an empty folder.

    Args:
        pictures: Whether each figure also becomes a static picture.
    """
    notebook = stored(name)
    with _environment(pictures), TemporaryDirectory() as place:
        resources = {"metadata": {"path": place}}
        NotebookClient(notebook, timeout=600, resources=resources, record_timing=False).execute()
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _without_bars(output)]
        for figure in figures(cell):
            if PICTURE in figure:
                figure[PICTURE] = lighter(figure[PICTURE])
    return notebook


def texts(cell: NotebookNode) -> list[str]:
    """All that a cell printed as one text, and each text that it showed; figures have none."""
    outputs = cell.get("outputs", [])
    printed = "".join(output.get("text", "") for output in outputs).strip()
    shown = [output.data for output in outputs if "data" in output]
    return [printed, *(data.get("text/plain", "") for data in shown if FIGURE not in data)]


def figures(cell: NotebookNode) -> list[NotebookNode]:
    """The data of a cell's figures, by type."""
    outputs = [output.get("data", {}) for output in cell.get("outputs", [])]
    return [data for data in outputs if FIGURE in data]


def _without_bars(output: NotebookNode) -> bool:
    """Cut the steps of progress bars, which draw themselves over their own line, out of an output;
    whether anything is left.
    """
    if output.get("name") != "stderr":
        return True
    output.text = re.sub(r"\r[^\r\n]*", "", output.text)
    return bool(output.text.strip())


def lighter(picture: str) -> str:
    """A picture in base64 reduced to 128 colours, at a third of the size."""
    small = io.BytesIO()
    full = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    full.quantize(_COLOURS).save(small, "PNG", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


@contextmanager
def _environment(pictures: bool) -> Iterator[None]:
    """The kernel's environment: which forms a figure has."""
    renderer = "plotly_mimetype" + "+png" * pictures
    values = {
        "PLOTLY_RENDERER": renderer,
        "PYTHONWARNINGS": "ignore:IProgress not found",  # tqdm's, where no bar can be shown anyway
        "PYTHONPATH": os.pathsep.join([str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]),
    }
    with patch.dict(os.environ, values):
        yield


def main(chosen: Sequence[str]) -> None:
    """Run the chosen notebooks, by default all, and write each with its outputs."""
    for name in chosen or names():
        path = FOLDER / f"{name}.ipynb"
        nbformat.write(executed(name, pictures=True), path)
        print(f"wrote {path.name}, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
