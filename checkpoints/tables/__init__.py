"""How the releases of each family are read: one table per family."""

from loopscope.checkpoints.hub import Table
from loopscope.checkpoints.tables import (
    albert,
    hrm_text,
    huginn,
    nanbeige,
    ouro,
    parcae,
    retrofit,
    smollm,
    spiral,
    training_free,
)

TABLES: tuple[Table, ...] = (
    albert.TABLE,
    hrm_text.TABLE,
    huginn.TABLE,
    nanbeige.TABLE,
    ouro.TABLE,
    retrofit.LLAMA,
    retrofit.OLMO,
    *training_free.TABLES,
    smollm.TABLE,
    spiral.TABLE,
    parcae.TABLE,
)
