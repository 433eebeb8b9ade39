"""The amount of weights in a checkpoint, to compare with the sizes that a config promises.

Sizes are compared with the weights before anything of these sizes is made, so that a wrong size
costs neither time nor memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from loopscope.checkpoints.errors import CheckpointError

Kind = Literal["layers", "width", "iterations", "positions"]
_MOST_ITERATIONS, _MOST_POSITIONS = 1024, 2**31 - 1


@dataclass(frozen=True)
class Contents:
    """The amount of weights in a file.

    Attributes:
        keys: Number of tensors.
        elements: Numbers in all tensors together.
    """

    keys: int
    elements: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Contents:
        """The amount of some tensors."""
        return cls(len(tensors), sum(tensor.numel() for tensor in tensors.values()))

    def check(self, path: Path, name: str, value: int, kind: Kind) -> None:
        """Refuse a size that no model with these weights can have.

        Args:
            path: The file of the config, for messages.
            name: The name of the size in that file.
            kind: "layers" have at least one tensor each, a "width" has at least one element per
                unit; "iterations" and "positions" need no weights and have fixed bounds.
        """
        bounds = {
            "layers": (self.keys, f"as the weights are {self.keys} tensors"),
            "width": (self.elements, f"as the weights have {self.elements} elements"),
            "iterations": (_MOST_ITERATIONS, "as more iterations are never run"),
            "positions": (_MOST_POSITIONS, "as positions are counted in 32 bits"),
        }
        most, why = bounds[kind]
        if value > most:
            raise CheckpointError(f"{path}: {name} must be at most {most}, got {value}, {why}")

    def check_ours(self, path: Path, values: Mapping[str, Any]) -> None:
        """Refuse the sizes in a config of the project's own field names that the weights cannot
        have.
        """
        for name, value in values.items():
            if isinstance(value, int) and name.startswith(("n_", "d_", "head_dim")):
                self.check(path, name, value, _kind(name))


def _kind(name: str) -> Kind:
    """The kind of one of the project's own size fields."""
    if name.endswith("_loops"):
        return "iterations"
    if name == "n_ctx":
        return "positions"
    return "layers" if name.endswith(("_layers", "_groups", "_streams")) else "width"
