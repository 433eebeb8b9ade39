"""Functions whose signatures state shapes, and which of them a run has called."""

from __future__ import annotations

import ast
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from beartype import beartype
from jaxtyping import jaxtyped

from import_graph import modules
from paths import ROOT

SHAPED = {"Float", "Int", "Bool", "Shaped", "Complex", "Num", "Integer", "Inexact"}
CALLED: set[str] = set()
CALLS: Counter[str] = Counter()  # of each function, in the present test
ENOUGH = 30


def checked(what: Any) -> Any:
    """A dataclass whose shapes are checked each time, or a function whose shapes are checked at its
    first calls in each test: a kernel that a method calls thousands of times costs no more then.
    """
    always = jaxtyped(what, typechecker=noting)
    if isinstance(what, type):
        return always
    name = f"{what.__module__}.{what.__qualname__}"

    @functools.wraps(what)
    def at_first(*args: Any, **kwargs: Any) -> Any:
        CALLS[name] += 1
        return (always if CALLS[name] <= ENOUGH else what)(*args, **kwargs)

    return at_first


def noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, which also notes in `CALLED` what it has checked."""
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
            if "Protocol" not in {ast.unparse(base).split("[")[0] for base in child.bases}:
                yield from functions(child, f"{owner}{child.name}.")
        else:
            yield from functions(child, owner)


def states_a_shape(node: ast.FunctionDef) -> bool:
    """Whether an argument or what is returned has a shape."""
    every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    stated = [*(each.annotation for each in every), node.returns]
    return any(one is not None and has_a_shape(one) for one in stated)


def states_shapes_in_fields(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass with a shape in its fields."""
    kinds = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
    fields = [part.annotation for part in node.body if isinstance(part, ast.AnnAssign)]
    return "dataclass" in kinds and any(map(has_a_shape, fields))


def has_a_shape(annotation: ast.AST) -> bool:
    """Whether an annotation holds a shape, written out or by one of the project's names for one."""
    names = {part.id for part in ast.walk(annotation) if isinstance(part, ast.Name)}
    return bool(names & (SHAPED | names_of_shapes()))


@functools.cache
def names_of_shapes() -> frozenset[str]:
    """The names that the project's modules give to shapes, such as `Stream = Float[...]`."""
    return frozenset(
        target.id
        for path in modules(ROOT).values()
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign)
        and SHAPED & {part.id for part in ast.walk(node.value) if isinstance(part, ast.Name)}
        for target in node.targets
        if isinstance(target, ast.Name)
    )


def is_abstract(node: ast.FunctionDef) -> bool:
    """Whether nobody can call it: an abstract method, or one side of an overload."""
    kinds = {ast.unparse(each).rpartition(".")[2] for each in node.decorator_list}
    return bool(kinds & {"abstractmethod", "overload"})
