"""The form of a format, and the parts of a located checkpoint that formats look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loopscope.checkpoints.contents import Contents
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.jsons import read_object, read_section
from loopscope.checkpoints.locate import PUZZLE_CONFIG, CheckpointFiles
from loopscope.checkpoints.pickles import read_pickle
from loopscope.checkpoints.release import ReleaseFacts
from loopscope.checkpoints.tables import TABLES
from loopscope.checkpoints.weight_files import config_file
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig


@dataclass(frozen=True)
class Located:
    """The files of one checkpoint; each file is read once, when a format first asks for it."""

    files: CheckpointFiles

    @cached_property
    def card(self) -> dict[str, Any]:
        """card.json; empty where there is none."""
        return read_object(self.files.card) if self.files.card else {}

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """config.json beside the weights, or else the section of the model in all_config.yaml; None
        where there is neither, or where the file of the weights holds a config.
        """
        path = config_file(self.files.weights)
        if path.is_file():
            return read_object(path) if path != self.files.weights else None
        path = self.files.weights.with_name(PUZZLE_CONFIG)
        return read_section(path, "arch") if path.is_file() else None

    @cached_property
    def pickle(self) -> dict[str, Any] | None:
        """The content of a pickle that lies without config.json; None for other weights.

        The classes that known releases hold are read as inert records.
        """
        if self.files.weights.suffix != ".pt" or self.config is not None:
            return None
        records = tuple(record for table in TABLES for record in table.records)
        return read_pickle(self.files.weights, records)


@dataclass(frozen=True)
class Given:
    """The arguments of `load` that say something about the model.

    Attributes:
        facts: n_heads, input_injection and n_loops; None where the caller says nothing.
        options: The options of a family, by name.
        readout, vocab, ignore, adapter: As in `load`.
    """

    facts: ReleaseFacts
    options: Mapping[str, Any]
    readout: str | None = None
    vocab: str | Path | bool | None = None
    ignore: tuple[str, ...] = ()
    adapter: Path | None = None

    def refuse_options(self, located: Located) -> None:
        """Refuse what only a release takes, in the name of another format."""
        given = {"ignore": self.ignore, "adapter": self.adapter}
        for name in (*self.options, *(name for name, value in given.items() if value)):
            raise CheckpointError(
                f"{located.files.weights}: no {name}= is taken for a checkpoint of this format"
            )


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        is_own: Whether a located checkpoint is of this format; no checkpoint is of two.
        family: The name of the model's family, without loading the weights.
        open: The model, and where answers are read unless the caller or a card says otherwise.
    """

    is_own: Callable[[Located], bool]
    family: Callable[[Located], str]
    open: Callable[[Located, Given], tuple[LoopedModel, str | None]]


def with_loops(cfg: LoopedConfig, n_loops: int | None) -> LoopedConfig:
    """The config with the number of iterations that the caller gave, if any.

    Raises:
        ValueError: A number that no model runs.
    """
    if n_loops is None:
        return cfg
    Contents(0, 0).check(Path("load"), "n_loops", n_loops, "iterations")
    return dataclasses.replace(cfg, n_loops=n_loops)
