"""How the releases of each family are read: one file per family, with one or more tables.

Start with `ouro.py`, the shortest. Every `Table` that a module here holds by a name is found by
itself; nothing else lists the tables, and their order decides nothing, because no release is
recognised by two of them. `llama.py` holds key names that several tables share.
"""

from importlib import import_module
from pkgutil import iter_modules

from loopscope.checkpoints.table import Table

TABLES: tuple[Table, ...] = tuple(
    value
    for module in iter_modules(__path__, f"{__name__}.")
    for value in vars(import_module(module.name)).values()
    if isinstance(value, Table)
)
