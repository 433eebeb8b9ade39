"""The pictures of motion over iterations: states, orbits, blocks, attention, eigenvalues."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import TYPE_CHECKING

import plotly.graph_objects as go
from torch import Tensor

from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.drawing.curves import Curve, CurvePanel, curves, plane, spread

if TYPE_CHECKING:
    from loopscope.interp.dynamics.inference_stages import InferenceStages
    from loopscope.interp.dynamics.input_dependence import InputDependence
    from loopscope.interp.dynamics.jacobian import JacobianSpectrum
    from loopscope.interp.dynamics.layers import AttentionDynamics, LayerDynamics
    from loopscope.interp.dynamics.states import Dynamics, Orbits


def dynamics(record: Dynamics, title: str) -> go.Figure:
    """Size of the state, its relative step, the cosine of steps, and the distance to the last."""
    shown = (
        ("size of the state", record.state_norm()),
        ("relative step", record.step_norm(relative=True)),
        ("cosine of consecutive steps", record.update_cosine()),
        ("relative distance to the last state", record.distance_to_last(relative=True)),
    )
    names = _places(record)
    x = list(record.iterations)
    return curves(
        [CurvePanel(what, spread(x, values[:, record.shown].T, names)) for what, values in shown],
        title,
    )


def _places(record: Dynamics) -> list[str]:
    """The example and the position of each trajectory that is shown."""
    example, column = record.shown.nonzero(as_tuple=True)
    places = zip(example.tolist(), record.position[example, column].tolist(), strict=True)
    return [f"example {i}, position {j}" for i, j in places]


def orbits(record: Orbits, title: str) -> go.Figure:
    """The trajectories on the first two principal components; the last point has a star."""
    points = record.coordinates[:, record.dynamics.shown].transpose(0, 1).double()
    second = min(1, points.shape[2] - 1)
    paths = [
        Curve(name, path[:, 0].tolist(), path[:, second].tolist(), len(path) - 1)
        for name, path in zip(_places(record.dynamics), points, strict=True)
    ]
    shares = [f"PC{i + 1} ({100 * x:.0f} %)" for i, x in enumerate(record.explained.tolist())]
    return plane(paths, (shares[0], shares[second]), title)


def layers(record: LayerDynamics, title: str) -> go.Figure:
    """The size, the relative step and the cosine of steps of each block's output over iterations,
    as means over places.
    """
    panels = []
    statistics: dict[str, Callable[[Dynamics], Tensor]] = {
        "size of the output": lambda path: path.state_norm(),
        "relative step": lambda path: path.step_norm(relative=True),
        "cosine of consecutive steps": lambda path: path.update_cosine(),
    }
    for what, statistic in statistics.items():
        found = [
            Curve(name, path.iterations, statistic(path)[:, path.shown].mean(1).tolist())
            for name, path in zip(record.names, record.layers, strict=True)
        ]
        panels.append(CurvePanel(what, found))
    return curves(panels, title)


def attention(record: AttentionDynamics, title: str) -> go.Figure:
    """Change and entropy of each head's pattern in every loop."""
    loops, _, heads = record.change.shape
    rows = [f"{name}.{head}" for name, head in product(record.names, range(heads))]
    shown = (
        ("change from the loop before", record.change, "share"),
        ("entropy (nats)", record.entropy, "size"),
    )
    maps = [
        CellMap(
            title=what,
            columns=list(map(str, range(loops))),
            rows=rows,
            values=values.flatten(1).T.tolist(),
            unit="change" if scale == "share" else "nats",
            scale="share" if scale == "share" else "size",
            axes=("loop", "block.head"),
        )
        for what, values, scale in shown
    ]
    return cell_maps(maps, title)


def spectrum(record: JacobianSpectrum, title: str) -> go.Figure:
    """The eigenvalues of each example on the complex plane; the leading one has a star."""
    examples = []
    for i, row in enumerate(record.eigenvalues.tolist()):
        kept = [value for value in row if not math.isnan(value.real)]
        real, imag = [value.real for value in kept], [value.imag for value in kept]
        examples.append(Curve(f"example {i}", real, imag, star=0))
    return plane(examples, ("real part", "imaginary part"), title, circle=True)


def stages(record: InferenceStages, title: str) -> go.Figure:
    """Each statistic over the blocks of a cycle, one curve per loop."""
    cycles: dict[str, dict[str, int]] = {}
    for i, name in enumerate(record.names):
        _, loop, block = name.split(".", 2)
        cycles.setdefault(loop, {})[block] = i
    words = {
        "entropy": "entropy of the states (nats)",
        "concentration": "concentration of attention on few keys",
        "mixing": "mixing: entropy of a query's attention",
        "sink": "attention to the first token",
    }
    panels = [
        CurvePanel(
            what,
            [
                Curve(f"loop {loop}", list(own), getattr(record, name)[list(own.values())].tolist())
                for loop, own in cycles.items()
            ],
            "block",
        )
        for name, what in words.items()
    ]
    return curves(panels, title)


def dependence(record: InputDependence, title: str) -> go.Figure:
    """Distances of the mixed run and the dependence on the input over iterations, as means over
    pairs.
    """
    shown = {
        "to the end of its input": record.to_input,
        "to the run of its starting state": record.to_start,
        "between the two inputs": record.apart,
    }
    rows = [Curve(name, record.iterations, x.mean(1).tolist()) for name, x in shown.items()]
    share = Curve("dependence", record.iterations, record.dependence().nanmean(1).tolist())
    panels = [
        CurvePanel("distance (1 = at the exchange)", rows),
        CurvePanel("dependence (1 = own input)", [share], span=(-0.02, 1.05)),
    ]
    return curves(panels, title)
