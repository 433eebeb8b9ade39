"""A pytest plugin (`make shapes`) that checks the shapes in signatures while the project runs.

jaxtyping's own import hook wraps every function. This one wraps those whose signatures state a
shape, and the frozen records whose fields do, so that a run takes much less time.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any

import pytest

from annotated import CALLED, CALLS, annotated, states_a_shape, states_shapes_in_fields
from paths import ROOT

CHECKED = ast.parse("__import__('annotated').checked", mode="eval").body


class Checked(ast.NodeTransformer):
    """Decorates what states a shape."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        if states_a_shape(node):
            node.decorator_list.append(CHECKED)
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        if states_shapes_in_fields(node):
            node.decorator_list.insert(0, CHECKED)
        return node


class CheckedLoader(SourceFileLoader):
    """Compiles a module with its checks, without a cache."""

    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        tree = Checked().visit(ast.parse(self.get_data(path), path))
        return compile(ast.fix_missing_locations(tree), path, "exec", dont_inherit=True)


class CheckedFinder(MetaPathFinder):
    """Finds the project's modules for the loader above."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.partition(".")[0] != "loopscope":
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = CheckedLoader(spec.loader.name, spec.loader.path)
        return spec


sys.meta_path.insert(0, CheckedFinder())


def pytest_runtest_setup() -> None:
    """Each test checks the first calls of each function anew."""
    CALLS.clear()


def pytest_testnodedown(node: Any) -> None:
    """Take over which functions a process has called when it ends."""
    CALLED.update(getattr(node, "workeroutput", {}).get("called", ()))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """One process of several hands over what it has called; the run as a whole fails where a
    function that states a shape was not called.
    """
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["called"] = sorted(CALLED)
    elif session.exitstatus == pytest.ExitCode.OK and not_called():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the functions that were not called."""
    for name in not_called():
        terminalreporter.write_line(f"no test with the marker `shapes` calls {name}", red=True)


def not_called() -> list[str]:
    """The functions that state a shape and were not called."""
    return sorted(annotated(ROOT) - CALLED)
