"""The rotary positions in a released config, read by one function for all families."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from loopscope.checkpoints.errors import CheckpointError, shown
from loopscope.checkpoints.fields.config_fields import ConfigFields
from loopscope.models.blocks.rotary import SCALINGS, checked_scaling, kind_of

_OF_ALL = (
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_NESTED = ("rope_parameters", "rope_scaling")
_ORIGINAL = "original_max_position_embeddings"
_STRETCHED = ("dynamic", "yarn")  # the kinds that lengthen what max_position_embeddings says


def rotary(
    fields: ConfigFields,
    n_ctx: int | None,
    *,
    default: float | None = None,
    base: str = "rope_theta",
    partial: bool = False,
) -> dict[str, Any]:
    """Base and scaling of the rotary positions, from all fields that may hold them.

    transformers 5 writes the one field `rope_parameters`; earlier versions write `rope_theta` and
    `rope_scaling`, and many configs hold both forms. What is said twice must be the same.

    Args:
        n_ctx: The longest input that the config names, in tokens.
        default: The base where no field gives one; None where a field must.
        base: The field that the family's own code reads the base from.
        partial: Whether positions may turn a share of the channels, which `turned_share` reads.

    Returns:
        The fields `rope_theta`, `rope_scaling` and `n_ctx` of a `DecoderConfig`.

    Raises:
        CheckpointError: Two fields that contradict each other, a field of the scaling that is not
            read here, or no base.
    """
    if not partial:
        fields.only("partial_rotary_factor", 1.0, None)
    parts = {name: _part(fields, name, partial=partial) for name in _NESTED}
    return _of_parts(fields, parts, n_ctx, default, base)


def turned_share(fields: ConfigFields, name: str, default: float) -> float:
    """The share of each head's channels that rotary positions turn.

    Args:
        name: The field that the family's own code reads it from.
        default: The share where no field gives one.
    """
    found = {key: fields.number(key, None) for key in (name, "partial_rotary_factor")}
    for nested in _NESTED:
        values = fields.mapping(nested, None) or {}
        found[f"{nested}.partial_rotary_factor"] = values.get("partial_rotary_factor")
    share = _agreed(fields, found, "the share of channels that are turned")
    return default if share is None else share


def rotary_by_kind(fields: ConfigFields, n_ctx: int | None) -> dict[str, Any]:
    """Base and scaling of the rotary positions in full layers, and the base in sliding ones, as
    Gemma 3 has them: in two fields of `rope_parameters`, or in the earlier form.

    Returns:
        The fields that `rotary` returns, and `sliding_rope_theta`.
    """
    full: dict[str, Any] = {}
    sliding: dict[str, Any] = {}
    if fields.given("rope_parameters"):
        inner = fields.section("rope_parameters")
        full, sliding = (_part(inner, f"{kind}_attention") for kind in ("full", "sliding"))
        only_kinds(inner)
    if kind_of(sliding) != "default":
        raise CheckpointError(
            f"{fields.path}: rope_parameters.sliding_attention must have the rope_type 'default',"
            f" got {shown(kind_of(sliding))}"
        )
    fields.only("partial_rotary_factor", 1.0, None)
    parts = {"rope_parameters": full, "rope_scaling": _part(fields, "rope_scaling")}
    found = {
        "rope_local_base_freq": fields.number("rope_local_base_freq", None),
        "rope_parameters.sliding_attention.rope_theta": sliding.get("rope_theta"),
    }
    local = _agreed(fields, found, "the base of sliding layers")
    return {
        **_of_parts(fields, parts, n_ctx, 1000000.0, "rope_theta"),
        "sliding_rope_theta": 10000.0 if local is None else local,
    }


def only_kinds(rope: ConfigFields) -> None:
    """Refuse what stands in `rope_parameters` beside the kinds of layers, but for the base and type
    that early versions of transformers 5 write there and do not read.
    """
    rope.only("rope_type", None, "default")
    rope.only("rope_theta", None)
    rope.done()


def _of_parts(
    fields: ConfigFields,
    parts: Mapping[str, Mapping[str, Any]],
    n_ctx: int | None,
    default: float | None,
    base: str,
) -> dict[str, Any]:
    """The result of `rotary`, given the content of both nested fields."""
    theta = _theta(fields, parts, default, base)
    scaling = _scaling(fields, parts)
    fields.unused(_ORIGINAL)  # no kind reads it but those that `_completed` reads it for
    if scaling is not None:
        scaling = _completed(fields, scaling, n_ctx)
    return {
        "rope_theta": theta,
        "rope_scaling": checked_scaling(scaling),
        "n_ctx": _longest(scaling, n_ctx),
    }


def _part(fields: ConfigFields, name: str, *, partial: bool = False) -> dict[str, Any]:
    """The content of a nested field: the base and the scaling's fields, without nulls."""
    values = {k: v for k, v in (fields.mapping(name, None) or {}).items() if v is not None}
    inner = ConfigFields(values, fields.path, inside=name)
    inner.number("rope_theta", None)
    if partial:
        inner.number("partial_rotary_factor", None)
    else:
        inner.only("partial_rotary_factor", 1.0)
    inner.unused(*_OF_ALL, *SCALINGS.get(kind_of(values), ((), ()))[1])
    inner.done()
    return {k: v for k, v in values.items() if k in inner.seen - {"partial_rotary_factor"}}


def _theta(
    fields: ConfigFields,
    parts: Mapping[str, Mapping[str, Any]],
    default: float | None,
    base: str,
) -> float:
    """The one base that all fields give."""
    found = {name: fields.number(name, None) for name in (base, "rope_theta")}
    found |= {f"{name}.rope_theta": part.get("rope_theta") for name, part in parts.items()}
    theta = _agreed(fields, found, "the base of the rotary positions")
    if theta is None:
        return float(fields.number(base)) if default is None else default
    return theta


def _agreed(fields: ConfigFields, found: Mapping[str, Any], what: str) -> float | None:
    """The one number that several fields give; None where none does."""
    given = {name: float(value) for name, value in found.items() if value is not None}
    if not given:
        return None
    (first, number), *others = given.items()
    for name, value in others:
        if value != number:
            raise CheckpointError(
                f"{fields.path}: {first} must be {value}, got {number}; {name} gives {what} too"
            )
    return number


def _scaling(fields: ConfigFields, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """The one scaling that the nested fields give; None where no field gives any."""
    newer, older = (
        {key: value for key, value in parts[name].items() if key != "rope_theta"}
        for name in _NESTED
    )
    if newer and older and _normal(newer) != _normal(older):
        raise CheckpointError(
            f"{fields.path}: rope_scaling must be None or {newer}, got {older}; rope_parameters"
            " gives the rotary positions too"
        )
    return (newer or older) or None


def _normal(values: Mapping[str, Any]) -> dict[str, Any]:
    """A scaling by the newer name of its kind; the default kind has no numbers."""
    kind = kind_of(values)
    numbers = {k: v for k, v in values.items() if k not in ("type", "rope_type")}
    return {"rope_type": kind, **({} if kind == "default" else numbers)}


def _completed(fields: ConfigFields, scaling: dict[str, Any], n_ctx: int | None) -> dict[str, Any]:
    """A scaling with the numbers that transformers takes from other fields.

    These are the length before the scaling, which is `max_position_embeddings` where nothing else
    is said, and yarn's factor.
    """
    needed, known = SCALINGS.get(kind_of(scaling), ((), ()))[0], dict(scaling)
    if _ORIGINAL not in needed:
        return known
    stated = fields.positions(_ORIGINAL, None)
    if kind_of(scaling) == "dynamic":
        stated = n_ctx  # where this kind's own code looks
    if stated is not None and known.get(_ORIGINAL, stated) != stated:
        raise CheckpointError(
            f"{fields.path}: {_ORIGINAL} must be {known[_ORIGINAL]}, as the scaling says, got"
            f" {stated}"
        )
    original = known.setdefault(_ORIGINAL, n_ctx if stated is None else stated)
    if original is None:
        del known[_ORIGINAL]
    elif kind_of(scaling) == "yarn" and n_ctx is not None and _is_number(original):
        known.setdefault("factor", n_ctx / original)
    return known


def _longest(scaling: Mapping[str, Any] | None, n_ctx: int | None) -> int | None:
    """The longest input: a scaling that lengthens the context lengthens it."""
    if n_ctx is None or scaling is None or kind_of(scaling) not in _STRETCHED:
        return n_ctx
    factor: Any = scaling.get("factor")
    original: Any = scaling.get(_ORIGINAL)
    if not _is_number(factor) or not _is_number(original):
        return n_ctx
    return max(n_ctx, int(factor * original))


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0
