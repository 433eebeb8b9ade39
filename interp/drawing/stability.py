"""The pictures of stability: Lyapunov spectra, growth of changes, residuals, basins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import Curve, CurvePanel, bars, curves, spread

if TYPE_CHECKING:
    from loopscope.interp.dynamics.attractors import FixedPoints
    from loopscope.interp.dynamics.basins import Basins, RestartVote
    from loopscope.interp.dynamics.lyapunov import LyapunovSpectrum
    from loopscope.interp.dynamics.path_independence import PathIndependence


def spectrum(record: LyapunovSpectrum, title: str) -> go.Figure:
    """The exponents of each example, and the mean share of each sublayer in the first one."""
    values = record.spectrum()
    ranks = list(range(values.shape[1]))
    panels = [
        CurvePanel(
            "exponent (nats per loop)",
            spread(ranks, values, _examples(len(values))),
            "rank of the exponent",
        )
    ]
    loops = [record.start + t for t in range(len(record.shares))]
    shares = record.shares[..., 0].mean(2).T.tolist()
    named = zip(record.sublayers, shares, strict=True)
    panels.append(
        CurvePanel(
            "share in the first exponent (nats)",
            [Curve(name, loops, share) for name, share in named],
            "loop",
        )
    )
    return curves(panels, title)


def growth(total: Float[Tensor, "point batch"], title: str, first: int = 0) -> go.Figure:
    """The logarithm of a change's size over iterations; point 0 is that after `first` of them."""
    x = [first + t for t in range(len(total))]
    found = spread(x, total.T, _examples(total.shape[1]))
    return curves([CurvePanel("growth of the change (nats)", found, "iterations")], title)


def residuals(record: FixedPoints, title: str) -> go.Figure:
    """The relative step of each example over iterations; a star where it is on its cycle."""
    x = list(range(1, len(record.residual) + 1))
    found = spread(x, record.residual.T, _examples(record.residual.shape[1]))
    return curves([CurvePanel(f"relative step of the {record.space}", found, log=True)], title)


def alignment(record: PathIndependence, title: str) -> go.Figure:
    """The cosine of each example's two last states."""
    names = [str(i) for i in range(len(record.cosine))]
    found = [Curve("", names, record.cosine.tolist())]
    return bars(found, "cosine of the last states", "example", title)


def agreement(record: RestartVote, title: str) -> go.Figure:
    """The share of runs that give each example's most frequent answer."""
    names = [str(i) for i in range(len(record.share))]
    found = [Curve("", names, record.share.tolist())]
    return bars(found, "share of runs that agree", "example", title)


def basins(record: Basins, title: str) -> go.Figure:
    """The relative distance of each start's end from the unchanged run's, and where the answers are
    the same.
    """
    starts, batch = record.answers.shape
    columns, rows = [str(i) for i in range(batch)], [str(i) for i in range(starts)]
    same = (record.answers == record.answers[0]).double()
    maps = [
        CellMap("distance of the last state", columns, rows, record.distance.tolist(), "relative"
                "\ndistance", "size", axes=("example", "start")),
        CellMap("same answer", columns, rows, same.tolist(), "same", axes=("example", "start")),
    ]  # fmt: skip
    return cell_maps(maps, title)


def _examples(count: int) -> list[str]:
    return [f"example {i}" for i in range(count)]
