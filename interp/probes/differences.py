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
    """Which of two inputs is the preferred one, read from the difference of their states.

    Attributes:
        places: Where the states were read.
        scores: Float[Tensor, "place test"], the probe's output for the held-out pairs: positive
            where it prefers the first input.
        flipped: Float[Tensor, "place test"], its output for the same pairs in the other order.
        alone: Float[Tensor, "place test"], the output of a probe of single states for the first
            input minus that for the second.
        separate: Float[Tensor, " place"], how often that probe is right about single inputs.
        preferred: Bool[Tensor, " test"], whether the first input is the preferred one.
        n_train: Pairs that were fitted.
    """

    places: tuple[Place, ...]
    scores: Float[Tensor, "place test"]
    flipped: Float[Tensor, "place test"]
    alone: Float[Tensor, "place test"]
    separate: Float[Tensor, " place"]
    preferred: Bool[Tensor, " test"]
    n_train: int

    def accuracy(self) -> Float[Tensor, " place"]:
        """The share of held-out pairs whose preferred input the difference tells."""
        return ((self.scores > 0) == self.preferred).double().mean(1)

    def accuracy_alone(self) -> Float[Tensor, " place"]:
        """The same by comparing the outputs of the probe of single states."""
        return ((self.alone > 0) == self.preferred).double().mean(1)

    def flips(self) -> Float[Tensor, " place"]:
        """The share of held-out pairs whose score changes its sign when the pair is turned round; a
        bias of the probe towards one order lowers it.
        """
        return (self.scores.sign() == -self.flipped.sign()).double().mean(1)

    def antisymmetry(self) -> Float[Tensor, " place"]:
        """The correlation of a pair's score with minus the score of the turned pair; 1 for a probe
        that only compares.
        """
        both = torch.stack([self.scores, -self.flipped])
        off = both - both.mean(-1, keepdim=True)
        return (off[0] * off[1]).sum(-1) / off.square().sum(-1).prod(0).sqrt()

    def frame(self) -> pd.DataFrame:
        """One row per place: place, visit, loop, layer, accuracy, accuracy_alone, separate, flips,
        antisymmetry.
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
    """Fit ridge probes of which of two inputs is preferred: to the difference of their states at
    the readout, and to single states.

    Args:
        first, second: Two inputs, row by row a pair: batches, texts, or tokens with `readout`;
            their lengths may differ.
        preferred: Whether the first input of each pair is the preferred one.
        places, n_loops, strength, held_out, readout, batch_size, seed: As for `probe`.

    Raises:
        KeyError, ValueError: As for `probe`; inputs that do not match, or pairs that all prefer the
            same side.

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
