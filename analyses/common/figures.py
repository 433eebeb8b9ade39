"""The figures, found by walking the folder: a command is the name of a figure's file, with hyphens.

A figure's file has one class whose name ends with "Config", and the functions `run(config)` and
`figure(record)`. A file that begins with an underscore is a part of another one.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

_FOLDER = Path(__file__).parents[1] / "figures"
_PACKAGE = "loopscope.analyses.figures"


@dataclass(frozen=True)
class FigureFile:
    """One figure.

    Attributes:
        name: Its command.
        room: The folder of its file.
    """

    name: str
    room: str

    @property
    def stem(self) -> str:
        """The name of the file, without its ending."""
        return self.name.replace("-", "_")

    def about(self) -> str:
        """The docstring of the figure's config, read from the source without importing it."""
        source = (_FOLDER / self.room / f"{self.stem}.py").read_text(encoding="utf-8")
        configs = [
            node
            for node in ast.parse(source).body
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
        ]
        return " ".join((ast.get_docstring(configs[0]) or "").split())

    def module(self) -> ModuleType:
        """The figure's code, imported."""
        return import_module(f"{_PACKAGE}.{self.room}.{self.stem}")

    def files(self) -> dict[str, Callable[[Any], bytes]]:
        """The files that only this figure has: the content of each, made of the record, by the
        ending of its name ("page.html" goes with the HTML, "graph.json" with the JSON).
        """
        return dict(getattr(self.module(), "FILES", {}))

    def config(self) -> type:
        """The class of the figure's settings; the figure's code is imported for it."""
        module = self.module()
        configs: list[type] = [
            each
            for name, each in vars(module).items()
            if name.endswith("Config") and each.__module__ == module.__name__
        ]
        return configs[0]


def _found() -> dict[str, FigureFile]:
    rooms = [room.name for room in pkgutil.iter_modules([str(_FOLDER)]) if room.ispkg]
    files = [
        FigureFile(file.name.replace("_", "-"), room)
        for room in rooms
        for file in pkgutil.iter_modules([str(_FOLDER / room)])
        if not file.name.startswith("_")
    ]
    return {file.name: file for file in files}


FIGURES = _found()
"""Every figure by its command, room by room."""
