"""Probes of pairs of inputs: of the difference of their states, beside probes of each alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.interp.common.inputs import Inputs, ReadoutColumn, as_batch
from loopscope.interp.common.modes import evaluated
from loopscope.interp.common.places import Place
from loopscope.interp.common.shown import OneScreen
from loopscope.interp.probes.ridge import Linear, RidgeSums, check_strength
from loopscope.interp.probes.states import HeldOut, ReadStates, split_rows
from loopscope.models.basis.names import NamesFilter
from loopscope.models.basis.numbers import given_tensor
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops

if TYPE_CHECKING:
    import plotly.graph_objects as go


@dataclass(frozen=True)
class DifferenceProbe(OneScreen):
    """Probes that tell which of two inputs is the preferred one, from the difference of their
    states.

    Attributes:
        places: The places at which the states were read.
        scores: Float[Tensor, "place test"], the output of the difference probe for each held-out
            pair; it is positive if the probe prefers the first input.
        flipped: Float[Tensor, "place test"], its output for the same pairs in the other order.
        alone: Float[Tensor, "place test"], the output of a probe of single states for the first
            input, minus its output for the second.
        separate: Float[Tensor, " place"], the share of held-out inputs for which the probe of
            single states is right.
        preferred: Bool[Tensor, " test"], whether the first input is the preferred one.
        n_train: How many pairs were fitted.
    """

    places: tuple[Place, ...]
    scores: Float[Tensor, "place test"]
    flipped: Float[Tensor, "place test"]
    alone: Float[Tensor, "place test"]
    separate: Float[Tensor, " place"]
    preferred: Bool[Tensor, " test"]
    n_train: int

    def accuracy(self) -> Float[Tensor, " place"]:
        """The share of held-out pairs for which the difference probe names the preferred input."""
        return ((self.scores > 0) == self.preferred).double().mean(1)

    def accuracy_alone(self) -> Float[Tensor, " place"]:
        """The share of held-out pairs for which the probe of single states gives the preferred
        input the larger output.
        """
        return ((self.alone > 0) == self.preferred).double().mean(1)

    def flips(self) -> Float[Tensor, " place"]:
        """The flip test: the share of held-out pairs whose score changes its sign if the pair is
        reversed. A probe with a bias towards one order has a lower share.
        """
        return (self.scores.sign() == -self.flipped.sign()).double().mean(1)

    def antisymmetry(self) -> Float[Tensor, " place"]:
        """The correlation between the score of a pair and minus the score of the reversed pair. It
        is 1 for a probe that only compares the two inputs.
        """
        both = torch.stack([self.scores, -self.flipped])
        off = both - both.mean(-1, keepdim=True)
        return (off[0] * off[1]).sum(-1) / off.square().sum(-1).prod(0).sqrt()

    def frame(self) -> pd.DataFrame:
        """One row per place. The columns are place, visit, loop, layer, accuracy, accuracy_alone,
        separate, flips and antisymmetry.
        """
        rows = [(p.name, p.visit, p.loop, p.layer) for p in self.places]
        frame = pd.DataFrame(rows, columns=["place", "visit", "loop", "layer"])
        return frame.astype({"loop": "Int64", "layer": "Int64"}).assign(
            accuracy=self.accuracy().numpy(),
            accuracy_alone=self.accuracy_alone().numpy(),
            separate=self.separate.numpy(),
            flips=self.flips().numpy(),
            antisymmetry=self.antisymmetry().numpy(),
        )

    def plot(self, title: str = "") -> go.Figure:
        """A picture: the accuracies and the flip test over places."""
        from loopscope.interp.drawing.probes import differences

        return differences(self, title)


@torch.no_grad()
@evaluated
def difference_probe(
    model: LoopedModel,
    first: Inputs,
    second: Inputs,
    preferred: Bool[Tensor, " batch"],
    places: NamesFilter | None = None,
    n_loops: int | None = None,
    *,
    strength: float = 1.0,
    held_out: HeldOut = 0.25,
    readout: ReadoutColumn = None,
    batch_size: int = 512,
    seed: int = 0,
) -> DifferenceProbe:
    """Fit probes that tell which of two inputs is preferred, from the difference of their states at
    the answer position.

    A probe of single states is fitted beside each difference probe. Both are ridge regressions.

    Args:
        first, second: The inputs, row by row a pair: batches, texts, or token ids. Their lengths
            may differ.
        readout: For token ids, the column at which answers are read.
        preferred: Bool[Tensor, " batch"], whether the first input of each pair is the preferred
            one.
        places: The hook points by name, pattern or list; None means the residual stream after every
            visit.
        n_loops: The number of iterations; None means the number that the checkpoint records.
        strength: The weight of the squared length of the probe beside the squared error
            (scikit-learn's alpha).
        held_out: The share of the pairs to hold out at random, or which pairs.
        batch_size: How many rows run at a time.
        seed: The seed of the split.

    Returns:
        The outputs of the probes for the held-out pairs, with accuracies and the flip test.

    Raises:
        KeyError: The run does not have a place.
        ValueError: The numbers of first inputs, second inputs and preferences differ, all pairs
            prefer the same side, or `probe` would refuse the call.

    Source:
        Pairwise-difference probes, probes of single states and the flip test: arXiv 2604.09870.
    """
    check_strength(strength)
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    sides = [
        ReadStates.of(model, as_batch(model, inputs, readout), places, None, n_loops, batch_size)
        for inputs in (first, second)
    ]
    preferred, count = given_tensor(preferred).cpu(), len(sides[0].batch)
    if len(sides[1].batch) != count:
        raise ValueError(
            f"each first input needs a second one, got {count} and {len(sides[1].batch)} inputs"
        )
    train, test = split_rows(count, held_out, seed)
    _check_preferred(preferred, count, train)
    signs = torch.where(preferred, 1.0, -1.0).double()[:, None]
    sums = [(RidgeSums(), RidgeSums()) for _ in sides[0].places]
    for reads, states in _both(sides, train):
        for (differing, single), (one, other) in zip(sums, states, strict=True):
            differing.add(one - other, signs[reads])
            single.add(torch.cat([one, other]), torch.cat([signs[reads], -signs[reads]]))
    maps = [(a.solve(strength), b.solve(strength)) for a, b in sums]
    return _tested(sides, maps, test, preferred, len(train))


def _both(
    sides: list[ReadStates], rows: Int[Tensor, " row"]
) -> Iterator[tuple[Int[Tensor, " read"], list[tuple[Tensor, Tensor]]]]:
    """The states of both inputs at each place, chunk by chunk."""
    for (reads, one), (_, other) in zip(*(side.chunks(rows) for side in sides), strict=True):
        yield reads, list(zip(one.values(), other.values(), strict=True))


def _check_preferred(preferred: Tensor, count: int, train: Int[Tensor, " train"]) -> None:
    if preferred.shape != (count,) or preferred.dtype != torch.bool:
        raise ValueError(
            f"preferred must be one bool per pair: there are {count} pairs, got {preferred.dtype}"
            f" of the shape {list(preferred.shape)}"
        )
    if len(preferred[train].unique()) < 2:
        raise ValueError(
            "the fitted pairs must prefer the first input in some and the second in others; turn"
            " some pairs round"
        )


def _tested(
    sides: list[ReadStates],
    maps: list[tuple[Linear, Linear]],
    test: Int[Tensor, " test"],
    preferred: Bool[Tensor, " batch"],
    n_train: int,
) -> DifferenceProbe:
    """The outputs of fitted probes for the held-out pairs."""
    found: list[list[Tensor]] = [[] for _ in maps]
    for _, states in _both(sides, test):
        for own, (differing, single), (one, other) in zip(found, maps, states, strict=True):
            outputs = [differing(one - other), differing(other - one), single(one), single(other)]
            own.append(torch.cat(outputs, dim=1))
    forward, turned, first, second = torch.stack([torch.cat(own) for own in found]).unbind(-1)
    right = preferred[test]
    separate = ((first > 0) == right).double().mean(1) + ((second > 0) != right).double().mean(1)
    return DifferenceProbe(
        sides[0].places, forward, turned, first - second, separate / 2, right, n_train
    )
