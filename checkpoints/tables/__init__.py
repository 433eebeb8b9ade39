"""How the releases of each family are read: one file per family, with one or more tables.

Start with `ouro.py`, the shortest. Every `Table` that a module here holds by a name is found by
itself; nothing else lists the tables, and their order decides nothing, because no release is
recognised by two of them. `llama.py` holds key names that several tables share.
"""

from collections.abc import Iterable
from importlib import import_module
from pkgutil import walk_packages

from loopscope.checkpoints.table import Table


def tables_in(folders: Iterable[str], package: str) -> tuple[Table, ...]:
    """The tables in the modules of a package.

    Args:
        folders: The package's `__path__`.
        package: The package's name.
    """
    return tuple(
        value
        for module in walk_packages(folders, f"{package}.")
        for value in vars(import_module(module.name)).values()
        if isinstance(value, Table)
    )


TABLES: tuple[Table, ...] = tables_in(__path__, __name__)
