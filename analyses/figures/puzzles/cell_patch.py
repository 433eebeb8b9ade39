"""On which cells does a cell act? The effect of another state in one cell, by how the cells are
related.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from loopscope.analyses.common.records import Record
from loopscope.analyses.puzzles.solver import Solver, SolverConfig, open_solver
from loopscope.interp.common.precision import widened
from loopscope.interp.drawing.look import CATEGORIES, styled
from loopscope.models.core.state import checked_loops
from loopscope.tasks.puzzles.boards import FIRST_DIGIT_ID
from loopscope.tasks.puzzles.sudoku import Sudoku

RELATIONS = ("self", "box", "row", "column", "none")


@dataclass(frozen=True, kw_only=True)
class CellPatchConfig(SolverConfig):
    """Effect of patching the states of one Sudoku cell on the other cells, by the relation of
    the two cells (same box, row, column, or none).
    """

    puzzles: int = 12
    """Held-out puzzles to patch."""


@dataclass(frozen=True)
class CellPatch(Record):
    """The effect of patches.

    After a supervision step both states of one cell are replaced by those of a run on the same
    puzzle with its digits renamed (1 to 2, 2 to 3, ..., the last to 1); then one more step runs.

    Attributes:
        kl: Float[Tensor, "loop relation"], KL divergence of a cell's digits without the patch from
            those with it, in nats; the mean over puzzles, patched cells and cells so related. The
            patch is made after step `loop` and read after the next one.
    """

    kl: Float[Tensor, "loop relation"]

    def frame(self) -> pd.DataFrame:
        """loop (after which the patch is made), relation, kl."""
        rows = [
            (loop, relation, float(self.kl[loop, i]))
            for loop in range(len(self.kl))
            for i, relation in enumerate(RELATIONS)
        ]
        return pd.DataFrame(rows, columns=["loop", "relation", "kl"])

    def summary(self) -> pd.DataFrame:
        """One row per relation: the mean over all steps."""
        return pd.DataFrame({"relation": RELATIONS, "mean KL": self.kl.mean(0).tolist()})


@torch.no_grad()
def run(config: CellPatchConfig) -> CellPatch:
    """Patch every cell of every puzzle after each step but the last.

    Raises:
        ValueError: No puzzle solver, or fewer than two supervision steps.
    """
    solver = open_solver(config, config.puzzles)
    n_loops = checked_loops(config.n_loops, solver.model.cfg.n_loops)
    if n_loops < 2:
        raise ValueError(
            f"a patch is read one step later, so n_loops must be above 1, got {n_loops}"
        )
    side = solver.rules
    related = _relations(side).to(solver.answers.device)
    plain = solver.tokens
    renamed = torch.where(
        plain >= FIRST_DIGIT_ID, (plain - FIRST_DIGIT_ID + 1) % side.side + FIRST_DIGIT_ID, plain
    )
    states = [solver.model.begin(tokens, n_loops=n_loops) for tokens in (plain, renamed)]
    found = []
    for end in solver.model.iteration_ends(n_loops)[:-1]:
        states = [solver.model.advance(state, end) for state in states]
        parts = [(state.resid, state.parts["low"]) for state in states]
        effect = _effects(solver, parts[0], parts[1])
        found.append(torch.stack([effect[:, related == i].mean() for i in range(len(RELATIONS))]))
    return CellPatch(torch.stack(found))


def _relations(rules: Sudoku) -> Tensor:
    """For each patched cell and each read one the index of their relation."""
    cells = range(rules.side**2)
    return torch.tensor(
        [[RELATIONS.index(rules.relation(cell, other)) for other in cells] for cell in cells]
    )


def _effects(
    solver: Solver, own: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]
) -> Float[Tensor, "puzzle patched cell"]:
    """The divergence at every cell one step after a patch of each cell."""
    model, first = solver.model, solver.model.cfg.n_prefix
    n_cells = solver.answers.shape[1]

    def next_step(high: Tensor, low: Tensor) -> Tensor:
        state = model.begin(solver.tokens, n_loops=1, high=high, low=low)
        logits = model.readout(model.advance(state))[:, solver.cells, FIRST_DIGIT_ID:]
        return widened(logits).log_softmax(-1)

    before, patched = next_step(*own), []
    for cell in range(first, first + n_cells):
        swapped = [mine.clone() for mine in own]
        for mine, theirs in zip(swapped, other, strict=True):
            mine[:, cell] = theirs[:, cell]
        after = next_step(*swapped)
        patched.append(F.kl_div(after, before, reduction="none", log_target=True).sum(-1))
    return torch.stack(patched, dim=1)


def figure(record: CellPatch) -> go.Figure:
    """One line per relation over the step after which the patch is made."""
    plot = go.Figure()
    for i, relation in enumerate(RELATIONS):
        plot.add_scatter(
            x=list(range(len(record.kl))),
            y=record.kl[:, i].tolist(),
            mode="lines+markers",
            name=relation,
            line={"color": CATEGORIES[i], "width": 2},
            hovertemplate=f"{relation}<br>after loop %{{x}}<br>%{{y:.3f}} nats<extra></extra>",
        )
    plot.update_xaxes(title="loop after which one cell is patched", dtick=1)
    plot.update_yaxes(title="KL one step later (nats)", rangemode="tozero", showgrid=True)
    return styled(plot, 420)


EXAMPLE = 'plots.cell_patch("mini/sudoku/trm", puzzles=2, n_loops=3)'
