"""The fields of every looped model's configuration, in TransformerLens's field names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

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
        flat: Whether a call visits pre-LayerNorm blocks and does nothing else, except that it may
            add its input again, so that `unrolled` serves the family.
        TINY: Where the family's `tiny` differs from the common sizes.
    """

    family: ClassVar[str] = ""
    act_fn: ClassVar[str]
    normalization_type: ClassVar[str]
    flat: ClassVar[bool] = False
    TINY: ClassVar[Mapping[str, Any]] = {}
    n_layers: int
    n_loops: int | None = None
    d_model: int
    n_heads: int
    d_head: int = field(init=False)
    d_mlp: int
    d_vocab: int
    n_ctx: int | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("n_layers", "n_loops", "d_model", "n_heads", "d_mlp", "d_vocab", "n_ctx"):
            value = getattr(self, name)
            if value is None and name in ("n_loops", "n_ctx"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
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
    def tiny(cls, **options: Any) -> Self:
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
        for (
            name,
            value,
        ) in given.items():  # before the constructor, whose own types are checked while testing
            if name.startswith(("n_", "d_")) and not isinstance(value, int | None):
                raise ValueError(f"{name} must be an integer, got {value!r}")
        required = [k for k, f in known.items() if f.default is dataclasses.MISSING]
        missing = [k for k in required if k not in given]
        if missing:
            raise ValueError(f"{cls.__name__} needs the field {missing[0]!r}, which was not given")
        return cls(**given)


def _divisors(n: int) -> list[int]:
    return [k for k in range(1, n + 1) if n % k == 0]
