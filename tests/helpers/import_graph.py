"""The import graph of the project, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

FOLDERS = ("models", "checkpoints", "tasks", "training", "interp", "analyses")
ALLOWED: dict[str, set[str]] = {
    "tasks": set(),
    "models": set(),
    "checkpoints": {"tasks", "models"},
    "interp": {"models"},
    "training": {"tasks", "models", "checkpoints", "interp"},
    "analyses": set(FOLDERS),
}
DOOR = ("loopscope", "loopscope.__main__", "loopscope._one_name", "loopscope.plots")
Arrow = tuple[str, str]


def modules(root: Path) -> dict[str, Path]:
    """Our modules by the one name under which each is imported."""
    inside = [path for folder in FOLDERS for path in (root / folder).rglob("*.py")]
    named = {module_name(Path("loopscope") / path.relative_to(root)): path for path in inside}
    door = {module_name(path.relative_to(root)): path for path in (root / "loopscope").glob("*.py")}
    return {**door, **named}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows(root: Path) -> set[Arrow]:
    """Every import of one of our modules by another, also inside functions and by relative names.

    Imports for the type checker alone do not count.
    """
    files = modules(root)
    found = set()
    for name, path in files.items():
        for target in imports_of(path, name):
            ours = target if target in files else target.rpartition(".")[0]
            if ours in files and ours != name:
                found.add((name, ours))
    return found


def imports_of(path: Path, name: str) -> Iterator[str]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in executed(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            (what, *_) = node.args
            if isinstance(what, ast.Constant):
                yield str(what.value)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, without what only the type checker sees."""
    for child in ast.iter_child_nodes(node):
        for_checker = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)
        for kept in child.orelse if for_checker else [child]:
            yield kept
            yield from executed(kept)


def folder_of(module: str) -> str:
    """The top-level folder of a module; empty for the door itself."""
    return "" if module in DOOR else module.split(".")[1]


def forbidden(found: set[Arrow]) -> list[str]:
    """The arrows between folders that are not allowed, with the modules that make them."""
    below = {"loopscope._one_name"}  # which each folder imports
    return sorted(
        f"{source} -> {target}"
        for source, target in found
        if folder_of(source)
        and target not in (below | {"loopscope"} if folder_of(source) == "analyses" else below)
        and folder_of(target) not in ALLOWED[folder_of(source)] | {folder_of(source)}
    )


def cycle(edges: set[Arrow]) -> list[str]:
    """One cycle of a graph, or an empty list."""
    graph: dict[str, set[str]] = {}
    for source, target in edges:
        graph.setdefault(source, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def room_of(module: str) -> str:
    """The folder inside a top-level folder, or the module that stands beside those."""
    return ".".join(module.split(".")[:3])


def room_cycle(found: set[Arrow]) -> list[str]:
    """A cycle of rooms; a folder's own `__init__` stands outside them."""
    inside = {
        (room_of(a), room_of(b)) for a, b in found if {a.count("."), b.count(".")} <= {2, 3, 4, 5}
    }
    return cycle({(a, b) for a, b in inside if a != b})
