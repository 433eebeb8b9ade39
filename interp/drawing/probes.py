"""The pictures of probes: scores with their controls, transfer between iterations, pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import Curve, CurvePanel, curves
from loopscope.interp.drawing.labels import AXIS, tick

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loopscope.interp.common.places import Place
    from loopscope.interp.probes.differences import DifferenceProbe
    from loopscope.interp.probes.record import Probe
    from loopscope.interp.probes.transfer import TransferMatrix


def probe(record: Probe, title: str) -> go.Figure:
    """The score at each place, the control task's, and that of no probe; and the code length."""
    x = _ticks(record.places)
    rows = [Curve("held out", x, record.score.tolist())]
    if record.control is not None:
        rows.append(Curve("control task", x, record.control.tolist()))
    if len(record.permuted):
        most = record.permuted.amax(0).tolist()
        rows.append(Curve(f"best of {len(record.permuted)} permutations", x, most))
    rows.append(Curve("without any state", x, [record.constant] * len(x), dashed=True))
    panels = [CurvePanel(record.metric, rows, AXIS)]
    if record.code is not None:
        shorter = Curve("compression", x, record.code.compression().tolist())
        panels.append(CurvePanel("compression by the probe (1 = none)", [shorter], AXIS))
    return curves(panels, title)


def _ticks(places: Sequence[Place]) -> list[str]:
    """Each place on an axis; with its site where several places would have one name."""
    names = [tick(place.name) for place in places]
    if len(set(names)) == len(names):
        return names
    return [f"{name} {place.site}" for name, place in zip(names, places, strict=True)]


def transfer(record: TransferMatrix, title: str) -> go.Figure:
    """One map per block: the iteration of the fit by the iteration of the test."""
    loops = list(map(str, range(record.score.shape[1])))
    maps = [
        CellMap(
            title=block,
            columns=loops,
            rows=loops,
            values=values.tolist(),
            unit=record.metric,
            scale="share" if record.metric == "accuracy" else "signed",
            axes=("tested at loop", "fitted at loop"),
        )
        for block, values in zip(record.blocks, record.score, strict=True)
    ]
    return cell_maps(maps, title)


def differences(record: DifferenceProbe, title: str) -> go.Figure:
    """The accuracy of the difference, of single states compared, and of single states; the flip
    test beside them.
    """
    x = _ticks(record.places)
    right = [
        Curve("difference of the states", x, record.accuracy().tolist()),
        Curve("single states, compared", x, record.accuracy_alone().tolist()),
        Curve("single states", x, record.separate.tolist()),
    ]
    turned = [
        Curve("sign flips", x, record.flips().tolist()),
        Curve("antisymmetry", x, record.antisymmetry().tolist()),
    ]
    panels = [CurvePanel("accuracy", right, AXIS), CurvePanel("pairs turned round", turned, AXIS)]
    return curves(panels, title)
