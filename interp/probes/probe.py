"""Probes at every place of a run, with held-out score, control task and permutation test."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Picked, Place
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.probes.logistic import Code, code_of, fit_logistic
from loopscope.interp.probes.ridge import Linear, check_strength, fit_ridge
from loopscope.interp.probes.states import ReadStates, split_rows
from loopscope.interp.probes.tasks import Task, types_of
from loopscope.models.basis.names import NamesFilter
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go

Kind = Literal["ridge", "logistic"]


@dataclass(frozen=True)
class Probe(OneScreen):
    """Linear probes of one property, one at each place.

    Scores are those of held-out rows: accuracy for classes, R2 for numbers.

    Attributes:
        places: Where the states were read, in the order of the run.
        metric: "accuracy" or "R2".
        score: Float[Tensor, " place"].
        constant: The score of the best answer that looks at no state.
        control: Float[Tensor, " place"], the score of the control task; None without one.
        permuted: Float[Tensor, "permutation place"], scores for targets in a random order.
        code: The description length of the fitted rows' classes; None where it was not asked for.
        maps: The probe at each place: an affine map from the state to one output for each class, to
            the one output of a number, or (logistic, two classes) to the log-odds of the second.
        classes: Int[Tensor, " class"], the target of each output; None for numbers.
        n_train, n_test: Reads that were fitted, and held out.
    """

    places: tuple[Place, ...]
    metric: str
    score: Float[Tensor, " place"]
    constant: float
    control: Float[Tensor, " place"] | None
    permuted: Float[Tensor, "permutation place"]
    code: Code | None
    maps: tuple[Linear, ...]
    classes: Int[Tensor, " class"] | None
    n_train: int
    n_test: int

    def selectivity(self) -> Float[Tensor, " place"]:
        """Score minus the control task's score (Hewitt & Liang, arXiv 1909.03368)."""
        if self.control is None:
            raise ValueError("selectivity needs the control task; call probe(..., control=True)")
        return self.score - self.control

    def p_value(self) -> Float[Tensor, " place"]:
        """(1 + permutations that score at least as well) / (1 + permutations); a permutation whose
        score is NaN counts as one that does, and a score that is NaN has the p value NaN.
        """
        if not len(self.permuted):
            raise ValueError("a p value needs permutations; call probe(..., permutations=99)")
        as_good = (~(self.permuted < self.score)).sum(0).double()
        return ((1 + as_good) / (1 + len(self.permuted))).where(~self.score.isnan(), torch.nan)

    def frame(self) -> pd.DataFrame:
        """One row per place: place (the hook point), visit, loop, layer, site, score, constant; and
        what was asked for of control, selectivity, p_value, bits and compression (uniform bits over
        bits).
        """
        rows = [(p.name, p.visit, p.loop, p.layer, p.site) for p in self.places]
        frame = pd.DataFrame(rows, columns=["place", "visit", "loop", "layer", "site"])
        frame = frame.astype({"loop": "Int64", "layer": "Int64"})
        frame = frame.assign(score=self.score.numpy(), constant=self.constant)
        if self.control is not None:
            frame["control"], frame["selectivity"] = (
                self.control.numpy(),
                self.selectivity().numpy(),
            )
        if len(self.permuted):
            frame["p_value"] = self.p_value().numpy()
        if self.code is not None:
            frame["bits"] = self.code.bits.numpy()
            frame["compression"] = self.code.compression().numpy()
        return frame

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the score over places, with its controls."""
        from loopscope.interp.drawing.probes import probe

        return probe(self, title)


@torch.no_grad()
@evaluated
def probe(
    model: LoopedModel,
    inputs: Inputs,
    targets: Shaped[Tensor, ...],
    places: NamesFilter | None = None,
    n_loops: int | None = None,
    *,
    kind: Kind = "ridge",
    positions: Picked | int | None = None,
    types: Shaped[Tensor, ...] | None = None,
    control: bool = True,
    permutations: int = 0,
    bits: bool = False,
    strength: float = 1.0,
    held_out: float | Bool[Tensor, " batch"] = 0.25,
    readout: ReadoutColumn = None,
    batch_size: int = 512,
    seed: int = 0,
) -> Probe:
    """Fit a linear probe of a property at every place, and score it on rows held out.

    Every row is run once. "ridge" streams its sums, so that memory does not grow with the rows;
    "logistic" keeps the states of all places.

    Args:
        inputs: A batch, texts, or tokens with `readout`.
        targets: One per row, "batch", or one per column that is read, "batch k": integers are
            classes, floats are numbers (for "ridge").
        places: Hook points by name, pattern or list; None means the residual after every visit.
        n_loops: Iterations; None means what the checkpoint records.
        kind: "ridge" regression (of +1 and -1 for classes), or "logistic" regression.
        positions: Columns to read instead of the readout; "all" for every token that is
            not padding.
        types: Integers in the form of `targets`, the types to which the control task gives random
            values; None means the token that is read.
        control: Whether to fit the control task too.
        permutations: How often the rows' targets are shuffled and fitted, for a p value.
        bits: Whether to measure the description length, for "logistic".
        strength: The weight of the squared length of the probe beside the squared error ("ridge")
            or the summed log loss times two ("logistic"): scikit-learn's alpha, and its 1 / C.
        held_out: A share of the rows, drawn at random, or which rows.
        batch_size: Rows run at a time.
        seed: Of the split, the control task and the permutations.

    Raises:
        KeyError: A place that the call does not have.
        ValueError: Targets or types that do not fit, too few rows or classes, states that are not
            finite, or something that the kind cannot do.

    Source:
        Control tasks: Hewitt & Liang, arXiv 1909.03368; description length: Voita & Titov, arXiv
        2003.12298.
    """
    check_strength(strength)
    if permutations < 0:
        raise ValueError(f"permutations must be at least 0, got {permutations}")
    batch = as_batch(model, inputs, readout)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    states = ReadStates.of(model, batch, places, positions, n_loops, batch_size)
    task = Task.of(states, targets)
    _check_kind(kind, task, bits)
    generator = torch.Generator().manual_seed(seed)
    train, test = split_rows(len(batch), held_out, seed)
    tasks = [task]
    if control:
        tasks.append(task.control(types_of(states, types), generator))
    tasks += [task.shuffled(states, generator) for _ in range(permutations)]
    fit_on, held = states.reads(train), states.reads(test)
    code = None
    if kind == "ridge":
        fitted = fit_ridge(states, tasks, train, test, strength)
    else:
        fitted, kept = fit_logistic(states, tasks, train, test, strength)
        code = code_of(kept, task, fit_on, strength) if bits else None
    scores = torch.tensor(
        [[t.score(a, held) for t, a in zip(tasks, own, strict=True)] for own in fitted.answers],
        dtype=torch.float64,
    )
    return Probe(
        places=states.places,
        metric=task.metric,
        score=scores[:, 0],
        constant=task.constant(fit_on, held),
        control=scores[:, 1] if control else None,
        permuted=scores[:, 1 + control :].T,
        code=code,
        maps=fitted.maps,
        classes=task.classes,
        n_train=len(fit_on),
        n_test=len(held),
    )


def _check_kind(kind: str, task: Task, bits: bool) -> None:
    if kind not in ("ridge", "logistic"):
        raise ValueError(f"kind must be 'ridge' or 'logistic', got {kind!r}")
    if kind == "ridge" and bits:
        raise ValueError(
            "a description length needs the probabilities of classes, which a ridge probe does not"
            " have; pass kind='logistic'"
        )
    if kind == "logistic" and task.classes is None:
        raise ValueError(
            "a logistic probe tells classes apart, but these targets are numbers; pass integers, or"
            " kind='ridge'"
        )
