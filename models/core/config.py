"""The fields of every looped model's configuration, in TransformerLens's field names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loopscope.models.basis.fields import MOST_BLOCKS, check_fields, limits
from loopscope.models.core.state import MOST_LOOPS

_TINY: Mapping[str, Any] = {
    "n_layers": 2,
    "n_loops": 3,
    "d_model": 32,
    "n_heads": 4,
    "d_mlp": 24,
    "d_vocab": 19,
    "n_ctx": 16,
}


@dataclass(frozen=True, kw_only=True)
class LoopedConfig:
    """The sizes that all families share. Each family extends it with its own fields.

    Attributes:
        n_layers: Physical blocks in the shared stack (not multiplied by the iterations).
        n_loops: Iterations that the checkpoint records (training R); None where it records none.
        d_model, n_heads, d_head, d_mlp, d_vocab: Widths, in elements.
        n_ctx: The longest input in tokens; None where positions set no limit.
        eps: Added to the variance inside each norm.
        act_fn, normalization_type: Fixed for a family: the MLP's activation, and "LN" or "RMS".
        TINY: Where the family's `tiny` differs from the common sizes.
    """

    family: ClassVar[str] = ""
    act_fn: ClassVar[str]
    normalization_type: ClassVar[str]
    TINY: ClassVar[Mapping[str, Any]] = {}
    n_layers: int = field(metadata=limits(most=MOST_BLOCKS))
    n_loops: int | None = field(default=None, metadata=limits(most=MOST_LOOPS))
    d_model: int
    n_heads: int
    d_head: int = field(init=False)
    d_mlp: int
    d_vocab: int
    n_ctx: int | None = None
    eps: float | int = field(default=1e-5, metadata=limits(least=0))

    def __post_init__(self) -> None:
        check_fields(type(self), vars(self))
        object.__setattr__(self, "d_head", self.width_of_head())

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.n_heads

    def width_of_head(self) -> int:
        """Channels of a head; a family whose config gives them overrides this."""
        if self.d_model % self.n_heads:
            raise ValueError(
                f"n_heads must divide d_model: {self.n_heads} heads do not divide"
                f" d_model={self.d_model}; pass one of {_divisors(self.d_model)}"
            )
        return self.d_model // self.n_heads

    @classmethod
    def tiny(cls, **options: Any) -> LoopedConfig:
        """A config of small sizes, for pages and tests of every family.

        Args:
            options: Fields that are to have another value.
        """
        return cls(**{**_TINY, **cls.TINY, **options})

    def to_dict(self) -> dict[str, Any]:
        """The fields that `from_dict` takes, with the family's name."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        return {"family": self.family, **values}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopedConfig:
        """Build the config from `to_dict`'s output; an unknown or missing key is a ValueError."""
        if values.get("family", cls.family) != cls.family:
            raise ValueError(
                f"{cls.__name__} is of the family {cls.family!r}, got {values['family']!r}"
            )
        given = {k: v for k, v in values.items() if k != "family"}
        known = {f.name: f for f in dataclasses.fields(cls) if f.init}
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ValueError(
                f"{cls.__name__} has no field {unknown[0]!r}; its fields are {sorted(known)}"
            )
        check_fields(cls, given)  # before the constructor, whose types are checked while testing
        required = [k for k, f in known.items() if f.default is dataclasses.MISSING]
        missing = [k for k in required if k not in given]
        if missing:
            raise ValueError(f"{cls.__name__} needs the field {missing[0]!r}, which was not given")
        return cls(**given)


def _divisors(n: int) -> list[int]:
    small = [k for k in range(1, math.isqrt(n) + 1) if n % k == 0]
    return sorted({*small, *(n // k for k in small)})
