"""Where in a run: the one vocabulary and the one resolver of places.

A *visit* is one run of one block, such as "loops.2.blocks.0", "loops.0.low.1.blocks.0" or
"prelude.0". A *place* is one hook point; it stands at a visit, or at the run of a stack that the
visit opens or closes ("loops.2", "loops.0.low.1").

Iteration and layer are coordinates of a visit and no key: where cycles are nested, several visits
share them. `loops=` and `layers=` mean every visit at these coordinates, in the order of the
schedule; `visits=` names visits one by one.
"""

from __future__ import annotations

import difflib
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from loopscope.models.basis.names import resolve
from loopscope.models.basis.numbers import checked_integer, is_bool
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import is_site
from loopscope.models.core.state import Visit

_KEYS_AND_VALUES = ("attn.hook_k", "attn.hook_v", "attn.hook_rot_k")
Picked = Literal["all"] | Sequence[int]
VisitNames = str | Sequence[str]


@dataclass(frozen=True)
class Place:
    """One hook point of a call.

    Attributes:
        name: The hook point, e.g. "loops.2.blocks.0.attn.hook_z".
        visit: The visit or the run of a stack at which it stands, e.g. "loops.2.blocks.0",
            "loops.2"; empty before the first visit and after the last.
        site: The rest of the name, e.g. "attn.hook_z".
        loop, layer: The coordinates of the visit, from 0; None where it has no such coordinate.
    """

    name: str
    visit: str
    site: str
    loop: int | None
    layer: int | None

    @property
    def stage(self) -> str:
        """The part of the visit's name besides iteration and layer: "prelude", "low.1", or
        empty in the loop's one stack.
        """
        inside = self.visit if self.loop is None else self.visit.removeprefix(f"loops.{self.loop}")
        stack = inside if self.layer is None else inside.rpartition(".")[0]
        return stack.removesuffix("blocks").strip(".")


@dataclass(frozen=True)
class Where:
    """The visits that a caller chose. A visit must fit all fields that are given.

    Attributes:
        loops: The iterations, from 0; "all" for every one. None also keeps places outside the loop.
        layers: The blocks of a stack, from 0; "all" for every one. None also keeps places without a
            block.
        visits: Names of visits, or patterns of names ("loops.0.low.1.blocks.0", "loops.*.low.*"). A
            name also means all visits inside it ("loops.0.low.1" has all its blocks). None keeps
            all.
    """

    loops: Picked | int | None = None
    layers: Picked | int | None = None
    visits: VisitNames | None = None

    def __str__(self) -> str:
        given: dict[str, object] = {"loops": self.loops, "layers": self.layers}
        if self.visits is not None:
            given["visits"] = self.visits
        return ", ".join(f"{name}={value}" for name, value in given.items())

    def among(self, places: Sequence[Place], n_loops: int) -> list[Place]:
        """The chosen places among some places, in their order.

        Raises:
            KeyError: No place has a visit that `visits` names.
            ValueError: An iteration or a layer is out of range.
        """
        deepest = max((place.layer for place in places if place.layer is not None), default=-1)
        tests = [_within("loops", self.loops, n_loops), _within("layers", self.layers, deepest + 1)]
        named = self._named(places, n_loops)
        return [
            place
            for place in places
            if tests[0](place.loop) and tests[1](place.layer) and place.visit in named
        ]

    def _named(self, places: Sequence[Place], n_loops: int) -> Mapping[str, None]:
        known = dict.fromkeys(place.visit for place in places)
        if self.visits is None:
            return known
        entries = [self.visits] if isinstance(self.visits, str) else list(self.visits)
        named: dict[str, None] = {}
        for entry in entries:
            try:
                named |= dict.fromkeys(resolve(f"{entry}.**", known, n_loops))
            except KeyError:
                nearest = difflib.get_close_matches(entry, known, n=3, cutoff=0.3)
                raise KeyError(
                    f"{entry!r} is no visit of this call with n_loops={n_loops} that can be meant"
                    f" here; nearest: {', '.join(nearest or list(known)[:3])}"
                ) from None
        return named


def _within(what: str, wanted: Picked | int | None, count: int) -> Callable[[int | None], bool]:
    """Whether a coordinate is one of those that a caller wants."""
    kept = in_range(what, wanted, count)
    return lambda at: wanted is None if at is None else at in kept


def in_range(what: str, wanted: Picked | int | None, count: int) -> list[int]:
    """The chosen indices below `count`, each once; None and "all" are all of them.

    Raises:
        TypeError: Something else than integers.
        ValueError: An index that is not in 0..count - 1.
    """
    if wanted is None or (isinstance(wanted, str) and wanted == "all"):
        return list(range(count))
    chosen = whole_numbers(what, wanted)
    outside = [number for number in chosen if not 0 <= number < count]
    if outside:
        raise ValueError(f"{what} must be in 0..{count - 1}, got {outside[0]}")
    return chosen


def one_in_range(what: str, wanted: int, count: int) -> int:
    """One index below `count`.

    Raises:
        TypeError: No integer.
        ValueError: An index that is not in 0..count - 1.
    """
    return in_range(what, checked_integer(wanted, what), count)[0]


def whole_numbers(what: str, wanted: Iterable[int] | int) -> list[int]:
    """One number or several as Python's integers, each once.

    Raises:
        TypeError: Something else than integers; a mask of bools is no list of numbers.
    """
    with suppress(TypeError):
        given = list(wanted) if isinstance(wanted, Iterable) else [wanted]
        if not any(map(is_bool, given)):
            return list(dict.fromkeys(operator.index(number) for number in given))
    raise TypeError(f"{what} must be 'all', an integer or several, got {wanted!r}")


def places_of(model: LoopedModel, n_loops: int) -> list[Place]:
    """Every place of a call, in the order of the run."""
    before, after = model.edge_sites()
    found = [Place(site, "", site, None, None) for site in before]
    for visit in model.schedule(n_loops):
        stack, block = (visit.scope, visit.loop, None), (visit.name, visit.loop, visit.layer)
        for sites, (at, loop, layer) in (
            (visit.opening, stack),
            (visit.sites, block),
            (visit.closing, stack),
        ):
            found += [Place(f"{at}.{site}", at, site, loop, layer) for site in sites]
    return found + [Place(site, "", site, None, None) for site in after]


def points_by_block(model: LoopedModel, n_loops: int, site: str) -> dict[str, dict[int, str]]:
    """For each block of the loop that has the site (by its name there): hook names by loop."""
    found: dict[str, dict[int, str]] = {}
    for visit in model.schedule(n_loops):
        if visit.loop is not None and site in visit.sites:
            found.setdefault(visit.name.removeprefix(f"loops.{visit.loop}."), {})[visit.loop] = (
                f"{visit.name}.{site}"
            )
    if not found:
        raise ValueError(
            f"this needs the site {site!r}, which no block in the loop of a"
            f" {type(model).__name__} has"
        )
    return found


def loop_and_layer(visit: str) -> tuple[int | None, int | None]:
    """The coordinates in a visit's name, where no model is at hand to give the visit itself."""
    steps = visit.split(".")
    loop = int(steps[1]) if steps[0] == "loops" else None
    return loop, int(steps[-1])


def at_site(places: Sequence[Place], site: str) -> list[Place]:
    """The places at a site, given as "attn.hook_z", "attn.z", "hook_z" or "z".

    Raises:
        KeyError: None of them is at such a site.
    """
    found = [place for place in places if is_site(place.site, site)]
    if not found:
        known = ", ".join(sorted({place.site for place in places}))
        raise KeyError(f"this model has no site {site!r}; its sites are {known}")
    return found


def heads_at(visit: Visit, site: str = "attn.hook_z") -> int:
    """The heads of a visit's attention at one of its sites; layers of one model may differ."""
    attn: Any = visit.block.attn
    return len(attn.W_K if site in _KEYS_AND_VALUES else attn.W_Q)


def chosen_visits(model: LoopedModel, n_loops: int, where: Where) -> list[Visit]:
    """The visits that a caller chose, in the order of the schedule; the errors are those of
    `Where.among`.
    """
    visits = {visit.name: visit for visit in model.schedule(n_loops)}
    places = [Place(name, name, "", visit.loop, visit.layer) for name, visit in visits.items()]
    return [visits[place.name] for place in where.among(places, n_loops)]


def one_visit(model: LoopedModel, n_loops: int, where: Where) -> Visit:
    """The one visit that a caller chose.

    Raises:
        KeyError: There is no such visit.
        ValueError: The iteration or the layer is out of range, or the choice fits no visit or
            several.
    """
    found = chosen_visits(model, n_loops, where)
    if len(found) != 1:
        several = ", ".join(visit.name for visit in found) or "none"
        raise ValueError(
            f"one visit is needed, but {where} means {several}; name one of them with visit="
        )
    return found[0]
