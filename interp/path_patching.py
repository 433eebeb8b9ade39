"""Path patching: what one component sends to another along the residual stream alone, with the iteration as an axis.

Three runs (Wang et al. 2022, arXiv 2211.00593, section 3.1 and appendix B): the base run; a run in which the sender has its value of
the source run and all else that adds to the residual stream is frozen at the base run's values, from which the receivers' new inputs
are taken; and the base run with those put in, everything after them free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.hook_points import HookPoint

from interp.ablation import recorded, visits_at
from interp.cells import in_range
from interp.inputs import Inputs, Metric, ReadoutColumn
from interp.patching import Pair, metric_name
from interp.sweep import Direction
from models.base import LoopedModel
from models.hooks import NamesFilter
from models.intervene import Hook
from models.state import State, Visit, checked_loops
from models.tokens import Batch

Freeze = Literal["attention+mlp", "attention"]
Place = tuple[int | None, int | None]  # head and column; None for all
_SENT = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out"}
_RECEIVED = {"q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v", "mlp": "hook_mlp_out"}
_FROZEN: dict[str, tuple[str, ...]] = {"attention+mlp": ("hook_attn_out", "hook_mlp_out"), "attention": ("hook_attn_out",)}


@dataclass(frozen=True)
class Sender:
    """Whose output is taken from the source run.

    Attributes:
        kind: "head" (at attn.hook_z), "attn" or "mlp" (what it adds to the residual stream).
        loop, layer: Where it is, from 0.
        head: The head, for kind "head" only.
        position: The column that is sent; None for all.
    """

    kind: Literal["head", "attn", "mlp"]
    loop: int
    layer: int
    head: int | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _SENT:
            raise ValueError(f"a sender's kind must be 'head', 'attn' or 'mlp', got {self.kind!r}")
        if (self.head is None) != (self.kind != "head"):
            raise ValueError(f"head= must be given for kind 'head' and only then, got {self}")

    def __str__(self) -> str:
        return _words(self.kind, self.loop, self.layer, self.head, self.position)


@dataclass(frozen=True)
class Receiver:
    """Whose input the path ends in.

    Attributes:
        kind: "q", "k" or "v" of attention, "mlp" (an MLP's input), or "readout" (the final logits; it stands alone).
        loop, layer: Where it is, from 0; None for the readout.
        head: The head (for k and v the key-value head); None for all, and where there are none.
        position: The column that receives; None for all.
    """

    kind: Literal["q", "k", "v", "mlp", "readout"]
    loop: int | None = None
    layer: int | None = None
    head: int | None = None
    position: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*_RECEIVED, "readout"):
            raise ValueError(f"a receiver's kind must be 'q', 'k', 'v', 'mlp' or 'readout', got {self.kind!r}")
        place = (self.loop, self.layer)
        if self.kind == "readout" and (*place, self.head, self.position) != (None,) * 4:
            raise ValueError(f"the readout has no loop, layer, head or position, got {self}")
        if self.kind != "readout" and None in place:
            raise ValueError(f"a receiver needs loop= and layer=, got {self}")
        if self.kind == "mlp" and self.head is not None:
            raise ValueError(f"an MLP has no heads, got {self}")

    def __str__(self) -> str:
        return _words(self.kind, self.loop, self.layer, self.head, self.position)


def _words(kind: str, loop: int | None, layer: int | None, head: int | None, position: int | None) -> str:
    places = {"loop": loop, "layer": layer, "head": head, "position": position}
    return " ".join([kind, *(f"{name} {number}" for name, number in places.items() if number is not None)])


@dataclass(frozen=True)
class PathPatch:
    """The metric with one path patched.

    Attributes:
        sender: Where the path starts.
        receivers: Where it ends.
        values: Float[Tensor, " batch"], the metric of the patched run.
        clean, corrupted: Float[Tensor, " batch"], the metric of the two runs without a patch.
        metric: The metric's name.
        direction: "denoise": the corrupted run with the path of the clean one; "noise": the reverse.
        freeze: What was held between sender and receivers.
    """

    sender: Sender
    receivers: tuple[Receiver, ...]
    values: Float[Tensor, " batch"]
    clean: Float[Tensor, " batch"]
    corrupted: Float[Tensor, " batch"]
    metric: str
    direction: Direction
    freeze: Freeze

    def effect(self) -> Float[Tensor, " batch"]:
        """How far the path moves the metric from the run that it is patched into."""
        return self.values - (self.corrupted if self.direction == "denoise" else self.clean)

    def frame(self) -> pd.DataFrame:
        """One row per example: sender, receivers, example, metric, clean, corrupted, value."""
        columns = {"clean": self.clean, "corrupted": self.corrupted, "value": self.values}
        frame = pd.DataFrame({name: column.cpu().numpy() for name, column in columns.items()})
        told = {"sender": str(self.sender), "receivers": _listed(self.receivers), "example": range(len(frame)), "metric": self.metric}
        for place, (name, column) in enumerate(told.items()):
            frame.insert(place, name, column)
        return frame


@torch.no_grad()
def path_patch(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    sender: Sender,
    receivers: Receiver | Sequence[Receiver],
    n_loops: int | None = None,
    *,
    direction: Direction = "denoise",
    freeze: Freeze = "attention+mlp",
    readout: ReadoutColumn = None,
) -> PathPatch:
    """Patch the path from one component to others and measure the answer; exact in every family, norms are recomputed.

    All receivers are patched in one run. Each gets its new input with the others frozen, so paths through one receiver to
    another do not count. With a family that works on the residual stream between blocks (an injected input, a norm at an
    iteration's end), that work belongs to the path. The inputs are run as one batch.

    Args:
        clean, corrupted: Two inputs of the same shape, row by row a pair: batches, texts, or tokens with `readout`.
        metric: Of the logits at the readout, Float[Tensor, "batch d_vocab"] to Float[Tensor, " batch"].
        sender: Takes its output from the source run (the clean one for "denoise").
        receivers: One or several, each later than the sender; or Receiver("readout") alone.
        n_loops: Iterations; None means what the checkpoint records.
        direction: "denoise" patches the path of the clean run into the corrupted one, "noise" the reverse.
        freeze: What is held at the base run between sender and receivers: "attention+mlp" leaves the residual stream alone as the
            path; "attention" lets MLPs recompute, so that paths through them count too, as in the IOI paper.

    Raises:
        ValueError: Inputs that do not match, a place out of range, or a receiver that is not later than the sender.

    Source:
        Wang et al. 2022 (arXiv 2211.00593); Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
    """
    work = _Work(model, Pair.of(model, clean, corrupted, readout), receivers, n_loops, direction, freeze)
    values = work.values([sender], metric, batch_size=1)
    return PathPatch(sender, work.receivers, values[0], *work.unpatched(metric), metric_name(metric), direction, freeze)


@torch.no_grad()
def path_patch_sweep(
    model: LoopedModel,
    clean: Inputs,
    corrupted: Inputs,
    metric: Metric,
    receivers: Receiver | Sequence[Receiver],
    n_loops: int | None = None,
    *,
    senders: Sequence[Sender] | None = None,
    direction: Direction = "denoise",
    freeze: Freeze = "attention+mlp",
    readout: ReadoutColumn = None,
    batch_size: int = 1024,
) -> pd.DataFrame:
    """Path patching from many senders, one by one, into the same receivers.

    Args:
        senders: None means each head and each MLP of every iteration that is earlier than all receivers.
        batch_size: Rows run side by side.
        clean, corrupted, metric, receivers, n_loops, direction, freeze, readout: As for `path_patch`.

    Returns:
        One row per sender: kind, loop, layer, head, position, receivers, metric, clean, corrupted, value (means over the batch).

    Raises:
        ValueError: As for `path_patch`, or no sender is earlier than the receivers.
    """
    work = _Work(model, Pair.of(model, clean, corrupted, readout), receivers, n_loops, direction, freeze)
    chosen = work.earlier_senders() if senders is None else list(senders)
    if not chosen:
        raise ValueError(f"no sender is earlier than all of the receivers ({_listed(work.receivers)})")
    values = work.values(chosen, metric, batch_size)
    places = [(sender.kind, sender.loop, sender.layer, sender.head, sender.position) for sender in chosen]
    frame = pd.DataFrame(places, columns=["kind", "loop", "layer", "head", "position"])
    frame = frame.astype({column: "Int64" for column in ("loop", "layer", "head", "position")})
    frame["receivers"], frame["metric"] = _listed(work.receivers), metric_name(metric)
    frame["clean"], frame["corrupted"] = (run.mean().item() for run in work.unpatched(metric))
    frame["value"] = values.mean(1).cpu().numpy()
    return frame


def _listed(receivers: Sequence[Receiver]) -> str:
    return ", ".join(map(str, receivers))


class _Work:
    """Two runs and a set of receivers, for any number of senders."""

    def __init__(
        self,
        model: LoopedModel,
        pair: Pair,
        receivers: Receiver | Sequence[Receiver],
        n_loops: int | None,
        direction: Direction,
        freeze: Freeze,
    ) -> None:
        if direction not in ("denoise", "noise"):
            raise ValueError(f"direction must be 'denoise' or 'noise', got {direction!r}")
        if freeze not in _FROZEN:
            raise ValueError(f"freeze must be 'attention+mlp' or 'attention', got {freeze!r}")
        self.model, self.n_loops = model, checked_loops(n_loops, model.cfg.n_loops)
        self.pair = pair
        self.base, self.source = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
        self.frozen_sites = _FROZEN[freeze]
        self.order = {name: place for place, name in enumerate(model.hook_names(self.n_loops))}
        self.receivers = (receivers,) if isinstance(receivers, Receiver) else tuple(receivers)
        if not self.receivers:
            raise ValueError("at least one receiver is needed, got none")
        self.into_readout = any(receiver.kind == "readout" for receiver in self.receivers)
        if self.into_readout and len(self.receivers) > 1:
            raise ValueError(f"the readout comes after all other receivers, so it must stand alone, got {_listed(self.receivers)}")
        found = [] if self.into_readout else [self._find(receiver, _RECEIVED) for receiver in self.receivers]
        self.names = [name for name, _ in found]
        schedule = model.schedule(self.n_loops)
        self.first = min((visit.index for _, visit in found), default=len(schedule))
        self.stop = max((visit.index + 1 for _, visit in found), default=len(schedule))

    def unpatched(self, metric: Metric) -> tuple[Tensor, Tensor]:
        """The metric of the clean and of the corrupted run."""
        clean, corrupted = (metric(self._read(batch)) for batch in (self.pair.clean, self.pair.corrupted))
        return clean, corrupted

    def _read(self, batch: Batch) -> Float[Tensor, "batch d_vocab"]:
        state = self.model.begin(batch.tokens, batch.mask, n_loops=self.n_loops)
        return self.model.readout(self.model.advance(state), batch.readout)

    def earlier_senders(self) -> list[Sender]:
        """Each head and each MLP inside the loop that is earlier than all receivers."""
        everything: list[Sender] = []
        for visit in visits_at(self.model, self.n_loops, "all", "all"):
            assert visit.loop is not None, "visits_at gives visits inside the loop"
            heads = [Sender("head", visit.loop, visit.layer, head) for head in range(self.model.cfg.n_heads)]
            everything += [*heads, Sender("mlp", visit.loop, visit.layer)]
        limit = min((self.order[name] for name in self.names), default=len(self.order))
        return [sender for sender in everything if self.order[self._find(sender, _SENT)[0]] < limit]

    def values(self, senders: Sequence[Sender], metric: Metric, batch_size: int) -> Float[Tensor, "sender batch"]:
        """The metric of each sender's patched run."""
        groups: dict[str, list[int]] = {}
        visits: dict[str, Visit] = {}
        for number, sender in enumerate(senders):
            name, visits[name] = self._found_earlier(sender)
            groups.setdefault(name, []).append(number)
        sent = recorded(self.model, self.source, list(groups), self.n_loops)
        frozen = self._frozen(min(self._added(name) for name in groups))
        first = self._state(None, self.first)
        size = max(1, batch_size // len(self.base)) if self.model.batch_independent else 1
        results: dict[int, Tensor] = {}
        state: State | None = None
        with tqdm(total=len(senders), desc="path patching", leave=False, delay=2) as bar:
            for name in sorted(groups, key=self.order.__getitem__):
                state = self._state(state, visits[name].index)
                for pack in (groups[name][i : i + size] for i in range(0, len(groups[name]), size)):
                    put = partial(_put, source=sent[name], places=[[(senders[n].head, senders[n].position)] for n in pack])
                    logits = self._logits(state, first, name, put, frozen, len(pack))
                    results |= {n: metric(part) for n, part in zip(pack, logits.split(len(self.base)), strict=True)}
                    bar.update(len(pack))
        return torch.stack([results[number] for number in range(len(senders))])

    def _logits(
        self, state: State, first: State, name: str, put: Hook, frozen: dict[str, Tensor], times: int
    ) -> Float[Tensor, "row d_vocab"]:
        """Logits at the readout of `times` patched runs side by side; rows are (sender, batch)."""
        received: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> None:
            received[str(hook.name)] = value

        def hold(value: Tensor, hook: HookPoint) -> Tensor:
            return _times(frozen[str(hook.name)], times)

        columns = _times(self.base.readout, times)
        hooks: list[tuple[NamesFilter, Hook]] = [(name, put)]
        hooks += [(receiver, keep) for receiver in dict.fromkeys(self.names)]  # an MLP is kept before it is held
        hooks += [(later, hold) for later in frozen if self.order[later] > self._added(name)]
        with self.model.hooks(hooks, n_loops=self.n_loops):
            end = self.model.advance(state.map(partial(_times, times=times)), self.stop)
            if self.into_readout:
                return self.model.readout(end, columns)
        places: dict[str, list[Place]] = {}
        for receiver, receiving in zip(self.receivers, self.names, strict=True):
            places.setdefault(receiving, []).append((receiver.head, receiver.position))
        hooks = [(at, partial(_put, source=received[at], places=[where])) for at, where in places.items()]
        with self.model.hooks(hooks, n_loops=self.n_loops):
            return self.model.readout(self.model.advance(first.map(partial(_times, times=times))), columns)

    def _state(self, state: State | None, visit: int) -> State:
        """The base run before a visit, continued from an earlier state."""
        state = state or self.model.begin(self.base.tokens, self.base.mask, n_loops=self.n_loops)
        return self.model.advance(state, visit)

    def _frozen(self, after: int) -> dict[str, Tensor]:
        """What the base run adds to the residual stream after a place and up to the last receiver."""
        names = []
        for visit in self.model.schedule(self.n_loops)[: self.stop]:
            missing = [site for site in self.frozen_sites if site not in visit.points]
            if missing:
                raise ValueError(f"{visit.name} has no {missing[0]}, so what it adds to the residual stream cannot be frozen")
            names += [name for name in (f"{visit.name}.{site}" for site in self.frozen_sites) if self.order[name] > after]
        return recorded(self.model, self.base, names, self.n_loops) if names else {}

    def _added(self, name: str) -> int:
        """Where in the run a sender has been added to the residual stream; for a head, where its attention has."""
        return self.order[name.replace(_SENT["head"], _SENT["attn"])]

    def _find(self, end: Sender | Receiver, sites: Mapping[str, str]) -> tuple[str, Visit]:
        """The hook point of one end of the path, and its visit."""
        assert end.loop is not None, "only the readout has no place"
        assert end.layer is not None, "only the readout has no place"
        visits = visits_at(self.model, self.n_loops, [end.loop], [end.layer])
        if len(visits) != 1 or sites[end.kind] not in visits[0].points:
            where = ", ".join(visit.name for visit in visits) or "none"
            raise ValueError(f"one visit with {sites[end.kind]} is needed for {end}, found {where}")
        if end.position is not None:
            in_range("positions", [end.position], self.base.tokens.shape[1])
        if end.head is not None and end.kind in ("head", "q"):
            in_range("heads", [end.head], self.model.cfg.n_heads)
        return f"{visits[0].name}.{sites[end.kind]}", visits[0]

    def _found_earlier(self, sender: Sender) -> tuple[str, Visit]:
        name, visit = self._find(sender, _SENT)
        for receiver, receiving in zip(self.receivers, self.names, strict=not self.into_readout):
            if self.order[receiving] <= self.order[name]:
                raise ValueError(f"a receiver must come later in the run than the sender, but ({receiver}) is not later than ({sender})")
        return name, visit


def _times(value: Tensor, times: int) -> Tensor:
    return repeat(value, "batch ... -> (times batch) ...", times=times)


def _put(value: Tensor, hook: HookPoint, source: Tensor, places: Sequence[Sequence[Place]]) -> Tensor:
    """The value with some places taken from a source, which may have fewer rows.

    `places` holds one list for each equal part of the rows, or one list for all of them.
    """
    patched = rearrange(value.clone(), "(part batch) ... -> part batch ...", part=len(places))
    given = rearrange(_times(source, len(value) // len(source)), "(part batch) ... -> part batch ...", part=len(places))
    for part, where in enumerate(places):
        for head, position in where:
            columns = slice(None) if position is None else slice(position, position + 1)
            index: tuple[slice | int, ...] = (slice(None), columns)
            if head is not None:
                in_range("heads", [head], value.shape[2])
                index = (*index, head)
            patched[part][index] = given[part][index]
    flat: Tensor = rearrange(patched, "part batch ... -> (part batch) ...")
    return flat
