"""The code blocks of a page of docs/, and the desk at which they are run."""

from __future__ import annotations

import io
import re
import shlex
import shutil
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

import loopscope
from language_toys import ouro_folder
from loopscope.analyses.cli import main
from loopscope.models.core.registry import FAMILIES
from loopscope.training.catalog import RECIPES
from shipped_pages import assert_same_page
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
    are forgotten. A block of the language "output" must hold what the block before it prints.
    """
    names: dict[str, Any] = {"__name__": page.stem}
    known = set(FAMILIES)
    fences = re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.S | re.M
    )
    printed = {}
    try:
        for wanted, run in (("python", _run_python), ("sh", _run_commands)):
            for number, (language, code) in enumerate(fences):
                if language == wanted:
                    with redirect_stdout(io.StringIO()) as out:
                        run(code, f"{page.name}, block {number}", names)
                    printed[number] = out.getvalue()
    finally:
        for added in set(FAMILIES) - known:
            del FAMILIES[added]
    for number, (language, shown) in enumerate(fences):
        if language == "output":
            assert_same_page(_words(printed[number - 1]), _words(shown))
    print(*printed.values(), sep="")
    return names


def _run_python(code: str, place: str, names: dict[str, Any]) -> None:
    exec(compile(code, place, "exec", dont_inherit=True), names)


def _run_commands(code: str, place: str, names: dict[str, Any]) -> None:
    for line in code.replace("\\\n", " ").splitlines():
        if line.startswith("loopscope "):
            main(shlex.split(line, comments=True)[1:])


def _words(text: str) -> str:
    return " ".join(text.split())
