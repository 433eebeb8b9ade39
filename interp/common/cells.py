"""The patches of a sweep: its cells, chosen by site, iteration, layer, position and head."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from loopscope.interp.common.places import (
    Picked,
    Place,
    Where,
    at_site,
    heads_at,
    in_range,
    places_of,
)
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import Visit

HEAD_AXIS = {
    "attn.hook_q": 2,
    "attn.hook_k": 2,
    "attn.hook_v": 2,
    "attn.hook_z": 2,
    "attn.hook_rot_q": 2,
    "attn.hook_rot_k": 2,
}
HEAD_AXIS |= {"attn.hook_attn_scores": 1, "attn.hook_pattern": 1}
Together = Literal["loops", "positions"]


@dataclass(frozen=True)
class Cell:
    """The place of one patch in a sweep: its hook point, and the columns and the head that are
    replaced.

    Attributes:
        name: The hook point; if several iterations are patched together, the first hook point.
        site: The site in the caller's word, or its full name if the word could mean several sites.
            Outside the loop the stage stands in front ("prelude.resid_pre").
        loop, layer: The iteration and the block, from 0. None if the site has none, or if all
            chosen iterations are patched together.
        position: The column that is replaced; for attention scores and patterns, the query
            position. None if several columns are patched together.
        head: The head that is replaced; None means the whole site.
        also: The hook points at later iterations that are patched together with `name`.
        positions: The columns, if several are patched together.
        visit: The name of the visit to which the hook point belongs. At the start or end of an
            iteration or cycle it is the name of that run of blocks. It is empty before the first
            visit and after the last.
    """

    name: str
    site: str
    loop: int | None
    layer: int | None
    position: int | None
    head: int | None
    also: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    visit: str = field(default="", compare=False)  # the hook point says it already

    @property
    def names(self) -> tuple[str, ...]:
        """Every hook point that is patched, in the order in which they run."""
        return (self.name, *self.also)

    @property
    def columns(self) -> tuple[int, ...]:
        """Every column that is patched, in increasing order."""
        return self.positions if self.position is None else (self.position,)


def columns_of(cells: Sequence[Cell], width: int) -> Bool[Tensor, "cell column"]:
    """Which of so many columns each cell patches, on the CPU."""
    grid = torch.zeros(len(cells), width, dtype=torch.bool, device="cpu")
    places = [(index, column) for index, cell in enumerate(cells) for column in cell.columns]
    grid[tuple(torch.tensor(places, dtype=torch.int64, device="cpu").view(-1, 2).T)] = True
    return grid


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The places that a caller chose to patch; `activation_patch` describes the fields."""

    sites: str | Sequence[str]
    where: Where = field(default_factory=Where)
    positions: Picked | int = "all"
    heads: Picked | int | None = None
    together: Together | Sequence[Together] = ()
    window: int | None = None

    def __post_init__(self) -> None:
        wrong = [word for word in self.joined if word not in ("loops", "positions")]
        if wrong:
            raise ValueError(f"together names 'loops' or 'positions', got {wrong[0]!r}")
        if self.window is not None:
            checked_count(self.window, "window")
        if self.window is not None and "loops" in self.joined:
            raise ValueError(
                "window patches some iterations at once and together='loops' all of them, so only"
                f" one of the two can be given, got {self.window} and {self.joined}"
            )

    @property
    def joined(self) -> tuple[str, ...]:
        """The axes along which several places are patched at once."""
        return (self.together,) if isinstance(self.together, str) else tuple(self.together)

    @property
    def called(self) -> tuple[str, ...]:
        """The sites as the caller called them."""
        return (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)


@dataclass(frozen=True)
class _Series:
    """The places of one site at one layer (or at none) of one stage, by iteration."""

    label: str
    site: str
    places: tuple[Place, ...]

    @property
    def inside(self) -> bool:
        """Whether the places have iterations."""
        return all(place.loop is not None for place in self.places)


def choose(model: LoopedModel, n_loops: int, width: int, selection: Selection) -> list[Cell]:
    """List the cells that a caller chose, in the order of the schedule.

    Raises:
        KeyError: The model does not have a site or a visit.
        ValueError: A position, head, loop or layer is out of range, the window is longer than the
            chosen iterations, or nothing is left.
    """
    every = places_of(model, n_loops)
    labels = _labels(every, selection.called)
    chosen = [place for place in selection.where.among(every, n_loops) if place.site in labels]
    if not chosen:
        raise ValueError(
            f"no cell is left: the sites {list(selection.called)} do not occur at {selection.where}"
        )
    columns = in_range("positions", selection.positions, width)
    visits = {visit.name: visit for visit in model.schedule(n_loops)}
    cells = [
        cell
        for series in _series(chosen, labels)
        for group in _groups(series, selection)
        for cell in _cells(series, group, columns, _heads(visits, series, selection), selection)
    ]
    if not cells:
        raise ValueError(f"no cell is left: no position is chosen, got {selection.positions}")
    order = {place.name: i for i, place in enumerate(every)}
    return sorted(cells, key=lambda cell: order[cell.name])


def _series(chosen: Sequence[Place], labels: dict[str, str]) -> list[_Series]:
    found: dict[tuple[str, str, int | None], list[Place]] = {}
    for place in chosen:
        found.setdefault((place.stage, place.site, place.layer), []).append(place)
    return [
        _Series(f"{stage}.{labels[site]}" if stage else labels[site], site, tuple(places))
        for (stage, site, _), places in found.items()
    ]


def _heads(
    visits: Mapping[str, Visit], series: _Series, selection: Selection
) -> Sequence[int | None]:
    """The heads that are patched one by one; a single None where all are patched at once."""
    if selection.heads is None or series.site not in HEAD_AXIS:
        return [None]
    count = heads_at(visits[series.places[0].visit], series.site)
    return in_range("heads", selection.heads, count)


def _groups(series: _Series, selection: Selection) -> Iterator[tuple[Place, ...]]:
    """The places that one cell patches: one, all iterations together, or a window of them."""
    if series.inside and "loops" in selection.joined:
        yield series.places
    elif series.inside and selection.window is not None:
        size, count = selection.window, len(series.places)
        if size > count:
            raise ValueError(
                f"window must be at most the number of chosen iterations, which is {count} at"
                f" {series.label!r}, got {size}"
            )
        yield from (series.places[i : i + size] for i in range(count - size + 1))
    else:
        yield from ((place,) for place in series.places)


def _cells(
    series: _Series,
    group: tuple[Place, ...],
    columns: list[int],
    heads: Sequence[int | None],
    selection: Selection,
) -> Iterator[Cell]:
    """The cells of one group: one for each head, and for each column unless columns go together."""
    first, also = group[0], tuple(place.name for place in group[1:])
    loop = None if "loops" in selection.joined else first.loop
    together = tuple(sorted(columns)) if "positions" in selection.joined else ()
    for position, head in product([None] if together else columns, heads):
        yield Cell(
            first.name,
            series.label,
            loop,
            first.layer,
            position,
            head,
            also,
            together,
            first.visit,
        )


def _labels(every: Sequence[Place], called: Sequence[str]) -> dict[str, str]:
    """The label of each site that is swept: the caller's word, or the full site where that word
    could mean several ("scale").
    """
    labels: dict[str, str] = {}
    for word in called:
        meant = {place.site for place in at_site(every, word)}
        labels |= {own: word if len(meant) == 1 else own.replace("hook_", "") for own in meant}
    return labels
