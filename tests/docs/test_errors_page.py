"""docs/errors.md names every class of error that the code makes, and sentences that it holds."""

from __future__ import annotations

import ast
import builtins
import re
from functools import cache

import pytest

from import_graph import modules
from page_blocks import run_page
from paths import DOCS, ROOT

PAGE = DOCS / "errors.md"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
SENTENCES = [(row[0].strip("`"), row[1]) for row in ROWS if len(row) == 3]


def is_error(name: str, own: set[str]) -> bool:
    kind = getattr(builtins, name, None)
    return name in own or (isinstance(kind, type) and issubclass(kind, BaseException))


def text_of(node: ast.expr) -> str:
    """A sentence with … for what changes."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    parts = node.values if isinstance(node, ast.JoinedStr) else []
    return "".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in parts) or "…"


@cache
def made() -> dict[str, list[str]]:
    """The sentences of each class of error, over all packages."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in modules(ROOT).values()]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    own = {n.name for n in nodes if isinstance(n, ast.ClassDef) and _is_public_error(n)}
    found: dict[str, list[str]] = {}
    for node in nodes:
        called = node.func if isinstance(node, ast.Call) else None
        if isinstance(called, ast.Name) and is_error(called.id, own):
            found.setdefault(called.id, []).append("".join(map(text_of, node.args)))
    return found


def _is_public_error(node: ast.ClassDef) -> bool:
    bases = " ".join(map(ast.unparse, node.bases))
    return "Error" in bases and not node.name.startswith("_")


def test_every_class_of_error_is_named() -> None:
    assert {row[0].strip("`") for row in ROWS if len(row) == 2} == set(made())


@pytest.mark.parametrize(("kind", "sentence"), SENTENCES, ids=range(len(SENTENCES)))
def test_a_sentence_is_one_of_the_code(kind: str, sentence: str) -> None:
    pattern = ".*".join(map(re.escape, sentence.split("…")))
    assert any(re.search(pattern, text, flags=re.S) for text in made()[kind])


def test_the_example_shows_the_nearest_names(capsys: pytest.CaptureFixture[str]) -> None:
    run_page(PAGE)
    assert "loops." in capsys.readouterr().out
