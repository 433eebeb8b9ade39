"""Safetensors files that are written piece by piece, so that they may be larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from loopscope.models.basis.cpu_copies import CpuCopies
from loopscope.models.basis.files import atomic_path

_PER_NAME = 512  # bytes of the header that are kept free for each activation
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def entry(dtype: torch.dtype, shape: tuple[int, ...], start: int, size: int) -> dict[str, object]:
    """The header's entry of one tensor, whose `size` bytes begin at `start` of the data."""
    return {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [start, start + size]}


def header_bytes(content: Mapping[str, object], room: int = 0) -> bytes:
    """The header of a file, filled up to at least `room` bytes."""
    header = json.dumps(content).encode()
    size = max(room, len(header) + -len(header) % 8)
    return size.to_bytes(8, "little") + header.ljust(size)


def plain_bytes(value: Tensor) -> memoryview:
    """The numbers of a tensor as they stand in a file."""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


class TensorFile(dict[str, Tensor]):
    """A dictionary whose values go to a file as they are set, and are not kept.

    Args:
        file: An empty file, open for writing.
        names: How many values come at most.
        about: What the file says of itself.
    """

    def __init__(self, file: BinaryIO, names: int, about: Mapping[str, str]) -> None:
        super().__init__()
        self._file, self._room = file, 4096 + _PER_NAME * names
        self._header: dict[str, object] = {"__metadata__": dict(about)}
        self._end = 0
        file.seek(8 + self._room)

    def __setitem__(self, name: str, value: Tensor) -> None:
        data = plain_bytes(value)
        self._header[name] = entry(value.dtype, tuple(value.shape), self._end, len(data))
        self._end += self._file.write(data)

    def finish(self) -> None:
        """Write the header into the room that was kept for it."""
        header = header_bytes(self._header, self._room)
        assert len(header) == 8 + self._room, "a name and its shape fit their share of the header"
        self._file.seek(0)
        self._file.write(header)


@contextmanager
def kept_in(
    to: str | Path | None, names: int, about: Mapping[str, str]
) -> Iterator[dict[str, Tensor]]:
    """A dictionary for the activations of one run; where `to` is a path, it writes them to a file
    that appears whole when the `with` block ends without an error. Where it is "cpu", the values
    are there when the block ends.

    Args:
        names: How many activations come at most.
        about: What the file says of itself.
    """
    if to is None:
        yield {}
        return
    if to == "cpu":
        copies = CpuCopies()
        yield copies
        copies.finish()
        return
    with atomic_path(to) as temporary, temporary.open("wb") as file:
        content = TensorFile(file, names, about)
        yield content
        content.finish()
