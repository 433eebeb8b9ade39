"""Groups of visits: the places of one site in one stack, which share a file with the axes loop and
layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from loopscope.interp.common.collecting import collect
from loopscope.interp.common.places import Place, Where, at_site, places_of
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.cache import position_axis


@dataclass(frozen=True)
class Group:
    """The stored places of one site: its hook points at the chosen iterations and blocks.

    Attributes:
        label: The site, with the stage in front outside the loop's one stack: "resid_post",
            "prelude.resid_post", "low.1.attn.z".
        names: The hook point at each loop and layer.
        loops, layers: The iterations and the blocks of the two axes; a single None if the site has
            no such axis.
        shape: The axes of one activation, such as (d_model,) or (head, d_head).
    """

    label: str
    names: tuple[tuple[str, ...], ...]
    loops: tuple[int | None, ...]
    layers: tuple[int | None, ...]
    shape: tuple[int, ...]

    @property
    def points(self) -> tuple[str, ...]:
        """Every hook point, loop by loop."""
        return tuple(name for row in self.names for name in row)

    def to_json(self) -> dict[str, Any]:
        """The group as a manifest holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Group:
        """The group that a manifest holds."""
        return cls(
            content["label"],
            tuple(map(tuple, content["names"])),
            tuple(content["loops"]),
            tuple(content["layers"]),
            tuple(content["shape"]),
        )


def groups_of(
    model: LoopedModel, example: Batch, sites: str | Sequence[str], where: Where, n_loops: int
) -> list[Group]:
    """The groups of some sites at some visits, in the order of the run.

    Args:
        example: A batch of one row, which is run once for the shapes.

    Raises:
        KeyError: A site or a visit that the model does not have.
        ValueError: A site without one vector per token, one after the last visit, or visits that
            are no grid of loops and layers.
    """
    every = places_of(model, n_loops)
    wanted = _at_sites(every, [sites] if isinstance(sites, str) else sites)
    places = where.among([place for place in every if place.name in wanted], n_loops)
    if not places:
        raise ValueError(f"no place is left: the sites {sites!r} do not occur at {where}")
    _refuse(model, places)
    shapes = _shapes(model, example, [place.name for place in places], n_loops)
    found: dict[tuple[str, str], list[Place]] = {}
    for place in places:
        found.setdefault((place.stage, place.site), []).append(place)
    return [
        _group(f"{stage}.{site}" if stage else site, members, shapes)
        for (stage, site), members in found.items()
    ]


def _at_sites(every: Sequence[Place], sites: Sequence[str]) -> set[str]:
    """The hook points at any of some sites."""
    return {place.name for site in sites for place in at_site(every, site)}


def _refuse(model: LoopedModel, places: Sequence[Place]) -> None:
    for place in places:
        if position_axis(place.name) != 1:
            raise ValueError(
                f"a store holds activations of one size per token, but {place.name!r} has one entry"
                " per key; read scores and patterns with run_with_cache"
            )
        if place.name in model.edge_sites()[1]:
            raise ValueError(
                f"a store holds a run up to its last visit, but {place.name!r} comes after it; name"
                " sites of the visits"
            )


def _shapes(
    model: LoopedModel, example: Batch, names: Sequence[str], n_loops: int
) -> dict[str, tuple[int, ...]]:
    """The axes of one activation at each hook point."""

    def empty(value: Tensor, name: str) -> Tensor:
        return torch.empty(value.shape[2:], device="meta")

    values = collect(model, example, names, n_loops, reduce=empty).values
    return {name: tuple(value.shape) for name, value in values.items()}


def _group(label: str, places: Sequence[Place], shapes: Mapping[str, tuple[int, ...]]) -> Group:
    loops = tuple(dict.fromkeys(place.loop for place in places))
    layers = tuple(dict.fromkeys(place.layer for place in places))
    at = {(place.loop, place.layer): place.name for place in places}
    sizes = {shapes[place.name] for place in places}
    whole = {len(at), len(loops) * len(layers), len(places)}
    if len(whole) + len(sizes) > 2:
        raise ValueError(
            f"the visits of {label!r} must be a grid of loops and layers with activations of one"
            f" size, got {[place.visit for place in places][:6]}; choose fewer with loops=, layers="
            " or visits="
        )
    names = tuple(tuple(at[loop, layer] for layer in layers) for loop in loops)
    return Group(label.replace("hook_", ""), names, loops, layers, sizes.pop())
