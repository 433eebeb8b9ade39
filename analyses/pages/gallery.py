"""Every figure, drawn from the shipped checkpoints and logs, on one page of Markdown with pictures
beside it.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Callable
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.records import Record, markdown_table, picture, write_all
from loopscope.analyses.standalone import make
from loopscope.checkpoints.load import save
from loopscope.models.core.registry import build
from loopscope.models.families.ouro import OuroConfig

_ROWS = 12  # of a figure's table
_HEAD = """# Gallery

Written by `loopscope gallery` from the shipped checkpoints and the logs of their training: one
figure for each command, with its numbers. Every command takes other checkpoints by name, file
or folder, and writes its figure as HTML, PNG, SVG or PDF. The commands that run an input take one
of yours (`--text`, or `--clean` and `--corrupted`). From Python each figure is a function of a
loaded model, a name or a path, such as `loopscope.plots.lens(model, text="...")`. Numbers of
figures in brackets are those of arXiv 2604.07822 unless another paper is named. The
[glossary](glossary.md) explains the words."""


@dataclass(frozen=True)
class Entry:
    """One figure of the gallery.

    Attributes:
        name: The command.
        settings: What differs from its defaults.
        note: What the reader should know of the input; empty where the shipped checkpoints are it.
    """

    name: str
    settings: dict[str, Any]
    note: str = ""

    @property
    def command(self) -> str:
        """The command line of the entry."""
        words = ["loopscope", self.name]
        for key, value in self.settings.items():
            flag = () if key == "checkpoint" else (f"--{key.replace('_', '-')}",)
            values = value if isinstance(value, tuple) else (value,)
            words += [*flag, *map(str, values)]
        return shlex.join(words)


@dataclass(frozen=True)
class Pictured:
    """An entry with its record and its figure."""

    entry: Entry
    record: Record
    image: bytes


def entries(toy: Path) -> list[Entry]:
    """One entry for each command, in their order.

    Args:
        toy: A folder with a model that has an exit gate, which no shipped checkpoint has.
    """
    gate = Entry(
        "exit-gate",
        {"checkpoint": str(toy), "tokens": (5, 7, 11, 13, 2, 3)},
        "No trained model with an exit gate is shipped: this is a small random Ouro, so only the"
        " form of the figure means something.",
    )
    text = Entry("readouts", {"checkpoint": "mini/smiles", "text": "CC(=O)Nc1ccc(O)cc"})
    board = Entry("sudoku", {"checkpoint": "mini/sudoku/trm6"})
    others = {each.name: each for each in (gate, text, board)}
    return [others.get(name) or Entry(name, {}) for name in FIGURES]


def make_toy(folder: Path) -> None:
    """Write a small random Ouro whose gate is neither open nor shut."""
    torch.manual_seed(0)
    model = build(OuroConfig(n_layers=2, n_loops=6, d_model=32, n_heads=4, d_mlp=48, d_vocab=29))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0 if parameter.ndim > 1 else 1.0)
    save(model, folder, {"readout": "last_real"})


def draw(progress: bool = True) -> list[Pictured]:
    """Run every command with its settings and draw its figure."""
    with tempfile.TemporaryDirectory() as place, chdir(place):
        toy = Path("ouro")  # the page shows the path, which is to be the same each time
        make_toy(toy)
        return [
            draw_one(entry) for entry in tqdm(entries(toy), desc="gallery", disable=not progress)
        ]


def draw_one(entry: Entry) -> Pictured:
    """Run one command with its settings and draw its figure."""
    file = FIGURES[entry.name]
    made = make(file, file.config()(**entry.settings))
    return Pictured(entry, made.record, picture(made.figure))


def page(drawn: list[Pictured], images: str) -> str:
    """The page; `images` is where the pictures lie, seen from it."""
    return "\n\n".join([_HEAD, *(_section(one, images) for one in drawn)]) + "\n"


def _section(one: Pictured, images: str) -> str:
    file = FIGURES[one.entry.name]
    section = getattr(file.module(), "SECTION", None)
    parts = [
        f"## {one.entry.name}",
        file.about(),
        one.entry.note,
        f"`{one.entry.command}`",
        f"![{one.entry.name}]({images}/{one.entry.name}.png)",
        f"How to read it: {section.look_for}" if section else "",
        markdown_table(one.record.summary().head(_ROWS)),
    ]
    return "\n\n".join(part for part in parts if part)


def write(path: Path, draw_all: Callable[[], list[Pictured]] = draw) -> Path:
    """Draw everything, and write the page and its pictures into a folder of the page's name."""
    drawn = draw_all()
    folder = path.with_suffix("")
    pictures = {folder / f"{one.entry.name}.png": one.image for one in drawn}
    write_all({**pictures, path: page(drawn, folder.name).encode()})
    return path
