"""The files of a store: safetensors files of one tensor each, written in pieces."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from loopscope.interp.shards.manifest import Manifest

ACTIVATIONS = "activations"
FLOATS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}


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
        self.file, self.shape, self.dtype = file, tuple(shape), dtype
        self._read = dtype.itemsize * math.prod(shape[3:])
        size = self._read * math.prod(shape[:3])
        header = json.dumps(
            {
                "__metadata__": {"call": manifest.call},
                ACTIVATIONS: {
                    "dtype": FLOATS[dtype],
                    "shape": list(shape),
                    "data_offsets": [0, size],
                },
            }
        ).encode()
        header += b" " * (-len(header) % 8)
        file.write(len(header).to_bytes(8, "little") + header)
        self._start = file.tell()
        file.truncate(self._start + size)

    def write(self, loop: int, layer: int, first: int, values: Tensor) -> None:
        """Write the activations of some reads, "read ...", from read `first` on."""
        place = (loop * self.shape[1] + layer) * self.shape[2] + first
        self.file.seek(self._start + place * self._read)
        self.file.write(values.contiguous().view(-1).view(torch.uint8).numpy().data)
