"""How the releases of each family are read: one table per family."""

from checkpoints.hub import Table
from checkpoints.tables import ouro

TABLES: tuple[Table, ...] = (ouro.TABLE,)
