"""Functions whose signatures state shapes, and which of them a run has called."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from beartype import beartype

from import_graph import modules

SHAPED = {"Float", "Int", "Bool", "Shaped", "Complex", "Num", "Integer", "Inexact"}
CALLED: set[str] = set()


def noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """The checker of `make shapes`: beartype, which also notes in `CALLED` what it has checked."""
    checked, name = beartype(function), f"{function.__module__}.{function.__qualname__}"

    @functools.wraps(checked)
    def noted(*args: Any, **kwargs: Any) -> Any:
        CALLED.add(name)
        return checked(*args, **kwargs)

    return noted


def annotated(root: Path) -> set[str]:
    """The functions with a shape in their signature, by module and qualified name."""
    return {
        f"{name}.{owner}{node.name}"
        for name, path in modules(root).items()
        for node, owner in functions(ast.parse(path.read_text()))
        if states_a_shape(node) and not is_abstract(node)
    }


def functions(node: ast.AST, owner: str = "") -> Iterator[tuple[ast.FunctionDef, str]]:
    """Every function below a node, with the first part of its qualified name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield child, owner
            yield from functions(child, f"{owner}{child.name}.<locals>.")
        elif isinstance(child, ast.ClassDef):
            if "Protocol" not in {ast.unparse(base) for base in child.bases}:
                yield from functions(child, f"{owner}{child.name}.")
        else:
            yield from functions(child, owner)


def states_a_shape(node: ast.FunctionDef) -> bool:
    """Whether an argument or what is returned has a shape."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    stated = [*(each.annotation for each in every), node.returns]
    inside = [part for one in stated if one is not None for part in ast.walk(one)]
    shaped = [part.value for part in inside if isinstance(part, ast.Subscript)]
    return any(isinstance(each, ast.Name) and each.id in SHAPED for each in shaped)


def is_abstract(node: ast.FunctionDef) -> bool:
    """Whether nobody can call it: an abstract method, or one side of an overload."""
    kinds = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
    return bool(kinds & {"abstractmethod", "overload"})
