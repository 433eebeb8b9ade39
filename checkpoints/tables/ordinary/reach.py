"""Which layers of a released ordinary model see the last positions only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fields.config_fields import ConfigFields

_WINDOW = 4096  # transformers' default for Mistral, Qwen2, Qwen3, Gemma 2 and Gemma 3
_KINDS = ("full_attention", "sliding_attention")


def reach(fields: ConfigFields, n_layers: int, usually_full: Sequence[int]) -> dict[str, Any]:
    """The fields `sliding_window` and `full_layers` of a `ReachConfig`. A window of null, unlike a
    field that is absent, says that there is none.

    Args:
        usually_full: The layers that see all earlier positions where no field `layer_types` says
            which do.

    Raises:
        CheckpointError: A list of layer types that does not fit.
    """
    window = fields.positions("sliding_window", None) if "sliding_window" in fields else _WINDOW
    full = tuple(usually_full)
    kinds = fields.texts("layer_types", None)
    if kinds is not None:
        if len(kinds) != n_layers or not set(kinds) <= set(_KINDS):
            raise CheckpointError(
                f"{fields.path}: layer_types must name {n_layers} layers, each"
                f" {' or '.join(map(repr, _KINDS))}, got {shown(kinds)}"
            )
        full = tuple(layer for layer, kind in enumerate(kinds) if kind == _KINDS[0])
    return {"sliding_window": None if len(full) == n_layers else window, "full_layers": full}
