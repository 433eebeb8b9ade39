"""The files of a store: safetensors files of one tensor each, written in pieces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from loopscope.interp.shards.manifest import Manifest
from loopscope.models.basis.tensor_files import entry, header_bytes, plain_bytes

ACTIVATIONS = "activations"
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def file_of(folder: Path, item: int, label: str) -> Path:
    """The file of one group, or of the tokens, for one range of examples."""
    return folder / f"{item:07d}.{label}.safetensors"


class Slab:
    """A tensor "loop layer read ..." in a safetensors file that is written read by read, so that it
    never stands in memory as a whole.

    Args:
        file: An empty file, open for writing.
        shape: Of the whole tensor.
    """

    def __init__(
        self, file: BinaryIO, shape: Sequence[int], dtype: torch.dtype, manifest: Manifest
    ) -> None:
        self.file, self.shape = file, tuple(shape)
        self._read = dtype.itemsize * math.prod(shape[3:])
        size = self._read * math.prod(shape[:3])
        about = {"call": manifest.call}
        content = {"__metadata__": about, ACTIVATIONS: entry(dtype, self.shape, 0, size)}
        file.write(header_bytes(content))
        self._start = file.tell()
        file.truncate(self._start + size)

    def write(self, loop: int, layer: int, first: int, values: Tensor) -> None:
        """Write the activations of some reads, "read ...", from read `first` on."""
        place = (loop * self.shape[1] + layer) * self.shape[2] + first
        self.file.seek(self._start + place * self._read)
        self.file.write(plain_bytes(values))
