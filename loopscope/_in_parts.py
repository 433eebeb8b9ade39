"""Packages of which loopscope uses a small part, imported without what the rest of them imports."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from threading import RLock
from types import ModuleType

_LOCK = RLock()


class PackageInParts(ModuleType):
    """A package whose `__init__` has not run yet: a name that it takes from one of its modules is
    found there, and the first use of any other name runs the `__init__`.

    Classes and functions are the package's own, so `isinstance` and `is` hold. `_homes` gives the
    module of such a name, and the name in that module (empty for the module itself).
    """

    _homes: dict[str, tuple[str, str]]

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name not in self._homes:
            self._run()
            return ModuleType.__getattribute__(self, name)
        module, own = self._homes[name]
        found = import_module(module)
        return getattr(found, own) if own else found

    def __setattr__(self, name: str, value: object) -> None:
        own = self._homes.get(name, ("", ""))[1]
        if not own or not isinstance(value, ModuleType):  # a class may have its module's name
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        self._run()
        return dir(self)

    def _run(self) -> None:
        """Run the `__init__`; the package is an ordinary one from then on."""
        with _LOCK:
            if type(self) is ModuleType or "_running" in vars(self):
                return
            assert self.__spec__ is not None, "made from a spec"
            assert self.__spec__.loader is not None, "a package with an __init__"
            vars(self)["_running"] = True
            try:
                self.__spec__.loader.exec_module(self)
            finally:
                del vars(self)["_running"]
            self.__class__ = ModuleType  # type: ignore[assignment]  # mypy knows no way back


def import_in_parts(*packages: str) -> None:
    """Let the first import of some packages, parents first, import only what is asked of them. What
    is imported already stays as it is.
    """
    for name in packages:
        if name in sys.modules:
            continue
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            return  # the import that needs it says so
        package = module_from_spec(spec)
        tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
        vars(package)["_homes"] = dict(_homes(name, tree))
        package.__class__ = PackageInParts
        sys.modules[name] = package
        parent, _, own = name.rpartition(".")
        if parent:
            vars(sys.modules[parent])[own] = package


def _homes(package: str, init: ast.Module) -> Iterator[tuple[str, tuple[str, str]]]:
    """The names that an `__init__` imports from its own package, with module and name there."""
    for line in init.body:
        if not isinstance(line, ast.ImportFrom):
            continue
        module = line.module or ""
        if line.level == 1:
            module = f"{package}.{module}".rstrip(".")
        if line.level > 1 or not f"{module}.".startswith(f"{package}."):
            continue
        for alias in line.names:
            home = (f"{package}.{alias.name}", "") if module == package else (module, alias.name)
            yield alias.asname or alias.name, home
