"""The form of the code: docstrings, complexity, the size of folders, one class of a name."""

from __future__ import annotations

import ast
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from import_graph import FOLDERS, modules
from paths import ROOT

DOCUMENTED = ast.FunctionDef | ast.ClassDef | ast.Module
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.Assert, ast.IfExp)


@cache
def trees() -> list[tuple[str, ast.Module]]:
    return [
        (name, ast.parse(path.read_text(encoding="utf-8"))) for name, path in modules(ROOT).items()
    ]


def complexity(function: ast.AST) -> int:
    """Paths through a function, with those of comprehensions and boolean operands."""
    total = 1
    for node in ast.walk(function):
        if isinstance(node, ast.comprehension):
            total += 1 + len(node.ifs)
        elif isinstance(node, ast.BoolOp):
            total += len(node.values) - 1
        else:
            total += isinstance(node, BRANCHES)
    return total


def test_complexity_counts_comprehensions_and_operands() -> None:
    source = "def f(x):\n    return [a for a in x if a and a > 1] or (1 if x else 2)"
    assert complexity(ast.parse(source).body[0]) == 1 + 2 + 1 + 1 + 1


def test_docstrings_name_the_noun() -> None:
    texts = [
        (name, ast.get_docstring(node) or "")
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, DOCUMENTED)
    ]
    assert len(texts) > 1500
    assert [(name, text[:60]) for name, text in texts if text.startswith("What ")] == []


def test_few_functions_are_complex() -> None:
    found = {
        f"{name}.{node.name}": complexity(node)
        for name, tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    }
    over = {name: count for name, count in found.items() if count > 10}
    assert len(over) <= len(found) / 100, over


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_two_public_classes_of_a_folder_have_one_name(folder: str) -> None:
    names = [
        node.name
        for name, tree in trees()
        if name.startswith(f"loopscope.{folder}")
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_no_folder_is_crowded() -> None:
    listed = subprocess.run(
        ["git", "ls-files", *FOLDERS, "tests"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    files = [Path(name) for name in listed.stdout.splitlines() if name.endswith(".py")]
    sizes = Counter(path.parent for path in files)
    assert len(files) > 300
    assert {
        str(folder): count
        for folder, count in sizes.items()
        if count > (25 if folder.parts[0] == "tests" else 16)
    } == {}
