"""How the time and the memory of the main methods grow with the size of a call, beside the growth
that their arithmetic asks for.

`python -m benchmarks.growth` measures it in about two minutes, writes its section of RESULTS.md
and draws docs/growth.png.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots

from benchmarks import results
from benchmarks.scale import busy
from benchmarks.timing import GIB, measured, paper_size
from loopscope.interp.attribution.patching import attribution_patch
from loopscope.interp.common.metrics import logit_diff
from loopscope.interp.drawing.look import CATEGORIES, FAINT, styled
from loopscope.interp.lens.lens import logit_lens, readout_lens
from loopscope.interp.patching.activation import activation_patch
from loopscope.models.basis.tokens import Batch

PICTURE = Path(__file__).parent.parent / "docs" / "growth.png"
START = {"iterations": 8, "positions": 12, "batch": 4, "width": 128}
SIZES = {
    "iterations": (4, 8, 16, 32),
    "positions": (6, 12, 24, 48),
    "batch": (2, 4, 8, 16),
    "width": (64, 128, 256, 512),
}
IDEAL = {
    "sweep": {"iterations": 2, "positions": 2, "batch": 1, "width": 2},
    "lens": {"iterations": 1, "positions": 1, "batch": 1, "width": 2},
    "recurrence grid": {"iterations": 1, "positions": 1, "batch": 1, "width": 2},
    "attribution": {"iterations": 1, "positions": 1, "batch": 1, "width": 2},
}
"""The power of each size that the arithmetic grows with: a sweep has a cell for every visit and
position, and a cell runs the visits and positions after it; products of wide layers rule.
"""
ROUNDS = 5
ENOUGH = 0.5  # seconds; a call is repeated only until so much time was measured
_LEAST = 1.0  # MiB below which the pages of the allocator hide what a call holds
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Growth:
    """One method along one axis.

    Attributes:
        method, axis: What was measured, and the size that grows.
        sizes: Its values.
        seconds: Processor time of a call of each size.
        mib: The memory that the call holds at most beyond the start, in MiB.
    """

    method: str
    axis: str
    sizes: tuple[int, ...]
    seconds: tuple[float, ...]
    mib: tuple[float, ...]

    def line(self) -> str:
        """The line of the page."""
        ideal = IDEAL[self.method][self.axis]
        memory = slope(self.sizes, self.mib, _LEAST)
        grows = "too little to tell" if math.isnan(memory) else f"grows with power {memory:.1f}"
        return (
            f"* {self.method}, {self.axis} {_listed(self.sizes)}:"
            f" {_listed(f'{x:.3g}' for x in self.seconds)} s, which grows with power"
            f" {slope(self.sizes, self.seconds):.1f} (the arithmetic: {ideal});"
            f" {_listed(f'{x:.0f}' for x in self.mib)} MiB, {grows}"
        )


def slope(sizes: Sequence[float], values: Sequence[float], least: float = 0.0) -> float:
    """The power with which values above `least` grow, from a line through the logarithms; NaN for
    fewer than two of them.
    """
    kept = [(math.log(x), math.log(y)) for x, y in zip(sizes, values, strict=True) if y > least]
    return float(np.polyfit(*zip(*kept, strict=True), 1)[0]) if len(kept) > 1 else math.nan


def job(method: str, sizes: Sizes) -> Callable[[], object]:
    """A call of a method of these sizes, with random weights and inputs."""
    model = paper_size(d_model=sizes["width"], n_layers=2, n_heads=4)
    shape = (2, sizes["batch"], sizes["positions"])
    pair = torch.randint(1, model.cfg.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    last = torch.full((sizes["batch"],), sizes["positions"] - 1)
    clean, corrupted = (Batch(tokens, torch.ones_like(tokens), last) for tokens in pair)
    loops, metric = sizes["iterations"], logit_diff(3, 5)
    jobs: dict[str, Callable[[], object]] = {
        "sweep": lambda: activation_patch(model, clean, corrupted, metric, loops),
        "lens": lambda: logit_lens(model, clean, loops),
        "recurrence grid": lambda: readout_lens(model, clean, loops),
        "attribution": lambda: attribution_patch(model, clean, corrupted, metric, loops),
    }
    return jobs[method]


def grown(method: str, axis: str, sizes: Sequence[int], rounds: int = ROUNDS) -> Growth:
    """Measure a method at each of some sizes; of the rounds, of which a long call has one, the
    fastest counts.
    """
    seconds, mib = [], []
    for size in sizes:
        call = job(method, {**START, axis: size})
        call()
        _give_back()
        started = time.process_time()
        mib.append(max(0.0, measured(call).peak * GIB / 2**20))
        took = [time.process_time() - started]
        while len(took) < rounds and sum(took) < ENOUGH:
            took.append(_processor_time(call))
        seconds.append(min(took))
    return Growth(method, axis, tuple(sizes), tuple(seconds), tuple(mib))


def drawn(found: Sequence[Growth]) -> go.Figure:
    """Time above and memory below, a column for each axis; dotted is the arithmetic's growth."""
    axes = list(dict.fromkeys(each.axis for each in found))
    methods = list(dict.fromkeys(each.method for each in found))
    figure = make_subplots(2, len(axes), shared_xaxes=True, horizontal_spacing=0.06)
    for each in found:
        column, color = axes.index(each.axis) + 1, CATEGORIES[methods.index(each.method)]
        power = IDEAL[each.method][each.axis]
        ideal = [each.seconds[0] * (size / each.sizes[0]) ** power for size in each.sizes]
        look = {"name": each.method, "legendgroup": each.method}
        lines = (
            (1, each.seconds, {"color": color}, "lines+markers", column == 1),
            (1, ideal, {"color": color, "dash": "dot", "width": 1}, "lines", False),
            (2, each.mib, {"color": color}, "lines+markers", False),
        )
        for row, values, line, mode, shown in lines:
            figure.add_scatter(
                x=each.sizes, y=values, line=line, mode=mode, showlegend=shown, **look,
                row=row, col=column,
            )  # fmt: skip
        figure.update_xaxes(type="log", tickvals=each.sizes, col=column)
        figure.update_xaxes(title_text=each.axis, row=2, col=column)
    figure.add_scatter(
        x=[None], y=[None], mode="lines", line={"color": FAINT, "dash": "dot"}, name="arithmetic"
    )
    figure.update_yaxes(type="log", dtick=1, row=1)
    figure.update_yaxes(rangemode="tozero", row=2)
    figure.update_yaxes(title_text="processor time, s", row=1, col=1)
    figure.update_yaxes(title_text="memory, MiB", row=2, col=1)
    figure = styled(figure, 560)
    return figure.update_layout(legend={"orientation": "h", "y": 1.12, "x": 0})


def main() -> None:
    """Measure all, print the lines as they come, and write the section and the picture."""
    torch.set_num_threads(1)
    found = []
    for method in IDEAL:
        for axis, sizes in SIZES.items():
            found.append(grown(method, axis, sizes))
            print(found[-1].line(), flush=True)
    start = ", ".join(f"{axis} {size}" for axis, size in START.items())
    about = (
        f"One axis grows, the others stay at {start}; L=2. Times are of the processor{busy()}.\n"
    )
    results.write("Growth", "python -m benchmarks.growth", [about, *(x.line() for x in found)])
    drawn(found).write_image(PICTURE, width=1100)


def _processor_time(call: Callable[[], object]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _give_back() -> None:
    """Give the memory that is free back to the system, so that a peak counts from what is used."""
    ctypes.CDLL(None).malloc_trim(0)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


if __name__ == "__main__":
    main()
