"""The quality of a dictionary on states that it was not trained on, and the life of its features.

Axes: read (a token of an example), loop, feature.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
from loopscope.interp.dictionaries.reading import Reading, loop_states
from loopscope.interp.dictionaries.splice import splice
from loopscope.interp.dictionaries.stored import Pair, StoredStates, refuse_choice
from loopscope.interp.store.reading import ActivationStore
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel

if TYPE_CHECKING:
    import plotly.graph_objects as go

_WRITES = 0.1  # a crosscoder's feature is at an iteration where it writes this share of its most
_READS = 4096  # reads encoded at a time


@dataclass(frozen=True)
class DictionaryQuality(OneScreen):
    """How well a dictionary reconstructs states, iteration by iteration.

    A feature of a crosscoder counts as on at an iteration only if it writes there at least a tenth
    of the most that it writes at any iteration.

    Attributes:
        kind: The kind of the dictionary.
        explained: Float[Tensor, " loop"], the share of the states' variance that the dictionary
            explains.
        overall: The share of the variance of the states of all iterations together, around one
            mean, that the dictionary explains.
        active: Float[Tensor, " loop"], the mean number of features that are on (L0).
        recovered: Float[Tensor, " loop"], how much of the answers survives if the reconstruction
            replaces the states of this iteration alone. It is 1 - KL(reconstruction) / KL(mean):
            the KL of the answers with the reconstruction, over their KL with the states' mean in
            its place. 1 means that nothing is lost. NaN if the mean changes nothing, and for a
            store, because nothing is run.
        recovered_all: The same ratio if the reconstruction replaces the states of every iteration.
        on: Float[Tensor, "loop feature"], the share of reads at which each feature is on.
        first: Float[Tensor, "loop feature"], the share of reads at which a feature is on for the
            first time at this iteration.
        n_reads: The number of reads.
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
        """Which features are on at one read or more. The axes are " feature", or "loop feature" if
        each iteration has features of its own.
        """
        return self.on > 0 if self.kind == "per_iteration" else (self.on > 0).any(0)

    def dead(self) -> int:
        """The number of features that are never on."""
        return int((~self.live()).sum())

    def shared(self, least: int = 2) -> float:
        """The share of the live features that are on at several iterations; NaN if each iteration
        has features of its own.

        Args:
            least: How many iterations count as several.
        """
        least = checked_count(least, "least")
        if self.kind == "per_iteration":
            return float("nan")
        return float(((self.on > 0).sum(0) >= least).double().sum() / self.live().sum())

    def frame(self) -> pd.DataFrame:
        """One row per iteration. The columns are loop, explained, active, recovered, live and new.
        The last two count the features that are on, and that turn on, at this iteration at one read
        or more.
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
        """One row per live feature. The columns are feature, on (the largest share of reads at any
        iteration), loops (at how many iterations the feature is on), peak (the iteration with the
        largest share) and turns_on (the mean iteration at which it is on for the first time in a
        read).

        If each iteration has features of its own, there is one row per live pair of iteration and
        feature, with the columns loop, feature and on.
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
    inputs: Inputs | ActivationStore,
    *,
    positions: Picked | int | None = "all",
    readout: ReadoutColumn = None,
) -> DictionaryQuality:
    """Measure how well a dictionary reconstructs states of inputs that it was not trained on.

    Args:
        dictionary: A dictionary of this model.
        inputs: A `Batch`, texts, or token ids. Or a store of this model's activations, which is
            read in batches; then no model is run, so `recovered` is NaN.
        readout: For token ids, the column at which answers are read.
        positions: The tokens whose states are counted: "all" except padding, some columns, or None
            for the answer position. In the runs that give `recovered`, the reconstruction replaces
            the states of all tokens.

    Returns:
        The measures of each iteration and feature.

    Raises:
        KeyError: The model does not have a hook of the dictionary.
        ValueError: The dictionary or the store is of another model, tokenizer or number of
            iterations.
    """
    dictionary.check(model)
    if isinstance(inputs, ActivationStore):
        refuse_choice(positions, readout)
        stored = StoredStates(inputs, model, dictionary.reading)
        sums = _Sums.of(dictionary, lambda: stored.batches(_READS))
        recovered = sums.left.new_full((dictionary.n_loops + 1,), torch.nan)
    else:
        batch = as_batch(model, inputs, readout)
        sums = _Sums.of(dictionary, _in_memory(model, dictionary.reading, batch, positions))
        recovered = _recovered(model, dictionary, batch, sums.mean)
    return DictionaryQuality(
        kind=dictionary.kind,
        explained=1 - sums.left / sums.spread,
        overall=float(1 - sums.left.sum() / sums.whole),
        active=sums.on.sum(1) / sums.n_reads,
        recovered=recovered[:-1],
        recovered_all=float(recovered[-1]),
        on=sums.on / sums.n_reads,
        first=sums.first / sums.n_reads,
        n_reads=sums.n_reads,
    )


def _in_memory(
    model: LoopedModel, reading: Reading, batch: Batch, positions: Picked | int | None
) -> Callable[[], Iterator[Pair]]:
    """Batches of the states of some inputs."""
    hooks = dict.fromkeys((reading.hook, reading.target))
    each = [
        loop_states(model, batch, reading.n_loops, hook=hook, positions=positions) for hook in hooks
    ]
    return lambda: zip(each[0].split(_READS), each[-1].split(_READS), strict=True)


@dataclass(frozen=True)
class _Sums:
    """Sums over reads.

    Attributes:
        n_reads: Reads.
        mean: Of what is written, at each iteration.
        left: What is left of each iteration's states; squared, as `spread` and `whole` are.
        spread: Their distance from the iteration's mean.
        whole: The distance of the states of all iterations from one mean.
        on, first: How often each feature is on, and on for the first time.
    """

    n_reads: int
    mean: Float[Tensor, "loop d_out"]
    left: Float[Tensor, " loop"]
    spread: Float[Tensor, " loop"]
    whole: Float[Tensor, ""]
    on: Float[Tensor, "loop feature"]
    first: Float[Tensor, "loop feature"]

    @classmethod
    def of(cls, dictionary: Dictionary, batches: Callable[[], Iterator[Pair]]) -> _Sums:
        """The sums of the batches, which are gone through twice."""
        mean, n_reads, there = _mean(batches()), 0, presence(dictionary)
        left = mean.new_zeros(dictionary.n_loops)
        spread, whole = left, left.sum()
        on = first = mean.new_zeros(dictionary.n_loops, dictionary.n_features)
        for x, y in batches():
            x, y = widened(x), widened(y)
            codes = dictionary.encode(x)
            left = left + (y - dictionary.decode(codes)).square().sum((0, 2))
            spread = spread + (y - mean).square().sum((0, 2))
            whole = whole + (y - mean.mean(0)).square().sum()
            alive = (codes > 0) & there
            on = on + alive.sum(0)
            if dictionary.same_features:
                alive = alive & (alive.cumsum(1) == 1)
            first = first + alive.sum(0)
            n_reads += len(x)
        return cls(n_reads, mean, left, spread, whole, on, first)


def _mean(batches: Iterator[Pair]) -> Float[Tensor, "loop d_out"]:
    """The mean of what is written, in float32 or wider."""
    parts = [(widened(y).sum(0), len(y)) for _, y in batches]
    return torch.stack([part for part, _ in parts]).sum(0) / sum(count for _, count in parts)


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
