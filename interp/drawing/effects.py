"""The pictures of effects and terms: sweeps, traces, logits, edges, paths, composition."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import Curve, CurvePanel, bars, curves
from loopscope.interp.drawing.labels import AXIS, tick

if TYPE_CHECKING:
    from loopscope.interp.attribution.direct_logit import DirectLogits
    from loopscope.interp.circuits.edge_attribution import ComponentEnd, EdgeAttribution
    from loopscope.interp.patching.grouped import GroupedEffects
    from loopscope.interp.patching.paths import PathPatch
    from loopscope.interp.patching.sweep import Grid, Sweep
    from loopscope.interp.patching.tracing import Trace
    from loopscope.interp.weights.circuits import Composition


def sweep(record: Sweep, site: str | None, title: str) -> go.Figure:
    """One map per site: visits by positions, or by heads, of the share of the effect."""
    scaled = bool(record.clean.mean() != record.corrupted.mean())
    sites = dict.fromkeys(cell.site for cell in record.cells) if site is None else [site]
    maps = [_grid_map(name, record.grid(name, normalized=scaled), record, scaled) for name in sites]
    return cell_maps(maps, title)


def _grid_map(site: str, grid: Grid, record: Sweep, scaled: bool) -> CellMap:
    rows = list(product(grid.loops, grid.layers))
    columns = list(product(grid.positions, grid.heads))
    values = grid.values.flatten(2).flatten(0, 1).double()
    kept = [i for i, row in enumerate(values) if not bool(row.isnan().all())]
    parts = {"position": grid.positions != (None,), "head": grid.heads != (None,)}
    unit = "effect\n0 corrupted\n1 clean" if scaled else record.metric
    return CellMap(
        title=site,
        columns=[_coordinate(column) for column in columns],
        rows=[_coordinate(rows[i]) for i in kept],
        values=values[kept].tolist(),
        unit=unit,
        scale="signed",
        axes=(".".join(name for name, there in parts.items() if there), AXIS),
    )


def _coordinate(parts: Sequence[int | None]) -> str:
    """Coordinates with dots between, "all" where there is none."""
    return ".".join(str(part) for part in parts if part is not None) or "all"


def by_group(record: GroupedEffects, title: str) -> go.Figure:
    """One panel per site: the effect of each label over visits, dotted where its interval ends."""
    sites: dict[str, dict[str, list[int]]] = {}
    for i, ((site, _, _, _, head), name) in enumerate(zip(record.keys, record.labels, strict=True)):
        word = str(name) if head is None else f"{name}, head {head}"
        sites.setdefault(site, {}).setdefault(word, []).append(i)
    panels = []
    for site, groups in sites.items():
        lines = []
        for word, own in groups.items():
            x = [tick(record.keys[i][1]) for i in own]
            lines.append(Curve(word, x, record.value[own].tolist()))
            lines += [
                Curve(word, x, e[own].tolist(), dashed=True) for e in (record.low, record.high)
            ]
        panels.append(CurvePanel(f"{site}: effect (0 corrupted, 1 clean)", lines, AXIS))
    return curves(panels, title)


def trace(record: Trace, title: str) -> go.Figure:
    """The effect by depth and position."""
    cells = CellMap(
        title="effect of one state",
        columns=list(map(str, record.positions)),
        rows=[tick(name) for name in record.names],
        values=record.effect.double().tolist(),
        unit="effect",
        scale="signed",
        axes=("position", AXIS),
    )
    return cell_maps([cells], title)


def direct_logits(record: DirectLogits, title: str) -> go.Figure:
    """The term of each component, as a mean over the inputs: visits by heads and MLPs."""
    terms = [*record.values.mean(1).double().tolist(), float(record.constant.mean())]
    places = [
        (_coordinate((c.loop, c.layer)), c.kind if c.head is None else f"head {c.head}")
        for c in record.components
    ]
    return cell_maps([_table([*places, ("all", "constant")], terms, "logits")], title)


def _table(places: Sequence[tuple[str, str]], values: Sequence[float], unit: str) -> CellMap:
    """A map of values by the names of their rows and columns; a cell of several is their sum."""
    rows, columns = (list(dict.fromkeys(names)) for names in zip(*places, strict=True))
    table = [[math.nan] * len(columns) for _ in rows]
    for (row, column), value in zip(places, values, strict=True):
        i, j = rows.index(row), columns.index(column)
        table[i][j] = value if math.isnan(table[i][j]) else table[i][j] + value
    return CellMap("", columns, rows, table, unit, "signed")


def edges(record: EdgeAttribution, title: str) -> go.Figure:
    """The effect of each edge, as a mean over the inputs: readers by writers."""
    places = [(_end(edge.reader), _end(edge.writer)) for edge in record.edges]
    return cell_maps([_table(places, record.values.mean(1).tolist(), record.metric)], title)


def _end(end: ComponentEnd) -> str:
    place = _coordinate((end.loop, end.layer))
    return end.kind if place == "all" else f"{place} {end.kind}"


def path(record: PathPatch, title: str) -> go.Figure:
    """The metric of each example: clean, corrupted, and with the path patched."""
    examples = [str(i) for i in range(len(record.values))]
    runs = {"clean": record.clean, "corrupted": record.corrupted, "patched": record.values}
    groups = [Curve(name, examples, values.double().tolist()) for name, values in runs.items()]
    return bars(groups, record.metric, "example", title)


def composition(record: Composition, title: str) -> go.Figure:
    """The score of each pair of heads: later heads by earlier ones."""
    layers, heads = record.values.shape[:2]
    names = [f"{layer}.{head}" for layer, head in product(range(layers), range(heads))]
    cells = CellMap(
        title=f"{record.kind}-composition",
        columns=names,
        rows=names,
        values=record.values.flatten(2).flatten(0, 1).T.double().tolist(),
        unit="score",
        scale="size",
        axes=("writer (layer.head)", "reader (layer.head)"),
    )
    return cell_maps([cells], title)
