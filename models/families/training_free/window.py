"""Training-free looping of ordinary frozen models: a window of their layers is run several times
(arXiv 2605.23872).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from loopscope.models.core.attention import KeyValues, KeyValueStore, Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import (
    NO_TAPS,
    NamesFilter,
    Taps,
    is_hooked,
    live,
    resolve,
    tap,
)
from loopscope.models.core.state import Slot, State, Visit
from loopscope.models.families.training_free.rules import (
    PassSlot,
    PassVisit,
    WindowConfig,
    check_source,
    entered,
    moved,
)

STASH = "stash.blocks"


class WindowLoops(LoopedModel):
    """An ordinary stack of layers in which a window is run n_loops times; n_loops = 1 is the
    ordinary model.

    Layers keep their numbers: `prelude.{l}` before the window, `loops.{k}.blocks.{l}` in it,
    `coda.{l}` after it. A pass of the whole window is an iteration: `loops.{k}.hook_state_in` is
    x_k, `.hook_window_out` what the layers made of it, g(x_k), and `.hook_state_out` what the rule
    moved to. In layer mode these sites belong to each layer, `loops.{k}.blocks.{l}.hook_state_in`,
    and the K passes of a layer come right after one another; "after iteration k" is then after pass
    k of the window's last layer.

    During a pass the state has the part `x_k`, and from the end of the first pass to the end of the
    last one `g_0`, where the rule needs them. The keys and values that a generation cache gets come
    from a pass of their own, whose points are `stash.blocks.{l}.…`; see
    `cache.py`.

    `prefix_readout` is denied because a step is a share 1/K of the call's own K (the naive rule in
    block mode would have it).

    Source:
        arXiv 2605.23872.
    """

    prefix_readout: ClassVar[bool] = False
    cfg: WindowConfig
    blocks: nn.ModuleList

    @property
    def additive_residual(self) -> bool:
        return self.cfg.rule == "naive"

    # The schedule

    @property
    def units(self) -> list[range]:
        """The layers that are looped together: the window, or each of its layers."""
        first, last = self.cfg.window
        window = range(first, last + 1)
        return (
            [window] if self.cfg.mode == "block" else [range(layer, layer + 1) for layer in window]
        )

    def plan(self, n_loops: int) -> list[Slot]:
        first, last = self.cfg.window
        inside = [
            self._pass_slot(layer, loop, n_loops, unit)
            for unit in self.units
            for loop in range(n_loops)
            for layer in unit
        ]
        before = [self._slot("prelude", layer) for layer in range(first)]
        return [
            *before,
            *inside,
            *(self._slot("coda", layer) for layer in range(last + 1, self.cfg.n_layers)),
        ]

    def stash_visits(self, layers: range) -> list[Visit]:
        """Visits to some layers of the window that belong to no schedule, for the pass that makes
        canonical keys and values.
        """
        return [self._visit(index, self._slot(STASH, layer)) for index, layer in enumerate(layers)]

    def _slot(self, prefix: str, layer: int) -> Slot:
        block: Any = self.blocks[layer]
        return Slot(
            name=f"{prefix}.{layer}",
            stage=prefix.split(".")[0],
            loop=None,
            layer=layer,
            block=block,
            sites=block.sites,
        )

    def _pass_slot(self, layer: int, loop: int, n_loops: int, unit: range) -> PassSlot:
        block: Any = self.blocks[layer]
        name = f"loops.{loop}.blocks.{layer}"
        return PassSlot(
            name=name,
            stage="loops",
            loop=loop,
            layer=layer,
            block=block,
            sites=block.sites,
            scope=f"loops.{loop}" if self.cfg.mode == "block" else name,
            opening=("hook_state_in",) if layer == unit[0] else (),
            closing=("hook_window_out", "hook_state_out") if layer == unit[-1] else (),
            of=n_loops,
        )

    def _visit(self, index: int, slot: Slot) -> Visit:
        visit = super()._visit(index, slot)
        return PassVisit.at(visit, slot.of) if isinstance(slot, PassSlot) else visit

    # Running

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, "hook_state_in", resid)
        return resid, entered(self.cfg, resid, parts)

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        assert isinstance(visit, PassVisit), "only passes of the window have an end"
        state, kept = moved(self.cfg, visit, tap(taps, "hook_window_out", resid), parts)
        return tap(taps, "hook_state_out", state), kept

    def finish(self, state: State, loop: int) -> State:
        """The state after iteration `loop` of this call's own n_loops, run through the layers after
        the window.
        """
        end = self.iteration_ends(state.n_loops)[-1]
        return self.advance(replace(state, visit=end, parts={}))

    def extend(self, state: State, before: KeyValueStore) -> tuple[State, KeyValueStore]:
        if state.n_loops == 1:
            return super().extend(state, before)
        new: KeyValueStore = {}
        supplied = before or None
        return self.advance_stashing(state, new, source=self.cfg.stash, supplied=supplied), new

    def loops_after_prompt(self, n_loops: int) -> int:
        return 1 if self.cfg.decode == "bypass" else n_loops

    def advance_stashing(
        self,
        state: State,
        store: KeyValueStore,
        *,
        source: str = "last",
        supplied: KeyValueStore | None = None,
    ) -> State:
        """Run a state to the end as `advance` does, and keep one entry per layer.

        Args:
            state: From `begin`, before the window.
            store: Is given the keys and values of these rows, by the visits of a call with
                n_loops = 1.
            source: Where the window's entries come from: "last", the state after its passes, or
                "first", the state before them.
            supplied: Entries of earlier rows, in the same form.

        Raises:
            ValueError: Another source, or a state that stands inside or behind the window.
        """
        check_source(source)
        starts = [
            visit.index
            for visit in self.schedule(state.n_loops)
            if visit.opening and visit.loop == 0
        ]
        if state.visit > starts[0]:
            raise ValueError(
                f"the state must stand at or before the window (visit {starts[0]}), got one before"
                f" visit {state.visit}"
            )
        passes = None if supplied is None else self.for_passes(supplied, state.n_loops)
        state = self.advance(state, starts[0], supplied=passes, store=store)
        for unit, start in zip(self.units, starts, strict=True):
            before, state = (
                state,
                self.advance(state, start + len(unit) * state.n_loops, supplied=passes),
            )
            store.update(self.stashed(before if source == "first" else state, unit, supplied))
        return self.advance(state, supplied=passes, store=store)

    def stashed(
        self, state: State, layers: range, supplied: KeyValueStore | None = None
    ) -> dict[str, KeyValues]:
        """Run some layers of the window once over a state, for their keys and values alone; the
        hook points are `stash.blocks.{l}.…`.

        Args:
            layers: Which layers, of those that follow one another in the window.
            supplied: Entries of earlier rows.

        Returns:
            Keys and values of the state's rows by visit, "loops.0.blocks.{l}".
        """
        store: dict[str, KeyValues] = {}
        hooked, resid = self.any_hook(), state.resid
        rows = Rows.make(
            state, type(self).visible, None if supplied is None else supplied[entry_of(layers[0])]
        )
        for visit in self.stash_visits(layers):
            here = rows.at(entry_of(visit.layer), supplied, store)
            resid, _ = self.visit_block(
                visit, resid, state.parts, here, live(visit.points) if hooked else NO_TAPS
            )
        return store

    def for_passes(self, cache: KeyValueStore, n_loops: int) -> KeyValueStore:
        """The cache as `advance(supplied=...)` takes it for a call of `n_loops` passes: every pass
        of a layer reads the layer's one entry.
        """
        visits = self.schedule(n_loops)
        return {
            visit.name: cache[visit.name if visit.loop is None else entry_of(visit.layer)]
            for visit in visits
        }

    def forward(
        self, tokens: Tensor, n_loops: int | None = None, mask: Tensor | None = None, **options: Any
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits at all positions; the arguments are those of `begin`."""
        hooked = (
            [name for name in self._stash_names() if is_hooked(self.hook_dict[name])]
            if self.any_hook()
            else []
        )
        if hooked:
            raise ValueError(
                f"a hook is attached at {hooked[0]!r}, but a plain call makes no stash pass; "
                "prefill and decode_looped of loopscope.models.families.training_free.cache do"
            )
        return super().forward(tokens, n_loops, mask, **options)

    # The hook points of the stash pass, which no plain call has

    def _stash_names(self) -> dict[str, None]:
        first, last = self.cfg.window
        return dict.fromkeys(
            name
            for layer in range(first, last + 1)
            for name in self._slot(STASH, layer).hook_names()
        )

    def spare_names(self) -> list[str]:
        return list(self._stash_names())

    def resolve_names(self, names: NamesFilter, n_loops: int | None = None) -> list[str]:
        if callable(names) or names is None:
            return super().resolve_names(names, n_loops)
        entries = [names] if isinstance(names, str) else list(names)
        stash = [entry for entry in entries if entry.startswith("stash.")]
        others = [entry for entry in entries if entry not in stash]
        found = resolve(stash, self._stash_names(), n_loops or 1) if stash else []
        return super().resolve_names(others, n_loops) + found if others or not stash else found


def entry_of(layer: int) -> str:
    """The visit under which a cache keeps the keys and values of a layer of the window."""
    return f"loops.0.blocks.{layer}"
