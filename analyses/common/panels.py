"""Checkpoints side by side: what each panel is called, and the run behind it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go

from loopscope.analyses.common.by_hop import HopRun, run_by_hop
from loopscope.analyses.common.claims import short
from loopscope.analyses.common.configs import PanelsConfig
from loopscope.analyses.common.subject import Subject, open_subject
from loopscope.interp.drawing.labels import label
from loopscope.interp.drawing.look import INK

_DRAWN = re.compile(r"clip\(Poisson\(.*\), (\d+), (\d+)\)")


@dataclass(frozen=True)
class Panel:
    """The title of a panel: its checkpoint and the training of the checkpoint.

    Attributes:
        checkpoint: Its name.
        training_loops: Iterations in training as the card says, such as "4" or "clip(Poisson(4), 2,
            8)"; None where unknown.
        trained_hops: Deepest hop count seen in training; None where unknown.
    """

    checkpoint: str
    training_loops: str | None
    trained_hops: int | None

    @classmethod
    def of(cls, subject: Subject) -> Panel:
        """The panel of an open checkpoint."""
        loops = subject.card.get("training_loops") or subject.model.cfg.n_loops
        return cls(
            subject.name,
            None if loops is None else str(loops).partition(", one draw")[0],
            subject.trained_hops,
        )

    def title(self, line: str = "") -> str:
        """The checkpoint's short name and its R, and below it another line."""
        loops = _DRAWN.sub(r"\1 to \2", self.training_loops or "")
        known = f", R = {loops}" if loops else ""
        return f"<b>{label(short(self.checkpoint))}</b>{known}" + (f"<br>{line}" if line else "")


def opened(config: PanelsConfig) -> list[Subject]:
    """Every checkpoint that the config names; all are opened before any is run."""
    return [open_subject(source) for source in config.sources()]


def run_each(config: PanelsConfig, n_loops: int) -> Iterator[tuple[Subject, dict[int, HopRun]]]:
    """Every checkpoint with its answers after every iteration."""
    for subject in opened(config):
        yield subject, run_by_hop(subject, n_loops)


def together(panels: Sequence[Panel], frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The frames of all panels in one, with the checkpoint as the first column."""
    named = [frame.copy() for frame in frames]
    for panel, frame in zip(panels, named, strict=True):
        frame.insert(0, "checkpoint", panel.checkpoint)
    return pd.concat(named, ignore_index=True)


def small_titles(plot: go.Figure, count: int) -> None:
    """Set the first `count` annotations, which are the titles of the panels, and those of the axes
    in a small type.
    """
    for title in plot.layout.annotations[:count]:
        title.update(font={"size": 12, "color": INK}, yshift=2)
    plot.update_xaxes(title_font_size=12)
    plot.update_yaxes(title_font_size=12)


def headline(plot: go.Figure, text: str, above: int) -> None:
    """A line over the panels that says how to read them, `above` pixels over the highest one."""
    plot.add_annotation(
        text=text,
        x=0,
        xref="paper",
        xanchor="left",
        y=1,
        yref="paper",
        yanchor="bottom",
        yshift=above,
        showarrow=False,
        align="left",
        font={"size": 12},
    )
