"""The questions of the atlas that are asked of the puzzle solver; see `rules.py`."""

from __future__ import annotations

from loopscope.analyses.atlas.question import Question
from loopscope.analyses.common.claims import Bound

PUZZLE_QUESTIONS: tuple[Question, ...] = (
    Question(
        name="locality",
        paper="2605.20784",
        title="Interaction Locality in Hierarchical Recursive Reasoning",
        claim="What a cell's state writes in one step goes to cells that the task relates to it.",
        asked="`mini/sudoku/trm`, 50 puzzles: the divergence of a cell's digits one step after"
        " another cell's states are replaced; the mean of the three kinds of related cells (box,"
        " row, column) over unrelated ones.",
        calls=("plots.cell_patch",),
        figure="loopscope cell-patch",
        bounds=(
            Bound("related over unrelated", "at least", 2, 1.2),
            Bound("related over unrelated with shuffled weights", "at most", 1.2, 1.5),
        ),
        control=("related over unrelated with shuffled weights",),
        differs="Boards of 4 x 4 cells; the paper's mazes, ARC and dictionary features are not"
        " asked.",
        known="the effects of one patch by relation of cells on this checkpoint, from the"
        " gallery: a ratio of about 4",
    ),
    Question(
        name="depth_and_breadth",
        paper="2605.21488",
        title="Equilibrium Reasoners",
        claim="More iterations (depth) and more first states (breadth) solve more, and runs that"
        " have converged are those that are right.",
        asked="`mini/sudoku/trm`, 300 puzzles from 8 random first states: whole boards right after"
        " 1 and after 16 steps; after 1 step the run with the smallest residual against a run at"
        " random; and the residual of wrong against right boards after 1 step.",
        calls=("analyses.puzzles.solver.run_cycles",),
        figure="loopscope sudoku",
        bounds=(
            Bound("right after 16 steps minus after 1", "at least", 0.1, 0.03),
            Bound("smallest residual minus a run at random", "at least", 0.02, 0.005),
            Bound("AUC of the residual", "at least", 0.8, 0.65),
        ),
        control=("a run at random, after 1 step",),
        differs="Boards of 4 x 4 cells that need no guess; the model was trained from one first"
        " state and without noise, where the paper trains from random ones.",
        known="that the model solves 0.81 after 1 step and 0.99 after 8, from its card",
        note="Depth alone is shown. After one step from a random first state hardly any board is"
        " right, so there is nothing to choose among, and the residual tells nothing: the"
        " model was trained from one first state.",
    ),
    Question(
        name="trivial_puzzles",
        paper="2601.10679",
        title="Are Your Reasoning Models Reasoning or Guessing?",
        claim="A solver of hard puzzles fails on trivial ones, because a solved board is no fixed"
        " point.",
        asked="`mini/sudoku/trm`, 300 solved boards with one cell blank again, 8 steps.",
        calls=("plots.fixed_points",),
        figure="loopscope fixed-points",
        bounds=(
            Bound("one blank, wrong at the end", "at least", 0.05, 0.01),
            Bound("as given, right at the end", "at least", 0.5, 0.3),
        ),
        control=("as given, right at the end", "nothing blank, wrong at the end"),
        differs="TRM on 4 x 4 boards, where the paper has HRM on 9 x 9 ones.",
        known="that the model solves 0.99 of the puzzles as given, from its card, and the"
        " shares for one blank and for none, from the gallery",
        note="As many boards are wrong with one blank or none as among the puzzles as given:"
        " trivial boards are no harder here.",
    ),
    Question(
        name="spurious_ends",
        paper="2601.10679",
        title="Are Your Reasoning Models Reasoning or Guessing?",
        claim="A run that reaches a wrong fixed point stays there.",
        asked="`mini/sudoku/trm`, 300 puzzles from 8 random first states, 8 steps: the share of the"
        " wrong boards whose last cycle moves the state by less than 0.05 of its norm; not asked"
        " with fewer than 10 wrong boards.",
        calls=("analyses.puzzles.solver.run_cycles",),
        figure="loopscope fixed-points",
        bounds=(Bound("wrong boards at rest", "at least", 0.5, 0.2),),
        control=("right boards at rest", "wrong boards"),
        differs="TRM on 4 x 4 boards, where the paper has HRM on 9 x 9 ones.",
        known="how many boards end wrong and at rest from changed first states, from the gallery",
        note="The wrong boards come from random first states, which the model was not trained on;"
        " from its own first state very few boards end wrong.",
    ),
    Question(
        name="vote",
        paper="2601.10679",
        title="Are Your Reasoning Models Reasoning or Guessing?",
        claim="Several guesses help: a vote of runs on changed inputs solves more than one run.",
        asked="`mini/sudoku/trm`, 300 puzzles after 1 step, where a fifth is still wrong: the"
        " majority of 8 renamings of the digits, cell by cell, against one run.",
        calls=("analyses.puzzles.solver.run_cycles",),
        bounds=(
            Bound("majority minus one run", "at least", 0.02, 0.005),
            Bound("one renamed run minus one run, without its sign", "at most", 0.02, 0.05),
        ),
        control=("one renamed run minus one run, without its sign",),
        differs="Renamed digits are one of the paper's changes of the input; its augmented training"
        " and its several trained models are not asked.",
        known="that the model solves 0.81 after 1 step, from its card",
    ),
)
