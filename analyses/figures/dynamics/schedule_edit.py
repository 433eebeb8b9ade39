"""Does iteration 3 matter, or only that there are enough of them? Answers when one iteration or one
block is skipped, repeated or frozen.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.analyses.common.configs import InputsConfig
from loopscope.analyses.common.inputs_of import Asked, Group, open_inputs
from loopscope.analyses.common.records import Record
from loopscope.analyses.common.sections import Section
from loopscope.analyses.common.subject import own_answers
from loopscope.interp.drawing.cells import CellMap, cell_maps
from loopscope.interp.edit.schedule import Freeze, schedule_edit
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.schedule import UnrunnableSchedule
from loopscope.models.core.state import checked_loops


@dataclass(frozen=True, kw_only=True)
class ScheduleEditConfig(InputsConfig):
    """The share of right answers when one iteration or one block of it is skipped, repeated, or
    frozen at what it added before.
    """

    n_loops: int | None = None
    """Iterations of the unchanged run; by default what the checkpoint records."""


class _Edit(NamedTuple):
    """One edit: its row, its iteration, and its list of visits."""

    name: str
    loop: int
    order: list[str | Freeze]


@dataclass(frozen=True)
class ScheduleEdits(Record):
    """The share of right answers under each edit.

    Attributes:
        inputs: How many inputs.
        hops: Their hop count; None for texts and token ids.
        own: Whether the answers are those of the unchanged run, as no others are known.
        base: The share of right answers of the unchanged run.
        fewer, more: The shares with one iteration less, and with one more; NaN where the model
            cannot run as many.
        edits: What is done, in the order of `values`.
        values: Float[Tensor, "edit loop"]; NaN where there is no such edit, or where the family
            refuses it.
    """

    inputs: int
    hops: int | None
    own: bool
    base: float
    fewer: float
    more: float
    edits: tuple[str, ...]
    values: Float[Tensor, "edit loop"]

    def frame(self) -> pd.DataFrame:
        """edit, loop, accuracy, base (accuracy of the unchanged run)."""
        rows = [
            (edit, loop, float(value), self.base)
            for edit, row in zip(self.edits, self.values, strict=True)
            for loop, value in enumerate(row)
        ]
        return pd.DataFrame(rows, columns=["edit", "loop", "accuracy", "base"])

    def summary(self) -> pd.DataFrame:
        """One row per edit: the worst and the best share of right answers, and the loop of the
        worst; the unchanged, a shorter and a longer run above them.
        """
        rows: list[tuple[str, float, float, int | str]] = [
            ("none", self.base, self.base, ""),
            ("one loop fewer", self.fewer, self.fewer, ""),
            ("one loop more", self.more, self.more, ""),
        ]
        for edit, row in zip(self.edits, self.values, strict=True):
            kept = row[~row.isnan()]
            if len(kept):
                worst = int(row.nan_to_num(torch.inf).argmin())
                rows.append((edit, float(kept.min()), float(kept.max()), worst))
        return pd.DataFrame(rows, columns=["edit", "worst", "best", "worst at loop"])


def run(config: ScheduleEditConfig) -> ScheduleEdits:
    """Try every edit on the questions of one hop count, or on what is given."""
    asked = open_inputs(config)
    return measure(asked, asked.group(config.hops), config.n_loops)


def measure(asked: Asked, group: Group, n_loops: int | None = None) -> ScheduleEdits:
    """The record for one group of inputs of an open checkpoint."""
    model = asked.subject.model
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    answers = asked.answers(group, n_loops=n_loops)

    def accuracy(length: int) -> float:
        return float((own_answers(model, group.batch, length) == answers.ids).double().mean())

    def plain(length: int) -> float:
        try:
            model.schedule(length)
        except ValueError:  # no iteration left, or more than the family has
            return float("nan")
        return accuracy(length)

    edits = list(_edits(model, n_loops))
    names = tuple(dict.fromkeys(edit.name for edit in edits))
    values = torch.full((len(names), n_loops), torch.nan, dtype=torch.float64)
    for edit in tqdm(edits, desc="edits", leave=False):
        try:
            with schedule_edit(model, edit.order, n_loops):
                assert model.edited is not None, "the context has put it there"
                values[names.index(edit.name), edit.loop] = accuracy(model.edited.n_loops)
        except UnrunnableSchedule:
            continue
    return ScheduleEdits(
        len(group.batch), group.hops, answers.own, accuracy(n_loops), plain(n_loops - 1),
        plain(n_loops + 1), names, values,
    )  # fmt: skip


def _edits(model: LoopedModel, n_loops: int) -> Iterator[_Edit]:
    """Every edit of one iteration, and of one block of it."""
    visits = [visit.name for visit in model.schedule(n_loops) if visit.loop is not None]
    for loop in range(n_loops):
        place = f"loops.{loop}."
        here = [name for name in visits if name.startswith(place)]
        blocks = {name.removeprefix(place): [name] for name in here}
        for what, chosen in {"loop": here, **blocks}.items():
            at = visits.index(chosen[0])
            before, after = visits[:at], visits[at + len(chosen) :]
            yield _Edit(f"skip {what}", loop, [*before, *after])
            if what == "loop":
                yield _Edit(f"repeat {what}", loop, [*before, *chosen, *chosen, *after])
            if loop:
                frozen = _frozen(chosen, place, f"loops.{loop - 1}.")
                yield _Edit(f"freeze {what}", loop, [*before, *frozen, *after])


def _frozen(names: list[str], place: str, earlier: str) -> list[Freeze]:
    """Visits that are frozen at the iteration before."""
    return [Freeze(name, name.replace(place, earlier, 1)) for name in names]


def figure(record: ScheduleEdits) -> go.Figure:
    """A map: edits up, iterations along, the share of right answers as the colour."""
    unit = "answers of the\nunchanged run" if record.own else "right answers"
    cells = CellMap(
        title=f"unchanged: {record.base:.2f}; one loop fewer: {record.fewer:.2f}; one more:"
        f" {record.more:.2f}",
        columns=list(range(record.values.shape[1])),
        rows=list(record.edits)[::-1],
        values=record.values.flip(0).tolist(),
        unit=unit,
        axes=("loop that is edited", ""),
    )
    return cell_maps([cells]).update_layout(margin_l=150)


def _found(record: ScheduleEdits) -> str:
    skipped = record.values[record.edits.index("skip loop")]
    kept = skipped[~skipped.isnan()]
    if not len(kept):
        return "This family runs no list with an iteration less."
    if float(kept.max() - kept.min()) < 0.005:
        return (
            f"Which iteration is skipped does not matter: {float(kept[0]):.2f} of the answers are"
            f" right without any of them, against {record.base:.2f} with all."
        )
    worst = int(skipped.nan_to_num(torch.inf).argmin())
    return (
        f"Skipping an iteration leaves {float(kept.min()):.2f} (loop {worst}) to"
        f" {float(kept.max()):.2f} of the answers right, against {record.base:.2f} with all."
    )


SECTION = Section(
    title="Does each iteration matter?",
    look_for=(
        "The share of right answers if one iteration, or one block of it, is skipped, repeated,"
        " or frozen (it adds again what it added in the iteration before). If all iterations do"
        " the same, skipping any of them has the effect of one iteration less. A freeze shows"
        " which iterations work on something new."
    ),
    measure=lambda opened: measure(
        opened.asked, opened.asked.group(opened.config.hops), opened.n_loops
    ),
    found=_found,
    serves=lambda opened: opened.subject.model.runs_visits and opened.n_loops > 1,
)

EXAMPLE = 'plots.schedule_edit("mini/smiles", text="CC(=O)N", n_loops=4)'
