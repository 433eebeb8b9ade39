"""The three runs of path patching, for any number of senders into one set of receivers.

The base run; a run in which the sender has its value of the source run and all else that adds to
the residual stream is frozen at the base run's values, from which the receivers' new inputs are
taken; and the base run with those put in, everything after them free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from loopscope.interp.common.collecting import keeping, recorded
from loopscope.interp.common.inputs import Metric, begin_batch, runs_side_by_side
from loopscope.interp.common.metrics import measure
from loopscope.interp.common.places import one_in_range
from loopscope.interp.patching.path_ends import PathEnd
from loopscope.models.basis.names import NamesFilter
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import Hook
from loopscope.models.core.state import State


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
    receivers: tuple[PathEnd, ...]
    frozen_sites: tuple[str, ...]
    n_loops: int
    order: Mapping[str, int]

    @property
    def first(self) -> int:
        """The visit of the first receiver."""
        return min(
            (end.visit.index for end in self.receivers),
            default=len(self.model.schedule(self.n_loops)),
        )

    @property
    def stop(self) -> int:
        """The visit after the last receiver."""
        return max(
            (end.visit.index + 1 for end in self.receivers),
            default=len(self.model.schedule(self.n_loops)),
        )

    def values(
        self, senders: Sequence[PathEnd], metric: Metric, batch_size: int
    ) -> Float[Tensor, "sender batch"]:
        """The metric of each sender's patched run, at most `batch_size` rows side by side."""
        groups: dict[str, list[int]] = {}
        for number, sender in enumerate(senders):
            groups.setdefault(sender.name, []).append(number)
        sent = recorded(self.model, self.source, list(groups), self.n_loops)
        frozen = self._frozen(min(self.order[sender.added] for sender in senders))
        first = self._state(None, self.first)
        size = runs_side_by_side(self.model, self.base, batch_size)
        results: dict[int, Tensor] = {}
        state: State | None = None
        with tqdm(total=len(senders), desc="path patching", leave=False, delay=2) as bar:
            for name in sorted(groups, key=self.order.__getitem__):
                state = self._state(state, senders[groups[name][0]].visit.index)
                for pack in (groups[name][i : i + size] for i in range(0, len(groups[name]), size)):
                    logits = self._logits(
                        state, first, [senders[n] for n in pack], sent[name], frozen
                    )
                    results |= {
                        n: measure(metric, part)
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
        senders: Sequence[PathEnd],
        source: Tensor,
        frozen: Mapping[str, Tensor],
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits at the readout of patched runs side by side, of senders at one hook point; rows
        are (sender, batch).
        """
        columns = _times(self.base.readout, len(senders))
        last, received = self._held(state, senders, source, frozen)
        if not self.receivers:
            return self.model.readout(last, columns)
        names = dict.fromkeys(end.name for end in self.receivers)
        places = {name: [end for end in self.receivers if end.name == name] for name in names}
        hooks: list[tuple[NamesFilter, Hook]] = [
            (name, partial(_put, source=received[name], places=[at])) for name, at in places.items()
        ]
        with self.model.hooks(hooks, n_loops=self.n_loops):
            return self.model.readout(
                self.model.advance(first.map(partial(_times, times=len(senders)))), columns
            )

    def _held(
        self, state: State, senders: Sequence[PathEnd], source: Tensor, frozen: Mapping[str, Tensor]
    ) -> tuple[State, Mapping[str, Tensor]]:
        """The frozen run from the senders on: its state after the last receiver, and what each
        receiver is given.
        """
        times = len(senders)

        def hold(value: Tensor, hook: HookPoint) -> Tensor:
            return _times(frozen[str(hook.name)], times)

        hooks: list[tuple[NamesFilter, Hook]] = [
            (senders[0].name, partial(_put, source=source, places=[[sender] for sender in senders]))
        ]
        hooks += [
            (later, hold) for later in frozen if self.order[later] > self.order[senders[0].added]
        ]
        state = state.map(partial(_times, times=times))
        names = list(dict.fromkeys(end.name for end in self.receivers))
        with ExitStack() as stack:
            # attached first, because an MLP is kept before it is held
            received = (
                stack.enter_context(keeping(self.model, names, self.n_loops)) if names else {}
            )
            stack.enter_context(self.model.hooks(hooks, n_loops=self.n_loops))
            return self.model.advance(state, self.stop), received

    def _state(self, state: State | None, visit: int) -> State:
        """The base run before a visit, continued from an earlier state."""
        state = state or begin_batch(self.model, self.base, self.n_loops)
        return self.model.advance(state, visit)

    def _frozen(self, after: int) -> dict[str, Tensor]:
        """The sum that the base run adds to the residual stream after a place and up to the last
        receiver.
        """
        names = []
        for visit in self.model.schedule(self.n_loops)[: self.stop]:
            missing = [site for site in self.frozen_sites if site not in visit.sites]
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
    value: Tensor, hook: HookPoint, source: Tensor, places: Sequence[Sequence[PathEnd]]
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
        for end in where:
            columns = slice(None) if end.position is None else slice(end.position, end.position + 1)
            index: tuple[slice | int, ...] = (slice(None), columns)
            if end.head is not None:
                one_in_range("heads", end.head, value.shape[2])
                index = (*index, end.head)
            patched[part][index] = given[part][index]
    flat: Tensor = rearrange(patched, "part batch ... -> (part batch) ...")
    return flat
