"""The code blocks of a page of docs/, and the desk at which they are run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest

import loopscope
from language_toys import ouro_folder
from loopscope.analyses.cli import main
from loopscope.models.core.registry import FAMILIES
from loopscope.training.trainer import RECIPES
from tiny_run import TINY

FOLDERS = ("path/to/Ouro-1.4B", "path/to/my-ouro")  # what the pages call a user's own folders


def blocks(page: Path, language: str = "python") -> list[str]:
    """The fenced blocks of one language, in order."""
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def lay_out(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put what the pages name into a folder, and work there: two language models, a release that
    was fetched, and a recipe that ends at once.
    """
    for folder in FOLDERS:
        shutil.copytree(ouro_folder(), desk / folder)
    monkeypatch.chdir(desk)
    monkeypatch.setitem(loopscope.__dict__, "fetch", lambda name: desk / FOLDERS[0])
    monkeypatch.setitem(RECIPES, "mini/multi_hop/r2", TINY)


def run_page(page: Path) -> dict[str, Any]:
    """Run a page's Python from top to bottom, then its `loopscope` commands; families that it adds
    are forgotten.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    known = set(FAMILIES)
    try:
        for number, block in enumerate(blocks(page)):
            place = f"{page.name}, block {number}"
            exec(compile(block, place, "exec", dont_inherit=True), names)
    finally:
        for added in set(FAMILIES) - known:
            del FAMILIES[added]
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("loopscope "):
                main(shlex.split(line, comments=True)[1:])
    return names
