"""The fields and tensors of a GGUF file, by the package `gguf`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError, shown

SUFFIX = ".gguf"
_INSTALL = "pip install 'loopscope[gguf]' brings it"


class GgufFile:
    """A GGUF file, of which the fields are read at once and each tensor when it is asked for.

    Args:
        path: The file.

    Attributes:
        architecture: llama.cpp's name of the kind of model.
        fields: The kind's fields without its name in front: "block_count", "rope.freq_base", ...

    Raises:
        CheckpointError: A damaged file, or no package `gguf`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._package = _package(path)
        try:
            reader = self._package.GGUFReader(path)
            self._tensors = {each.name: each for each in reader.tensors}
            self.architecture = str(reader.fields["general.architecture"].contents())
            prefix = f"{self.architecture}."
            self.fields: Mapping[str, Any] = {
                name.removeprefix(prefix): field.contents()
                for name, field in reader.fields.items()
                if name.startswith(prefix)
            }
        except Exception as error:  # the package checks little, so a damaged file fails anywhere
            raise CheckpointError(
                f"{path} is damaged or cut short, or is no GGUF file"
                f" ({type(error).__name__}: {error})"
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        """The tensors' names."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, output first."""
        return tuple(int(size) for size in reversed(self._tensors[name].shape))

    def tensor(self, name: str) -> Tensor:
        """A tensor's numbers in float32, whatever its codes are.

        Raises:
            CheckpointError: Codes that the package cannot turn into numbers.
        """
        stored = self._tensors[name]
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                numbers = self._package.dequantize(stored.data, stored.tensor_type)
            return torch.from_numpy(np.array(numbers, dtype=np.float32)).view(self.shape(name))
        except (NotImplementedError, ValueError, TypeError, RuntimeError, IndexError) as error:
            raise CheckpointError(
                f"{self.path}: the codes of {shown(name)}, of the type"
                f" {stored.tensor_type.name}, cannot be turned into numbers: {error}"
            ) from None


def _package(path: Path) -> Any:
    """The package `gguf`."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError(
            f"{path} is a GGUF file, which needs the package gguf; {_INSTALL}"
        ) from None
    return gguf
