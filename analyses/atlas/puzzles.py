"""Measurements on the puzzle solver."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loopscope.analyses.atlas.material import Numbers, from_random_states, shuffled, solver
from loopscope.analyses.common.configs import LoadedModel
from loopscope.analyses.figures.puzzles import cell_patch, fixed_points
from loopscope.analyses.puzzles.solver import run_cycles
from loopscope.interp.dynamics.growth import auc
from loopscope.tasks.puzzles.boards import FIRST_DIGIT_ID

_STEPS = 8
_REST = 0.05  # of the state's norm
_FEWEST = 10  # wrong boards that are needed to say something of them
_RENAMINGS = 8


def locality() -> Numbers:
    """The effect of a cell's states on related and on unrelated cells."""
    plain = cell_patch.CellPatchConfig(puzzles=50)
    model = LoadedModel(shuffled(solver(1).model), alone=False)
    control = cell_patch.CellPatchConfig(puzzles=50, loaded={plain.checkpoint: model})
    return {
        "related over unrelated": _related(plain),
        "related over unrelated with shuffled weights": _related(control),
    }


def _related(config: cell_patch.CellPatchConfig) -> float:
    summary = cell_patch.run(config).summary().set_index("relation")["mean KL"]
    return float(summary[["box", "row", "column"]].mean() / summary["none"])


def depth_and_breadth() -> Numbers:
    """Whole boards after more steps, and from more first states."""
    puzzles, runs = from_random_states()
    right = torch.stack([(run.boards == puzzles.answers).all(-1) for run in runs])
    first = puzzles.model.cfg.n_cycles - 1
    residual = torch.stack([run.moved[first] for run in runs])
    one, deep = (float(right[:, cycle].double().mean()) for cycle in (first, -1))
    settled = right[:, first].gather(0, residual.argmin(0, keepdim=True))
    best = float(settled.double().mean())
    return {
        "a run at random, after 1 step": one,
        "a run at random, after 16 steps": deep,
        "right after 16 steps minus after 1": deep - one,
        "smallest residual, after 1 step": best,
        "smallest residual minus a run at random": best - one,
        "AUC of the residual": auc(residual.flatten(), ~right[:, first].flatten()),
    }


def trivial_puzzles() -> Numbers:
    """Boards that are nearly solved."""
    record = fixed_points.run(fixed_points.FixedPointsConfig(puzzles=300))
    end = dict(zip(fixed_points.KINDS, record.exact[:, -1].tolist(), strict=True))
    return {
        "one blank, wrong at the end": 1 - end["one blank"],
        "nothing blank, wrong at the end": 1 - end["nothing blank"],
        "as given, right at the end": end["as given"],
    }


def spurious_ends() -> Numbers:
    """Wrong boards whose state is at rest."""
    puzzles, runs = from_random_states()
    end = _STEPS * puzzles.model.cfg.n_cycles - 1
    right = torch.stack([(run.boards[end] == puzzles.answers).all(-1) for run in runs])
    still = torch.stack([run.moved[end] for run in runs]) < _REST
    wrong = int((~right).sum())
    return {
        "wrong boards at rest": float(still[~right].double().mean())
        if wrong >= _FEWEST
        else float("nan"),
        "right boards at rest": float(still[right].double().mean()),
        "wrong boards": float(wrong),
    }


def vote() -> Numbers:
    """The majority of runs on boards with renamed digits."""
    puzzles, generator = solver(300), torch.Generator().manual_seed(0)
    digits, boards = puzzles.model.cfg.d_vocab - FIRST_DIGIT_ID, []
    for _ in range(_RENAMINGS):
        order = torch.randperm(digits, generator=generator)
        names = torch.cat([torch.arange(FIRST_DIGIT_ID), order + FIRST_DIGIT_ID])
        renamed = replace(puzzles, tokens=names[puzzles.tokens])
        boards.append(names.argsort()[run_cycles(renamed, 1).boards[-1]])
    found = torch.stack(boards)
    one = _right(run_cycles(puzzles, 1).boards[-1], puzzles.answers)
    single = sum(_right(board, puzzles.answers) for board in found) / _RENAMINGS
    majority = _right(found.mode(0).values, puzzles.answers)
    return {
        "one run": one,
        "majority of 8 renamings": majority,
        "majority minus one run": majority - one,
        "one renamed run": single,
        "one renamed run minus one run, without its sign": abs(single - one),
    }


def _right(boards: Tensor, answers: Tensor) -> float:
    """The share of boards with every cell right."""
    return float((boards == answers).all(-1).double().mean())
