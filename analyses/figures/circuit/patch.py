"""Where is the answer carried? Restore one clean activation at a time in a corrupted run (figures
11 and 21).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pandas as pd
import plotly.graph_objects as go
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.configs import PairConfig
from loopscope.analyses.common.pairs_of import TextPairs, open_pairs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Opened, Section, of_pairs
from loopscope.analyses.common.subject import Subject, words
from loopscope.interp.common.pairs import Direction
from loopscope.interp.drawing.labels import AXIS, label, loop_and_layer, spoken, tick, visible
from loopscope.interp.drawing.look import CELL_TEXT, SIGNED_SCALE, color_bar, styled
from loopscope.interp.patching.activation import activation_patch


@dataclass(frozen=True, kw_only=True)
class PatchConfig(PairConfig):
    """Effect of restoring one clean activation in a corrupted run, for each iteration and layer and
    position (figures 11 and 21).
    """

    site: str = "resid_post"
    """The site that is patched: resid_pre, resid_mid, resid_post, attn_out, mlp_out, ..."""
    n_loops: int | None = None
    """Iterations; by default what the checkpoint records."""
    direction: Literal["denoise", "noise"] = "denoise"
    """denoise: clean into corrupted; noise: corrupted into clean."""


@dataclass(frozen=True)
class PatchingMap(Record):
    """Effect of every patch, on the scale where 0 is the corrupted run and 1 the clean one.

    Attributes:
        clean, corrupted: The texts, pair by pair; effects are means over the pairs.
        answers: The clean texts' answers, whose logit is measured.
        measured: The answer in words, with its source and the token that it is compared with.
        clean_tokens, corrupted_tokens: Tokens of the first pair.
        site: What is patched.
        direction: "denoise" or "noise".
        names: The hook point of each row; the first one is the embedding.
        effect: Float[Tensor, "row pos"].
        clean_margin, corrupted_margin: The mean margin without a patch, in logits.
    """

    clean: tuple[str, ...]
    corrupted: tuple[str, ...]
    answers: tuple[str, ...]
    measured: str
    clean_tokens: tuple[str, ...]
    corrupted_tokens: tuple[str, ...]
    site: str
    direction: Direction
    names: tuple[str, ...]
    effect: Float[Tensor, "row pos"]
    clean_margin: float
    corrupted_margin: float

    def heading(self) -> str:
        """The pair, or the first of several, with the answer."""
        many = f" and {len(self.clean) - 1} more pairs" * (len(self.clean) > 1)
        return f"{self.clean[0]} against {self.corrupted[0]}{many}, answer {self.measured}"

    def columns(self) -> list[str]:
        """The name of each position: its tokens for one pair, its role for several questions."""
        if len(self.clean) == 1:
            both = map(visible, self.clean_tokens), map(visible, self.corrupted_tokens)
            pairs = zip(*both, strict=True)
            return [f"{j} {a}" if a == b else f"{j} {a} / {b}" for j, (a, b) in enumerate(pairs)]
        roles = {"<e": " head entity", "<r": " relation", "<p": " <pad>"}
        return [f"{j}{roles.get(token[:2], '')}" for j, token in enumerate(self.clean_tokens)]

    def frame(self) -> pd.DataFrame:
        """hook (the point that is patched), loop, layer, position, name of the position, effect."""
        rows = [
            (hook, *loop_and_layer(hook), j, name, float(self.effect[i, j]))
            for i, hook in enumerate(self.names)
            for j, name in enumerate(self.columns())
        ]
        frame = pd.DataFrame(rows, columns=["hook", "loop", "layer", "position", "name", "effect"])
        return frame.astype({"loop": "Int64", "layer": "Int64"})

    def summary(self) -> pd.DataFrame:
        """One row per hook point: the position with the largest effect, and the effect."""
        best = self.effect.max(1)
        return pd.DataFrame(
            {
                "hook": self.names,
                "strongest position": [self.columns()[j] for j in best.indices.tolist()],
                "effect": best.values,
            }
        )


def run(config: PatchConfig) -> PatchingMap:
    """Patch every visit and position of one pair, or of all pairs of the data, or of all questions
    of one hop count.
    """
    subject, pairs = open_pairs(config, config.n_loops)
    return measure(subject, pairs, config.site, config.n_loops, config.direction)


def measure(
    subject: Subject,
    pairs: TextPairs,
    site: str = "resid_post",
    n_loops: int | None = None,
    direction: Direction = "denoise",
) -> PatchingMap:
    """The record for some pairs of an open checkpoint."""
    model = subject.model
    sweep = activation_patch(
        model,
        pairs.clean_batch,
        pairs.corrupted_batch,
        pairs.metric(),
        n_loops,
        sites=["embed", site],
        direction=direction,
    )
    width = pairs.clean_batch.tokens.shape[1]
    names = tuple(cell.name for cell in sweep.cells[::width])
    return PatchingMap(
        clean=pairs.clean,
        corrupted=pairs.corrupted,
        answers=pairs.answers.words,
        measured=pairs.measured,
        clean_tokens=words(model, pairs.clean_batch.tokens[0]),
        corrupted_tokens=words(model, pairs.corrupted_batch.tokens[0]),
        site=site,
        direction=direction,
        names=names,
        effect=sweep.normalized().view(len(names), width).float().cpu(),
        clean_margin=float(sweep.clean.mean()),
        corrupted_margin=float(sweep.corrupted.mean()),
    )


def figure(record: PatchingMap) -> go.Figure:
    """Rows are visits, columns are positions, colour is the effect."""
    steps = list(map(tick, record.names))
    pairs = list(zip(record.clean_tokens, record.corrupted_tokens, strict=True))
    which = "" if len(record.clean) == 1 else f"first of {len(record.clean)} pairs: "
    hover = [label(f"{which}clean {a}, corrupted {b}") for a, b in pairs]
    plot = go.Figure()
    plot.add_heatmap(
        x=list(map(label, record.columns())),
        y=steps,
        z=record.effect.tolist(),
        zmid=0,
        zmin=-1,
        zmax=1,
        colorscale=SIGNED_SCALE,
        xgap=1,
        ygap=1,
        text=[
            [f"{value:.2f}".replace("-0.00", "0.00") for value in row]
            for row in record.effect.tolist()
        ],
        texttemplate="%{text}",
        textfont=CELL_TEXT,
        customdata=[
            [f"{name}<br>{spoken(name)}<br>{text}" for text in hover] for name in record.names
        ],
        hovertemplate=("%{customdata}<br>position %{x}<br>effect %{z:.3f}<extra></extra>"),
        colorbar=color_bar("effect<br>0 corrupted<br>1 clean"),
    )
    plot.update_xaxes(title="position", type="category")
    plot.update_yaxes(title=f"{AXIS} of {record.site}", type="category")
    return styled(plot, 170 + 24 * len(steps))


def _counted(record: PatchingMap) -> str:
    count = len(record.clean)
    return "The pair is" if count == 1 else f"Means over {count} pairs such as"


def _of_report(opened: Opened) -> PatchingMap:
    return measure(opened.subject, opened.pairs, n_loops=opened.n_loops)


def _found(record: PatchingMap) -> str:
    strongest = record.effect.argmax(1).tolist()
    moves = [j for i, j in enumerate(strongest) if i == 0 or j != strongest[i - 1]]
    path = " → ".join(record.columns()[j] for j in moves)
    return (
        f"{_counted(record)} {record.clean[0]} against {record.corrupted[0]}; the margin of"
        f" {record.measured} is {record.clean_margin:.2f} clean and {record.corrupted_margin:.2f}"
        f" corrupted. From the embedding upwards the strongest position moves {path}."
    )


SECTION = Section(
    title="What one activation carries",
    look_for=(
        "The corrupted text differs from the clean one. Each cell puts one clean activation into"
        " the corrupted run and shows the share of the clean margin that comes back (0: none, 1:"
        " all of it). Colour means that this activation carries the information for the answer at"
        " that moment. In a model that follows relations, the colour should move along them from"
        " iteration to iteration, and stay at the answer position once the answer is known."
    ),
    measure=_of_report,
    found=_found,
    serves=of_pairs,
)

EXAMPLE = 'plots.patch("mini/smiles", clean="CC(=O)N", corrupted="CC(=S)N")'
