"""Does attention settle? Change of every head's pattern from iteration to iteration, and its
entropy (after arXiv 2604.11791).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.look import note
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section, of_inputs
from loopscope.interp.common.columns import Shown, shown_columns
from loopscope.interp.drawing.labels import loop_and_layer
from loopscope.interp.drawing.look import ACCURACY_SCALE, CATEGORIES, INK, WARM_SCALE, styled
from loopscope.interp.dynamics.layers import AttentionDynamics, attention_dynamics


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(InputsConfig):
    """Change of every head's attention pattern from one iteration to the next, and its entropy
    (after arXiv 2604.11791).
    """

    n_loops: int = 16
    """Iterations to run."""
    positions: Literal["readout", "real"] = "real"
    """Queries: where the answer is read, or all tokens."""


_CHANGE, _ENTROPY = "change from the loop before", "entropy (nats)"
_SETTLED = 0.01
_LINES, _ROWS = (
    (4, 8),
    48,
)  # at most so many blocks and heads are drawn as curves, and so many heads as rows of a map


@dataclass(frozen=True)
class AttentionSettling(Record):
    """Means over the inputs and their queries.

    Attributes:
        inputs: How many inputs.
        hops: Their hop count; None for texts and token ids.
        queries: "readout" or "real", all tokens.
        uniform: Entropy of attending to every key alike, mean over the same queries, in nats; None
            where later tokens are seen.
        dynamics: Change (total variation, 0 to 1) and entropy of each head's pattern in every
            iteration.
    """

    inputs: int
    hops: int | None
    queries: str
    uniform: float | None
    dynamics: AttentionDynamics

    def settled(self) -> list[list[int | None]]:
        """For each block's heads the first loop (from 0) from which on the pattern changes by at
        most 0.01; None where it still changes at the end.
        """
        late = (self.dynamics.change <= _SETTLED).long().flip(0).cumprod(0).sum(0)
        n_loops = len(self.dynamics.change)
        return [[n_loops - count if count else None for count in row] for row in late.tolist()]

    def frame(self) -> pd.DataFrame:
        """visit (its name), loop, layer, head, change, entropy."""
        change, entropy = self.dynamics.change, self.dynamics.entropy
        rows = [
            (
                visit,
                *loop_and_layer(visit),
                head,
                float(change[t, i, head]),
                float(entropy[t, i, head]),
            )
            for t, i, head in product(*map(range, change.shape))
            for visit in (f"loops.{t}.{self.dynamics.names[i]}",)
        ]
        return pd.DataFrame(rows, columns=["visit", "loop", "layer", "head", "change", "entropy"])

    def summary(self) -> pd.DataFrame:
        """One row per head: the loop from which on it is settled, its change in loop 1 and in the
        last, its last entropy.
        """
        change, entropy, settled = self.dynamics.change, self.dynamics.entropy, self.settled()
        rows = [
            (
                name,
                head,
                "never" if settled[i][head] is None else settled[i][head],
                *(float(x[i, head]) for x in (change[:2][-1], change[-1], entropy[-1])),
            )
            for i, name in enumerate(self.dynamics.names)
            for head in range(change.shape[2])
        ]
        return pd.DataFrame(
            rows,
            columns=[
                "block",
                "head",
                "settled from loop",
                "change in loop 1",
                "last change",
                "last entropy",
            ],
        )


def run(config: AttentionConfig) -> AttentionSettling:
    """Compare the patterns of successive iterations on the questions of one hop count, or on what
    is given.
    """
    if config.n_loops < 2:
        raise ValueError(
            f"a change between iterations needs at least 2 of them, got --n-loops {config.n_loops}"
        )
    asked = open_inputs(config)
    return measure(asked, asked.group(config.hops), config.n_loops, config.positions)


def measure(asked: Asked, group: Group, n_loops: int, queries: Shown = "real") -> AttentionSettling:
    """The record for one group of inputs of an open checkpoint."""
    found = attention_dynamics(asked.subject.model, group.batch, n_loops, positions=queries)
    moved = AttentionDynamics(found.names, found.change.cpu(), found.entropy.cpu())
    columns, shown = shown_columns(group.batch, queries)
    keys = group.batch.mask.cumsum(1).gather(1, columns)[shown]
    uniform = float(keys.double().log().mean()) if asked.subject.model.causal else None
    return AttentionSettling(len(group.batch), group.hops, str(queries), uniform, moved)


def figure(record: AttentionSettling) -> go.Figure:
    """Change above, entropy below, a column per block and a curve per head; with many heads two
    maps, a row per head or block.
    """
    n_layers, n_heads = record.dynamics.change.shape[1:]
    return _curves(record) if n_layers <= _LINES[0] and n_heads <= _LINES[1] else _maps(record)


def _curves(record: AttentionSettling) -> go.Figure:
    names, n_loops = record.dynamics.names, len(record.dynamics.change)
    plot = make_subplots(
        rows=2, cols=len(names), shared_xaxes="all", shared_yaxes="rows",
        subplot_titles=names, horizontal_spacing=0.04, vertical_spacing=0.08,
    )  # fmt: skip
    tops = (0.0, record.uniform or 0.0)
    for row, values in enumerate((record.dynamics.change, record.dynamics.entropy)):
        for i, head in product(range(len(names)), range(values.shape[2])):
            plot.add_trace(_curve(record, row, i, head), row=row + 1, col=i + 1)
        highest = max(float(values.nan_to_num(0.0).max()), tops[row])
        plot.update_yaxes(range=[0, 1.08 * highest], row=row + 1)
    if record.uniform is not None:
        plot.add_hline(y=record.uniform, line={"color": INK, "width": 1, "dash": "dot"}, row=2)
        place = {"x": n_loops - 1, "y": record.uniform, "yshift": 8, "xanchor": "right"}
        note(plot, "dotted: all keys alike", **place, row=2, col=1)
    plot.update_yaxes(showgrid=True)
    plot.update_yaxes(title=_CHANGE.replace(" the", "<br>the"), row=1, col=1)
    plot.update_yaxes(title=_ENTROPY, row=2, col=1)
    plot.update_xaxes(title="loop", row=2)
    plot.update_xaxes(range=[-0.5, n_loops - 0.5], tick0=0, dtick=2 if n_loops <= 24 else None)
    plot.update_layout(legend={"orientation": "h", "y": -0.16, "x": 0.5, "xanchor": "center"})
    return styled(plot, 540).update_layout(margin_b=90)


def _curve(record: AttentionSettling, row: int, block: int, head: int) -> go.Scatter:
    """The change (row 0) or the entropy (row 1) of one head over loops."""
    values = (record.dynamics.change, record.dynamics.entropy)[row][:, block, head]
    name = f"head {head}"
    return go.Scatter(
        x=list(range(len(values))),
        y=values.tolist(),
        mode="lines+markers",
        name=name,
        legendgroup=name,
        showlegend=row == 0 and block == 0,
        marker={"size": 5},
        line={"color": CATEGORIES[head % len(CATEGORIES)], "width": 2},
        hovertemplate=f"loops.%{{x}}.{record.dynamics.names[block]}.attn.hook_pattern<br>{name}<br>"
        f"{(_CHANGE, _ENTROPY)[row]}: %{{y:.3g}}<extra></extra>",
    )


def _maps(record: AttentionSettling) -> go.Figure:
    names, (n_loops, n_layers, n_heads) = record.dynamics.names, record.dynamics.change.shape
    by_head = n_layers * n_heads <= _ROWS
    rows = (
        [f"{name}, head {head}" for name in names for head in range(n_heads)]
        if by_head
        else list(names)
    )
    plot = make_subplots(
        rows=1,
        cols=2,
        shared_yaxes=True,
        subplot_titles=(_CHANGE, _ENTROPY),
        horizontal_spacing=0.13,
    )
    for col, values in enumerate((record.dynamics.change, record.dynamics.entropy), start=1):
        shown = values.flatten(1) if by_head else values.nanmean(2)
        plot.add_heatmap(
            x=list(range(n_loops)),
            y=rows,
            z=shown.T.tolist(),
            zmin=0,
            zmax=1 if col == 1 else float(shown.nan_to_num(0.0).max()),
            colorscale=ACCURACY_SCALE if col == 1 else WARM_SCALE,
            hoverongaps=False,
            xgap=1,
            ygap=1,
            colorbar={"thickness": 10, "outlinewidth": 0, "x": 0.44 if col == 1 else 1.01},
            hovertemplate="loop %{x} · %{y}<br>"
            + (_CHANGE, _ENTROPY)[col - 1]
            + ": %{z:.3g}<extra></extra>",
            row=1,
            col=col,
        )
    plot.update_xaxes(title="loop")
    plot.update_yaxes(
        autorange="reversed", type="category", title="" if by_head else "mean over heads", col=1
    )
    plot.update_yaxes(autorange="reversed", type="category", col=2)
    return styled(plot, 180 + max(240, 16 * len(rows))).update_layout(margin_l=140)


def _found(record: AttentionSettling) -> str:
    settled = [loop for layer in record.settled() for loop in layer]
    known = [loop for loop in settled if loop is not None]
    late = "never for some heads"
    if len(known) == len(settled):
        late = f"by loop {max(known)} for all heads"
    return f"Patterns stand still {late}."


SECTION = Section(
    title="Does attention settle?",
    look_for=(
        "For each head: how much its attention pattern changes from one iteration to the next,"
        " and the entropy of the pattern. A head that goes on changing is still looking for"
        " information. A pattern that no longer changes and is spread over all keys alike has"
        " stopped to look."
    ),
    measure=lambda opened: measure(
        opened.asked, opened.asked.group(opened.config.hops), opened.config.n_loops
    ),
    found=_found,
    serves=of_inputs,
)

EXAMPLE = 'plots.attention_settling("mini/smiles", text="CC(=O)N", n_loops=12)'
