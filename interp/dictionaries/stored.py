"""The states of a store of activations at the hook points of a dictionary.

Axes: read (a token of an example), loop, d_in.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.inputs import ReadoutColumn
from loopscope.interp.common.places import Picked
from loopscope.interp.dictionaries.reading import Reading
from loopscope.interp.store.groups import Group
from loopscope.interp.store.reading import ActivationStore
from loopscope.models.core.base import LoopedModel

Pair = tuple[Float[Tensor, "read loop d_in"], Float[Tensor, "read loop d_out"]]
_MIXED = 1 << 28  # bytes of states that are shuffled at a time


@dataclass(frozen=True)
class StoredStates:
    """The states that a dictionary reads and writes, from a store.

    Attributes:
        store: The store.
        model: The model that made it.
        reading: The hook points.
    """

    store: ActivationStore
    model: LoopedModel
    reading: Reading

    def __post_init__(self) -> None:
        self.store.check(self.model)
        if self.store.n_loops != self.reading.n_loops:
            raise ValueError(
                f"{self.store.folder} holds runs of {self.store.n_loops} iterations, but the"
                f" dictionary reads {self.reading.n_loops}; they must be as many"
            )
        for names in (self.reading.names, self.reading.written):
            self._place(names)

    def batches(self, size: int, seed: int | None = None) -> Iterator[Pair]:
        """All reads once: what is read of them, and what is written.

        Args:
            size: Reads of each batch; the last one may be smaller.
            seed: Shuffles; None keeps the order of the examples.
        """
        read, written = self.reading.names, self.reading.written
        if read == written:
            yield from ((x, x) for x in self._batches(read, size, seed))
            return
        both = (self._batches(names, size, seed) for names in (read, written))
        yield from zip(*both, strict=True)

    def without_end(self, size: int, seed: int) -> Iterator[Pair]:
        """Shuffled batches, again and again, in another order each time."""
        for turn in count():
            yield from self.batches(size, seed + turn)

    def _batches(
        self, names: list[str], size: int, seed: int | None
    ) -> Iterator[Float[Tensor, "read loop _width"]]:
        group, layer = self._place(names)
        loops, layers = list(range(self.reading.n_loops)), None if layer is None else [layer]
        # as many reads are mixed at each site, so that their orders agree
        places = [self._place(each)[0] for each in (self.reading.names, self.reading.written)]
        per_read = [len(loops) * each.shape[0] * self.store.dtype.itemsize for each in places]
        buffer = _MIXED // max(per_read) * per_read[places.index(group)]
        for part in self.store.batches(
            size, group.label, loops=loops, layers=layers, seed=seed, buffer=buffer
        ):
            yield part.values[:, :, 0].to(self.model.device)

    def _place(self, names: list[str]) -> tuple[Group, int | None]:
        """The group of some hook points, one for each iteration, and their layer in it."""
        for group in self.store.groups:
            for layer, points in zip(group.layers, zip(*group.names, strict=True), strict=True):
                if set(names) <= set(points) and len(group.shape) == 1:
                    return group, layer
        raise KeyError(
            f"{self.store.folder} does not hold vectors of {names[0]!r} and of the same hook at all"
            f" {len(names)} iterations; its sites are {', '.join(self.store.sites)}"
        )


def refuse_choice(positions: Picked | int | None, readout: ReadoutColumn) -> None:
    """Refuse a choice of tokens beside a store, which holds those that were collected."""
    if not isinstance(positions, str) or readout is not None:
        raise ValueError(
            "positions= and readout= choose tokens of inputs that are run; a store holds those that"
            " were collected"
        )
