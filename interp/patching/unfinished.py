"""Partial results of a long sweep, kept in a file so that an interrupted one goes on where it
was.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopscope.interp.common.processes import n_ranks
from loopscope.models.basis.files import atomic_path

_EVERY = 5.0  # seconds between writes


class Unfinished:
    """The cells that are done, by their index.

    Args:
        path: The file; None keeps nothing.
        key: What tells this sweep from others.
        n_metrics, n_examples: The shape of one cell's values.

    Raises:
        ValueError: The file holds something else, or several processes would write it.
    """

    def __init__(self, path: str | Path | None, key: str, n_metrics: int, n_examples: int) -> None:
        self.path = None if path is None else Path(path)
        self.key = key
        self.done: dict[int, Tensor] = {}
        self._written = time.monotonic()
        if self.path is not None and n_ranks() > 1:
            raise ValueError("save_to is for one process; several share the cells in memory only")
        if self.path is not None and self.path.exists():
            self.done = self._read(self.path, (n_metrics, n_examples))

    def add(self, index: int, values: Tensor) -> None:
        """Keep one cell's values, Float[Tensor, "metric batch"]; they are on disk within
        seconds.
        """
        if self.path is None:
            return
        self.done[index] = values.cpu()
        if time.monotonic() - self._written >= _EVERY:
            self.write()

    def write(self) -> None:
        """Write what is done so far, whole or not at all."""
        if self.path is None:
            return
        content = {
            "cells": torch.tensor(list(self.done)),
            "values": torch.stack(list(self.done.values())),
        }
        with atomic_path(self.path) as temporary:
            save_file(content, temporary, metadata={"sweep": self.key})
        self._written = time.monotonic()

    def forget(self) -> None:
        """Remove the file of a sweep that is complete."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _read(self, path: Path, shape: tuple[int, int]) -> dict[int, Tensor]:
        try:
            with safe_open(path, "pt") as file:
                key = (file.metadata() or {}).get("sweep")
                cells, values = (
                    (file.get_tensor(name) for name in ("cells", "values"))
                    if key == self.key
                    else (None, None)
                )
        except SafetensorError as error:
            raise ValueError(
                f"{path} does not hold partial results of a sweep ({error}); choose another file"
            ) from None
        if cells is None or values is None or values.shape[1:] != shape:
            raise ValueError(
                f"{path} holds partial results of another sweep; choose another file, or remove it"
                " to start again"
            )
        return dict(zip(cells.tolist(), values, strict=True))
