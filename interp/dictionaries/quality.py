"""The quality of a dictionary on states that it was not trained on, and the life of its features.

Axes: read (a token of an example), loop, feature.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch, begin_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Picked
from loopscope.interp.common.precision import widened
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.dictionaries.dictionary import Dictionary
from loopscope.interp.dictionaries.reading import loop_states
from loopscope.interp.dictionaries.splice import splice
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

_WRITES = 0.1  # a crosscoder's feature is at an iteration where it writes this share of its most
_READS = 4096  # reads encoded at a time


@dataclass(frozen=True)
class DictionaryQuality(OneScreen):
    """How well a dictionary stands for states, iteration by iteration.

    A crosscoder's feature counts as on at an iteration where it is on and writes at least a tenth
    of what it writes at most.

    Attributes:
        kind: Of the dictionary.
        explained: Float[Tensor, " loop"], the share of the states' variance that is explained.
        overall: The same share of all iterations together, around one mean.
        active: Float[Tensor, " loop"], the mean number of features that are on (L0).
        recovered: Float[Tensor, " loop"], 1 - KL of the answers with the dictionary in place of
            the states over their KL with the states' mean in that place, at this iteration alone:
            1 where nothing is lost. NaN where the mean changes nothing.
        recovered_all: The same with the dictionary at every iteration.
        on: Float[Tensor, "loop feature"], the share of reads in which each feature is on.
        first: Float[Tensor, "loop feature"], the share of reads in which a feature is on for the
            first time at this iteration.
        n_reads: Reads.
    """

    kind: str
    explained: Float[Tensor, " loop"]
    overall: float
    active: Float[Tensor, " loop"]
    recovered: Float[Tensor, " loop"]
    recovered_all: float
    on: Float[Tensor, "loop feature"]
    first: Float[Tensor, "loop feature"]
    n_reads: int

    def live(self) -> Bool[Tensor, "*loop_and_feature"]:
        """The features that are on in at least one read: " feature", or "loop feature" where each
        iteration has features of its own.
        """
        return self.on > 0 if self.kind == "per_iteration" else (self.on > 0).any(0)

    def dead(self) -> int:
        """Features that are never on."""
        return int((~self.live()).sum())

    def shared(self, least: int = 2) -> float:
        """The share of the live features that are on at several iterations; NaN where each
        iteration has features of its own.

        Args:
            least: Iterations that count as several.
        """
        if self.kind == "per_iteration":
            return float("nan")
        return float(((self.on > 0).sum(0) >= least).double().sum() / self.live().sum())

    def frame(self) -> pd.DataFrame:
        """One row per iteration: loop, explained, active, recovered, live and new (features that
        are on, and that turn on, at this iteration in at least one read).
        """
        columns = {
            "loop": range(len(self.explained)),
            "explained": self.explained.tolist(),
            "active": self.active.tolist(),
            "recovered": self.recovered.tolist(),
            "live": (self.on > 0).sum(1).tolist(),
            "new": (self.first > 0).sum(1).tolist(),
        }
        return pd.DataFrame(columns)

    def features(self) -> pd.DataFrame:
        """One row per live feature: feature, on (share of reads at the iteration of most), loops
        (how many it is on at), peak (the iteration of most), turns_on (the mean iteration at which
        it is on for the first time in a read). Where each iteration has features of its own, one
        row per live pair of loop and feature: loop, feature, on.
        """
        if self.kind == "per_iteration":
            loop, feature = self.live().nonzero().unbind(1)
            on = self.on[loop, feature].tolist()
            return pd.DataFrame({"loop": loop.tolist(), "feature": feature.tolist(), "on": on})
        live = self.live().nonzero().flatten()
        first = self.first[:, live]
        loops = torch.arange(len(self.on), dtype=first.dtype, device=first.device)
        columns = {
            "feature": live.tolist(),
            "on": self.on[:, live].amax(0).tolist(),
            "loops": (self.on[:, live] > 0).sum(0).tolist(),
            "peak": self.on[:, live].argmax(0).tolist(),
            "turns_on": ((loops[:, None] * first).sum(0) / first.sum(0)).tolist(),
        }
        return pd.DataFrame(columns)

    def plot(self, title: str = "") -> go.Figure:
        """A picture: what is explained, what is recovered, and the life of the features."""
        from loopscope.interp.drawing.dictionaries import quality

        return quality(self, title)


@torch.no_grad()
@evaluated
def dictionary_quality(
    model: LoopedModel,
    dictionary: Dictionary,
    inputs: Inputs,
    *,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
) -> DictionaryQuality:
    """Measure a dictionary on inputs that it was not trained on.

    Args:
        dictionary: Of this model.
        inputs: A batch, texts, or tokens with `readout`.
        positions: The tokens whose states are counted, as for `train_dictionary`; in the runs the
            dictionary stands in place of all of them.

    Raises:
        KeyError, ValueError: As for `splice`.
    """
    dictionary.check(model)
    batch, reading = as_batch(model, inputs, readout), dictionary.reading
    hook, n_loops = reading.hook, reading.n_loops
    states = loop_states(model, batch, n_loops, hook=hook, positions=positions)
    targets = states
    if reading.target != hook:
        targets = loop_states(model, batch, n_loops, hook=reading.target, positions=positions)
    left, on, first = _sums(dictionary, states, targets)
    spread = (targets - targets.mean(0)).square().sum((0, 2))
    whole = (targets - targets.mean((0, 1))).square().sum()
    recovered = _recovered(model, dictionary, batch, targets.mean(0))
    return DictionaryQuality(
        kind=dictionary.kind,
        explained=1 - left / spread,
        overall=float(1 - left.sum() / whole),
        active=on.sum(1) / len(states),
        recovered=recovered[:-1],
        recovered_all=float(recovered[-1]),
        on=on / len(states),
        first=first / len(states),
        n_reads=len(states),
    )


def _sums(
    dictionary: Dictionary,
    states: Float[Tensor, "read loop d_in"],
    targets: Float[Tensor, "read loop d_out"],
) -> tuple[Tensor, Tensor, Tensor]:
    """Summed over reads: what is left of each iteration's states, and how often each feature is on,
    and on for the first time.
    """
    sizes = states.new_zeros(dictionary.n_loops, dictionary.n_features)
    left, on, first = states.new_zeros(dictionary.n_loops), sizes, sizes
    there = presence(dictionary)
    for x, y in zip(states.split(_READS), targets.split(_READS), strict=True):
        codes = dictionary.encode(x)
        left = left + (y - dictionary.decode(codes)).square().sum((0, 2))
        alive = (codes > 0) & there
        on = on + alive.sum(0)
        if dictionary.same_features:
            alive = alive & (alive.cumsum(1) == 1)
        first = first + alive.sum(0)
    return left, on, first


def presence(dictionary: Dictionary) -> Bool[Tensor, "loop feature"]:
    """Where features are when they are on: everywhere, but a crosscoder's where they write."""
    sizes = torch.stack(
        [dictionary.directions(loop).norm(dim=1) for loop in range(dictionary.n_loops)]
    )
    if dictionary.kind != "crosscoder":
        return torch.ones_like(sizes, dtype=torch.bool)
    return sizes >= _WRITES * sizes.amax(0)


def _recovered(
    model: LoopedModel, dictionary: Dictionary, batch: Batch, means: Float[Tensor, "loop d_out"]
) -> Float[Tensor, " loop_and_all"]:
    """The share of the answers' KL that is recovered at each iteration, and at all of them."""
    n_loops, names = dictionary.n_loops, dictionary.reading.written
    reference = batch if dictionary.kind == "crosscoder" else None

    def answers() -> Tensor:
        state = model.advance(begin_batch(model, batch, n_loops))
        return widened(model.readout(state, batch.readout)).log_softmax(-1)

    whole = answers()

    def away(log_probs: Tensor) -> Tensor:
        return (whole.exp() * (whole - log_probs)).sum(-1).mean()

    found = []
    for loops in [*([loop] for loop in range(n_loops)), list(range(n_loops))]:
        chosen = {names[loop]: means[loop] for loop in loops}
        with splice(model, dictionary, loops=loops, error=False, reference=reference):
            spliced = away(answers())
        with model.hooks([(chosen.__contains__, _put(chosen))], n_loops=n_loops):
            found.append(1 - spliced / away(answers()))
    return torch.stack(found).where(torch.stack(found).isfinite(), torch.nan)


def _put(values: dict[str, Tensor]) -> Callable[[Tensor, HookPoint], Tensor]:
    """A hook that writes one vector at each of some points."""
    return lambda value, hook: values[str(hook.name)].to(value.dtype).expand_as(value)
