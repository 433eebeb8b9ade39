"""The three runs of path patching, for any number of senders into one set of receivers.

The base run; a run in which the sender has its value of the source run and all else that adds to
the residual stream is frozen at the base run's values, from which the receivers' new inputs are
taken; and the base run with those put in, everything after them free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.cells import in_range
from loopscope.interp.common.inputs import Metric, begin_batch
from loopscope.interp.common.places import recorded
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NamesFilter
from loopscope.models.core.intervene import Hook
from loopscope.models.core.state import State
from loopscope.models.core.tokens import Batch


@dataclass(frozen=True)
class Spot:
    """One end of a path in the run.

    Attributes:
        name: The hook point.
        added: The hook point at which it is in the residual stream; for a head that of its
            attention's output.
        visit: The visit, as an index into the schedule.
        head, position: What is sent or received there; None for all.
    """

    name: str
    added: str
    visit: int
    head: int | None
    position: int | None


@dataclass(frozen=True)
class PathRuns:
    """Two inputs and a set of receivers.

    Attributes:
        model: The model.
        base, source: The run that is patched and the one that senders take their output from.
        receivers: Where the paths end; empty for the readout.
        frozen_sites: What is held at the base run between senders and receivers.
        n_loops: Iterations.
        order: When each hook point is reached.
    """

    model: LoopedModel
    base: Batch
    source: Batch
    receivers: tuple[Spot, ...]
    frozen_sites: tuple[str, ...]
    n_loops: int
    order: Mapping[str, int]

    @property
    def first(self) -> int:
        """The visit of the first receiver."""
        return min(
            (spot.visit for spot in self.receivers), default=len(self.model.schedule(self.n_loops))
        )

    @property
    def stop(self) -> int:
        """The visit after the last receiver."""
        return max(
            (spot.visit + 1 for spot in self.receivers),
            default=len(self.model.schedule(self.n_loops)),
        )

    def values(
        self, senders: Sequence[Spot], metric: Metric, batch_size: int
    ) -> Float[Tensor, "sender batch"]:
        """The metric of each sender's patched run, at most `batch_size` rows side by side."""
        groups: dict[str, list[int]] = {}
        for number, sender in enumerate(senders):
            groups.setdefault(sender.name, []).append(number)
        sent = recorded(self.model, self.source, list(groups), self.n_loops)
        frozen = self._frozen(min(self.order[sender.added] for sender in senders))
        first = self._state(None, self.first)
        size = max(1, batch_size // len(self.base)) if self.model.batch_independent else 1
        results: dict[int, Tensor] = {}
        state: State | None = None
        with tqdm(total=len(senders), desc="path patching", leave=False, delay=2) as bar:
            for name in sorted(groups, key=self.order.__getitem__):
                state = self._state(state, senders[groups[name][0]].visit)
                for pack in (groups[name][i : i + size] for i in range(0, len(groups[name]), size)):
                    logits = self._logits(
                        state, first, [senders[n] for n in pack], sent[name], frozen
                    )
                    results |= {
                        n: metric(part)
                        for n, part in zip(pack, logits.split(len(self.base)), strict=True)
                    }
                    bar.update(len(pack))
        return torch.stack([results[number] for number in range(len(senders))])

    def unpatched(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        """Logits at the readout of one of the inputs without a patch."""
        state = begin_batch(self.model, batch, self.n_loops)
        return self.model.readout(self.model.advance(state), batch.readout)

    def _logits(
        self,
        state: State,
        first: State,
        senders: Sequence[Spot],
        source: Tensor,
        frozen: Mapping[str, Tensor],
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits at the readout of patched runs side by side, of senders at one hook point; rows
        are (sender, batch).
        """
        columns = _times(self.base.readout, len(senders))
        end, received = self._held(state, senders, source, frozen)
        if not self.receivers:
            return self.model.readout(end, columns)
        names = dict.fromkeys(spot.name for spot in self.receivers)
        places = {name: [spot for spot in self.receivers if spot.name == name] for name in names}
        hooks: list[tuple[NamesFilter, Hook]] = [
            (name, partial(_put, source=received[name], places=[at])) for name, at in places.items()
        ]
        with self.model.hooks(hooks, n_loops=self.n_loops):
            return self.model.readout(
                self.model.advance(first.map(partial(_times, times=len(senders)))), columns
            )

    def _held(
        self, state: State, senders: Sequence[Spot], source: Tensor, frozen: Mapping[str, Tensor]
    ) -> tuple[State, Mapping[str, Tensor]]:
        """The frozen run from the senders on: its state after the last receiver, and what each
        receiver is given.
        """
        times = len(senders)
        received: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            received[str(hook.name)] = value

        def hold(value: Tensor, hook: HookPoint) -> Tensor:
            return _times(frozen[str(hook.name)], times)

        hooks: list[tuple[NamesFilter, Hook]] = [
            (senders[0].name, partial(_put, source=source, places=[[sender] for sender in senders]))
        ]
        hooks += [
            (name, keep) for name in dict.fromkeys(spot.name for spot in self.receivers)
        ]  # an MLP is kept before it is held
        hooks += [
            (later, hold) for later in frozen if self.order[later] > self.order[senders[0].added]
        ]
        with self.model.hooks(hooks, n_loops=self.n_loops):
            return self.model.advance(state.map(partial(_times, times=times)), self.stop), received

    def _state(self, state: State | None, visit: int) -> State:
        """The base run before a visit, continued from an earlier state."""
        state = state or begin_batch(self.model, self.base, self.n_loops)
        return self.model.advance(state, visit)

    def _frozen(self, after: int) -> dict[str, Tensor]:
        """What the base run adds to the residual stream after a place and up to the last
        receiver.
        """
        names = []
        for visit in self.model.schedule(self.n_loops)[: self.stop]:
            missing = [site for site in self.frozen_sites if site not in visit.points]
            if missing:
                raise ValueError(
                    f"{visit.name} has no {missing[0]}, so what it adds to the residual stream"
                    " cannot be frozen"
                )
            names += [
                name
                for name in (f"{visit.name}.{site}" for site in self.frozen_sites)
                if self.order[name] > after
            ]
        return recorded(self.model, self.base, names, self.n_loops) if names else {}


def _times(value: Tensor, times: int) -> Tensor:
    return repeat(value, "batch ... -> (times batch) ...", times=times)


def _put(
    value: Tensor, hook: HookPoint, source: Tensor, places: Sequence[Sequence[Spot]]
) -> Tensor:
    """The value with some places taken from a source, which may have fewer rows.

    `places` holds one list for each equal part of the rows, or one list for all of them.
    """
    patched = rearrange(value.clone(), "(part batch) ... -> part batch ...", part=len(places))
    given = rearrange(
        _times(source, len(value) // len(source)),
        "(part batch) ... -> part batch ...",
        part=len(places),
    )
    for part, where in enumerate(places):
        for spot in where:
            columns = (
                slice(None) if spot.position is None else slice(spot.position, spot.position + 1)
            )
            index: tuple[slice | int, ...] = (slice(None), columns)
            if spot.head is not None:
                in_range("heads", [spot.head], value.shape[2])
                index = (*index, spot.head)
            patched[part][index] = given[part][index]
    flat: Tensor = rearrange(patched, "part batch ... -> (part batch) ...")
    return flat
