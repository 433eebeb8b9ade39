"""Which patches a sweep makes: its cells, chosen by site, iteration, layer, position and head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import coordinate, is_site, site_of

HEAD_AXIS = {
    "attn.hook_q": 2,
    "attn.hook_k": 2,
    "attn.hook_v": 2,
    "attn.hook_z": 2,
    "attn.hook_rot_q": 2,
    "attn.hook_rot_k": 2,
}
HEAD_AXIS |= {"attn.hook_attn_scores": 1, "attn.hook_pattern": 1}
_KEYS_AND_VALUES = ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k")
Together = Literal["loops", "positions"]


@dataclass(frozen=True)
class Cell:
    """One patch.

    Attributes:
        name: The hook point; of a patch at several iterations the first.
        site: What the caller called it, or its full name where that could be several; outside the
            loop's one stack with the stage before it ("prelude.resid_pre").
        loop, layer: Where it is; None where the site has no such coordinate, or all of the chosen
            iterations are patched together.
        position: The column that is replaced (the query position for scores and patterns); None
            where several are together.
        head: The head that is replaced; None for all of the site.
        also: The hook points patched together with `name`, at later iterations.
        positions: The columns, where several are patched together.
    """

    name: str
    site: str
    loop: int | None
    layer: int | None
    position: int | None
    head: int | None
    also: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every hook point that is patched, in the order of the schedule."""
        return (self.name, *self.also)

    @property
    def columns(self) -> tuple[int, ...]:
        """Every column that is patched, in increasing order."""
        return self.positions if self.position is None else (self.position,)


@dataclass(frozen=True, kw_only=True)
class Places:
    """What a caller chose to patch; the fields are those of `activation_patch`."""

    sites: tuple[str, ...]
    positions: Literal["all"] | Sequence[int] = "all"
    heads: Literal["all"] | Sequence[int] | None = None
    loops: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    together: tuple[Together, ...] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        wrong = [word for word in self.together if word not in ("loops", "positions")]
        if wrong:
            raise ValueError(f"together names 'loops' or 'positions', got {wrong[0]!r}")
        if self.window is not None and (self.window < 1 or "loops" in self.together):
            raise ValueError(
                "window is a number of iterations, at least 1, and excludes together='loops', got"
                f" {self.window} and {self.together}"
            )


@dataclass(frozen=True)
class _Column:
    """A site at one layer (or at none): its hook points by iteration."""

    site: str
    label: str
    layer: int | None
    names: tuple[tuple[int | None, str], ...]


def choose(model: LoopedModel, n_loops: int, width: int, places: Places) -> list[Cell]:
    """The cells that a caller chose, in the order of the schedule.

    Raises:
        KeyError: A site that this model does not have.
        ValueError: A position, head, loop or layer out of range, or nothing left.
    """
    names = model.hook_names(n_loops)
    _check_sites(names, places.sites)
    kept_loops = in_range("loops", places.loops, n_loops)
    kept_layers = in_range(
        "layers",
        places.layers,
        1 + max(layer for _, layer in map(place_of, names) if layer is not None),
    )
    positions = in_range("positions", places.positions, width)
    labels = _labels(names, places.sites)
    columns: dict[tuple[str, str, int | None], list[tuple[int | None, str]]] = {}
    for name in (name for name in names if any(is_site(name, site) for site in places.sites)):
        loop, layer = place_of(name)
        if not _kept(loop, places.loops, kept_loops) or not _kept(
            layer, places.layers, kept_layers
        ):
            continue
        columns.setdefault((stage_of(name), site_of(name), layer), []).append((loop, name))
    cells = []
    for (stage, site, layer), found in columns.items():
        heads: list[int] | list[None] = [None]
        if places.heads is not None and site in HEAD_AXIS:
            heads = in_range(
                "heads",
                places.heads,
                model.cfg.kv_heads if site in _KEYS_AND_VALUES else model.cfg.n_heads,
            )
        column = _Column(
            site, f"{stage}.{labels[site]}" if stage else labels[site], layer, tuple(found)
        )
        cells += [
            cell
            for group in _groups(column, places)
            for cell in _at_positions(column, group, positions, heads, places)
        ]
    if not cells:
        raise ValueError(
            f"no cell is left: the sites {list(places.sites)} do not occur at loops={places.loops},"
            f" layers={places.layers}"
        )
    order = {name: i for i, name in enumerate(names)}
    return sorted(cells, key=lambda cell: order[cell.name])


def in_range(what: str, wanted: Literal["all"] | Sequence[int] | None, count: int) -> list[int]:
    """The chosen indices below `count`; None and "all" are all of them."""
    chosen = list(range(count)) if wanted is None or wanted == "all" else [int(w) for w in wanted]
    outside = [w for w in chosen if not 0 <= w < count]
    if outside:
        raise ValueError(f"{what} must be in 0..{count - 1}, got {outside[0]}")
    return chosen


def place_of(name: str) -> tuple[int | None, int | None]:
    """The iteration and the layer in a hook name; None where it has none."""
    place = coordinate(name)
    loop = place[0] if place and isinstance(place[0], int) else None
    return loop, place[-1] if len(place) > 1 and isinstance(place[-1], int) else None


def stage_of(name: str) -> str:
    """What else says where a hook point is, besides iteration and layer: "prelude", "coda", or
    "low.1" of nested cycles.
    """
    place = coordinate(name)
    between = place[isinstance(place[0], int) : -1] if place else ()
    return ".".join(map(str, between))


def _kept(place: int | None, wanted: Sequence[int] | None, kept: list[int]) -> bool:
    return wanted is None if place is None else place in kept


def _groups(column: _Column, places: Places) -> Iterator[tuple[tuple[int | None, str], ...]]:
    """The hook points that one cell patches: one, all iterations together, or a window of them."""
    inside = all(loop is not None for loop, _ in column.names)
    if inside and "loops" in places.together:
        yield column.names
    elif inside and places.window is not None:
        size = min(places.window, len(column.names))
        yield from (column.names[i : i + size] for i in range(len(column.names) - size + 1))
    else:
        yield from ((each,) for each in column.names)


def _at_positions(
    column: _Column,
    group: tuple[tuple[int | None, str], ...],
    positions: list[int],
    heads: list[int] | list[None],
    places: Places,
) -> Iterator[Cell]:
    loop = None if "loops" in places.together else group[0][0]
    first, *also = (name for _, name in group)
    if "positions" in places.together:
        columns = tuple(sorted(set(positions)))
        yield from (
            Cell(first, column.label, loop, column.layer, None, head, tuple(also), columns)
            for head in heads
            if columns
        )
        return
    for position, head in product(positions, heads):
        yield Cell(first, column.label, loop, column.layer, position, head, tuple(also))


def _check_sites(names: Sequence[str], sites: Sequence[str]) -> None:
    for site in sites:
        if not any(is_site(name, site) for name in names):
            known = sorted({site_of(name) for name in names})
            raise KeyError(f"this model has no site {site!r}; its sites are {', '.join(known)}")


def _labels(names: Sequence[str], sites: Sequence[str]) -> dict[str, str]:
    """What to call each site that is swept: as the caller did, unless that could be several
    ("scale").
    """
    labels: dict[str, str] = {}
    for site in sites:
        meant = {site_of(name) for name in names if is_site(name, site)}
        labels |= {own: site if len(meant) == 1 else own.replace("hook_", "") for own in meant}
    return labels
