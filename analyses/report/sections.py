"""The sections of the report: a figure, what to look for in it, and what this checkpoint shows in
numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from loopscope.analyses.common.records import Record
from loopscope.analyses.figures.answers import (
    flips,
    halting_compare,
    halting_curves,
    margins,
    overthinking,
    recurrence_grid,
    recurrence_grids,
)
from loopscope.analyses.figures.circuit import lens_heatmap, patching_map, ranks
from loopscope.analyses.figures.dynamics import attention_settling, orbits, steps


@dataclass(frozen=True)
class Section:
    """One figure of the page.

    Attributes:
        key: Its anchor.
        title: Its heading.
        look_for: What to look for, in general.
        found: What this checkpoint shows, in numbers.
        record: The record behind it.
        figure: The figure.
    """

    key: str
    title: str
    look_for: str
    found: str
    record: Record
    figure: go.Figure


def margin_section(record: overthinking.Overthinking) -> Section:
    drop, (peak, where) = record.drop(), record.peak()
    answered = [i for i in range(len(record.hops)) if peak[i] > 0] or list(range(len(record.hops)))
    worst = max(answered, key=lambda i: float(drop[i]))
    falling = [str(hop) for hop, fall in zip(record.hops, drop.tolist(), strict=True) if fall > 0.5]
    found = (
        f"Among the hop counts that are answered on average, {record.hops[worst]} falls most: its"
        f" mean margin peaks at {peak[worst]:.2f} in iteration {int(where[worst])} and ends at"
        f" {record.margin[worst, -1]:.2f}. Hop counts that end more than half a logit below their"
        f" peak: {', '.join(falling) or 'none'}."
    )
    look_for = (
        "Each curve is the mean margin of the right answer over its strongest rival after every"
        " iteration; dashed lines mark the mean first iteration that has the answer on top (t*). A"
        " curve that falls after its peak is overthinking: more iterations make the answer worse."
        " Questions with more hops should rise later."
    )
    return Section(
        "margin",
        "Logit margin and overthinking",
        look_for,
        found,
        record,
        overthinking.figure(record),
    )


def grid_section(record: recurrence_grid.RecurrenceGrid) -> Section:
    best = record.accuracy.max(1).values
    trained = record.trained_hops or 0
    beyond = [
        hop
        for hop, accuracy in zip(record.hops, best.tolist(), strict=True)
        if hop > trained and accuracy >= 0.6
    ]
    inside = best[: sum(hop <= trained for hop in record.hops)]
    found = (
        f"Hop counts in training reach at least {inside.min():.2f} at their best r. "
        if trained
        else ""
    )
    reach = (
        f"up to {max(beyond)} hops stay at 0.60 or better"
        if beyond
        else "no hop count reaches 0.60"
    )
    found += f"Beyond training {reach}." if trained else f"Over all hop counts, {reach}."
    look_for = (
        "Every cell is the accuracy that the model has when it is stopped after r iterations; all"
        " rows come from one run. Right of the dotted line no question of that depth was in"
        " training. Deeper questions need more iterations; columns that pale towards the top"
        " overthink. The row r* lets an adaptive rule choose when to stop."
    )
    return Section(
        "grid",
        "Accuracy by hops and iterations",
        look_for,
        found,
        record,
        recurrence_grid.figure(record),
    )


def lens_section(record: lens_heatmap.LensHeatmap) -> Section:
    reached = [token for k, token in enumerate(record.tracked) if bool((record.rank[k] == 0).any())]
    found = (
        f"The question is {record.text}; the answer is {record.answer}. "
        f"Of its {len(record.tracked)} tracked tokens, {len(reached)} come out on top somewhere."
    )
    look_for = (
        "Read the residual stream as if the model stopped here: the top token at every position"
        " after every block. In a model that follows the relations one after another, each"
        " intermediate entity appears at its own relation, one iteration after the one before it."
        " The right panel follows the rank of each entity at its own relation."
    )
    return Section(
        "lens", "Logit lens of one question", look_for, found, record, lens_heatmap.figure(record)
    )


def patch_section(record: patching_map.PatchingMap) -> Section:
    strongest = record.effect.argmax(1).tolist()
    moves = [j for i, j in enumerate(strongest) if i == 0 or j != strongest[i - 1]]
    path = " → ".join(record.columns()[j] for j in moves)
    found = (
        f"Means over {len(record.clean)} pairs such as {record.clean[0]} against"
        f" {record.corrupted[0]}; the margin of the clean answer is {record.clean_margin:.2f} clean"
        f" and {record.corrupted_margin:.2f} corrupted. From the embedding upwards the strongest"
        f" position moves {path}."
    )
    look_for = (
        "Each corrupted question starts from another entity. A cell puts one clean activation into"
        " the corrupted run and measures how much of the clean margin comes back (1 = all of it)."
        " Where the colour is, the answer's history is being carried at that moment: it should walk"
        " along the relations as the iterations go by, and stay at the readout once the answer is"
        " known."
    )
    return Section(
        "patching",
        "What one activation carries",
        look_for,
        found,
        record,
        patching_map.figure(record),
    )


def halting_section(record: halting_curves.HaltingCurves) -> Section:
    both, kl_only = record.accuracy.mean(1)[:2].tolist()
    used = record.loops_used.mean(1).tolist()
    found = (
        f"The rule with both conditions uses {used[0]:.1f} iterations on average for an accuracy of"
        f" {both:.2f}; KL alone stops after {used[1]:.1f} with {kl_only:.2f}."
    )
    look_for = (
        "An adaptive rule watches the model's own answers: it stops when two successive ones agree"
        " (small KL) and the answer is sure (small entropy). A good rule uses more iterations for"
        " deeper questions and loses little against the best fixed r (dotted). KL alone tends to"
        " stop while nothing has happened yet."
    )
    return Section(
        "halting", "Adaptive halting", look_for, found, record, halting_curves.figure(record)
    )


def flips_section(record: flips.Flips) -> Section:
    """Changes of the answer."""
    share = record.flips[0].share
    late = share[:, :, max(0, (record.flips[0].trained_loops or 1) - 1) :].sum(2).mean(1)
    found = (
        f"Per question, over all hop counts: {float(share[0].sum(1).mean()):.2f} changes to the"
        f" right answer and {float(share[1].sum(1).mean()):.2f} away from it; after the training R,"
        f" {float(late[0]):.2f} and {float(late[1]):.2f}."
    )
    look_for = (
        "Each cell is the share of questions of one hop count whose top answer changes at that"
        " iteration. Right answers should appear along a diagonal, deeper questions later. Changes"
        " from right to wrong at late iterations are overthinking, question by question."
    )
    return Section("flips", "Answer flips", look_for, found, record, flips.figure(record))


def ranks_section(record: ranks.Ranks) -> Section:
    """Ranks of the entities on the way."""
    arrived = ", ".join(
        f"{name} at {depth or 'never'}"
        for name, depth in zip(record.targets, record.arrivals(), strict=True)
    )
    look_for = (
        "The rank of each entity on the way, where it should be known, after every block: 1 is the"
        " top token. Curves that arrive one after another show a step by step computation; a"
        " control token that nobody asks for should stay where it is."
    )
    return Section(
        "ranks",
        "Rank trajectories",
        look_for,
        f"First on top at depth: {arrived}.",
        record,
        ranks.figure(record),
    )


def orbits_section(record: orbits.OrbitPaths) -> Section:
    """Orbits of the state."""
    kinds = [f"{state} ({direction} in direction)" for state, direction in record.kinds()]
    counted = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    look_for = (
        "The state at the readout after every iteration, in its first principal components, and its"
        " direction alone, which is what the final norm passes on. A fixed point stops, a slider"
        " goes on straight ahead, an orbit comes back."
    )
    return Section(
        "orbits",
        "Orbits of the state",
        look_for,
        f"Of the paths shown: {counted}.",
        record,
        orbits.figure(record),
    )


def steps_section(record: steps.Steps) -> Section:
    """Sizes and directions of the steps."""
    still = record.summary().iloc[:, 2]
    found = (
        f"The state turns by less than one degree per iteration from iteration {still.iloc[0]}"
        f" ({record.groups[0]}) to {still.iloc[-1]} ({record.groups[-1]}) on."
    )
    look_for = (
        "How far and in which direction the state moves at each iteration, one curve per hop count."
        " While something is computed, steps turn; once the answer is there, they should point the"
        " same way or vanish. Deeper questions should settle later."
    )
    return Section("steps", "Step sizes and angles", look_for, found, record, steps.figure(record))


def attention_section(record: attention_settling.AttentionSettling) -> Section:
    """Whether attention settles."""
    settled = [t for layer in record.settled() for t in layer]
    late = (
        "never for some heads"
        if None in settled
        else f"by iteration {max(t for t in settled if t is not None)} for all heads"
    )
    look_for = (
        "How much each head's attention pattern changes from one iteration to the next, and its"
        " entropy. Heads that go on changing are still looking; a pattern that stands still over"
        " all keys alike has stopped to look."
    )
    found = f"Patterns stand still {late}."
    return Section(
        "attention",
        "Does attention settle?",
        look_for,
        found,
        record,
        attention_settling.figure(record),
    )


def grids_section(record: recurrence_grids.RecurrenceGrids) -> Section:
    """Accuracy of several checkpoints."""
    reached = [
        f"{panel.checkpoint} {recurrence_grids.reached(grid)}"
        for panel, grid in zip(record.panels, record.grids, strict=True)
    ]
    look_for = (
        "The grid of every checkpoint with one colour scale; lines mark the training R and the"
        " deepest hop count learned."
    )
    found = f"Deepest hop count at 0.60 or better at any r: {', '.join(reached)}."
    return Section(
        "grids",
        "Accuracy by hops and iterations",
        look_for,
        found,
        record,
        recurrence_grids.figure(record),
    )


def margins_section(record: margins.Margins) -> Section:
    """Margins of several checkpoints."""
    falls = [
        f"{panel.checkpoint} {float(each.drop().max()):.2f}"
        for panel, each in zip(record.panels, record.margins, strict=True)
    ]
    look_for = (
        "The mean margin of every hop count, one panel per checkpoint on one scale; dashed lines"
        " mark the mean first hit t*."
    )
    found = f"Largest fall of a mean margin below its peak, in logits: {', '.join(falls)}."
    return Section("margins", "Logit margins", look_for, found, record, margins.figure(record))


def halting_compare_section(record: halting_compare.HaltingCompare) -> Section:
    """Halting of several checkpoints."""
    rows = [
        f"{panel.checkpoint} {float(curves.accuracy[0].mean()):.2f} in"
        f" {float(curves.loops_used[0].mean()):.1f}"
        for panel, curves in zip(record.panels, record.curves, strict=True)
    ]
    look_for = (
        "Iterations used and accuracy with halting on KL and entropy, and on KL alone; the shaded"
        " hop counts were not in training."
    )
    found = f"Accuracy and mean iterations with both conditions: {', '.join(rows)}."
    return Section(
        "halting-compare",
        "Adaptive halting",
        look_for,
        found,
        record,
        halting_compare.figure(record),
    )
