"""How far back the attention of an ordinary model's layers sees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loopscope.models.blocks.decoder import DecoderConfig
from loopscope.models.core.config import LoopedConfig


@dataclass(frozen=True, kw_only=True)
class ReachConfig(DecoderConfig):
    """Sizes of a decoder of which some layers may see the last positions only.

    Attributes:
        sliding_window: Positions that a row of such a layer sees, its own included; None where all
            layers see all earlier positions.
        full_layers: The layers that see all earlier positions although `sliding_window` is set, in
            increasing order.
    """

    sliding_window: int | None = None
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        found = self.full_layers if isinstance(self.full_layers, tuple | list) else (None,)
        whole = [x for x in found if type(x) is int and 0 <= x < self.n_layers]
        if len(whole) != len(found) or whole != sorted(set(whole)):
            raise ValueError(
                f"full_layers must be layers in 0..{self.n_layers - 1} in increasing order, got"
                f" {self.full_layers!r:.200}"
            )
        object.__setattr__(self, "full_layers", tuple(whole))

    def reach(self, layer: int) -> int | None:
        """Positions that a row of a layer sees, its own included; None for all before it."""
        return None if layer in self.full_layers else self.sliding_window

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopedConfig:
        if isinstance(values.get("full_layers"), list):
            values = {**values, "full_layers": tuple(values["full_layers"])}
        return super().from_dict(values)
