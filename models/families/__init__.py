"""One file per family: its config, its weights, its schedule, and the facts that it declares.

Start with `ouro.py`, the shortest. Every module here is imported with this package, so that its
decorator `family` enters it into the registry; nothing else lists the families. Imports `core` and
`blocks`.
"""

from importlib import import_module
from pkgutil import walk_packages

for _module in walk_packages(__path__, f"{__name__}."):
    import_module(_module.name)
