"""The base of all looped models: a program over shared blocks that can stop and resume at every
visit.

A forward pass is a schedule of visits. `begin` makes the state before the first visit, `advance`
runs visits, `readout` reads logits; everything else in this project is built on these three. Axes:
batch pos d_model head d_head d_mlp d_vocab loop layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from loopscope.models.core.attention import KeyValueStore, Rows, Visible, causal_keys
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import NO_TAPS, Taps, live
from loopscope.models.core.state import (
    Slot,
    State,
    Visit,
    checked_loops,
    checked_mask,
    checked_tokens,
    running,
)
from loopscope.models.core.texts import TextInputs


class LoopedModel(TextInputs):
    """A looped transformer whose weights live once and whose hook points live once per iteration.

    A family gives: `plan` (its schedule), `embed`, `enter` and `leave` (what happens where an
    iteration opens and closes), `normalize` and `unembed` (final norm, head), the names of its
    sites, and four facts.

    Attributes:
        cfg: The frozen configuration.
        vocab: Set where the checkpoint has one; `encode` and `to_tokens` need it.
        read_at: Where answers are read; None where the checkpoint does not say.
        causal: A later token never changes an earlier result.
        prefix_readout: Stopping after t iterations and reading out equals a call with n_loops=t.
        additive_residual: The residual stream is a plain sum of component outputs.
        batch_independent: A row's result does not depend on the other rows.
        rowwise: Outside attention each (batch, position) is computed on its own, and every part of
            the state is "batch pos ...", so that any rows can be run side by side.
        heads_read_stream: A head's queries, keys and values are made of the residual stream at
            their own visit.
        visible: Which keys a row may see.
        visit_blocks: One block per visit in a copy made by `untied`; None where the weights are
            shared.
    """

    causal: ClassVar[bool] = True
    prefix_readout: ClassVar[bool] = True
    batch_independent: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    heads_read_stream: ClassVar[bool] = True
    visible: ClassVar[Visible] = staticmethod(causal_keys)

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.visit_blocks: nn.ModuleList | None = None
        self._schedules: dict[int, list[Visit]] = {}

    # What a family declares

    @property
    def additive_residual(self) -> bool:
        """Whether the residual stream is a plain sum of component outputs."""
        return True

    @property
    def loop_parts(self) -> tuple[str, ...]:
        """The parts of the state that one iteration hands to the next."""
        return ("resid",)

    @abstractmethod
    def plan(self, n_loops: int) -> list[Slot]:
        """The schedule of a call, in order."""

    @abstractmethod
    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The residual stream before the first visit, and the family's other parts of the state;
        may take options of its own.
        """

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run one block. A family whose blocks read or write other parts of the state does so
        here.
        """
        return visit.block(resid, rows, taps), parts

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What happens before a visit that opens an iteration."""
        return resid, parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What happens after a visit that closes an iteration."""
        return resid, parts

    def extend(self, state: State, before: KeyValueStore) -> tuple[State, KeyValueStore]:
        """Run the next tokens of sequences that are being generated, by the family's rule for what
        they see of earlier ones.

        Args:
            state: Of the new tokens, before the first visit.
            before: What earlier tokens left; empty for the first ones.

        Returns:
            The state at the end, and what these tokens leave for later ones; both in the form that
            `advance` supplies and stores.
        """
        new: KeyValueStore = {}
        return self.advance(state, supplied=before or None, store=new), new

    def loops_after_prompt(self, n_loops: int) -> int:
        """Iterations for the tokens that are generated, in a call whose prompt is given
        `n_loops`.
        """
        return n_loops

    @abstractmethod
    def normalize(
        self, resid: Float[Tensor, "batch pos d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "batch pos d_model"]:
        """The final norm of any residual stream."""

    @property
    def final_scale_site(self) -> str:
        """Where the final norm shows its divisor."""
        return str(getattr(getattr(self, "final_norm", None), "scale_site", "ln_final.hook_scale"))

    @abstractmethod
    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """The head, which reads a normalised residual stream."""

    # Running

    def begin(
        self,
        tokens: Tensor,
        mask: Tensor | None = None,
        *,
        n_loops: int | None = None,
        **options: Any,
    ) -> State:
        """The state before the first visit.

        Args:
            tokens: Int[Tensor, "batch pos"].
            mask: "batch pos", ones for real tokens and then zeros; None means no padding.
            n_loops: Iterations; None means the number that the checkpoint records.
            options: What a family's `embed` takes besides (an initial state, a seed, token types).

        Raises:
            ValueError: Tokens outside the vocabulary, a mask that is not ones then zeros, an input
                longer than learned positions allow, fewer than one iteration, or a hook at an
                iteration that this call does not have.
        """
        tokens, real, n_loops = self.checked_inputs(tokens, mask, n_loops)
        self.refuse_late_hooks(n_loops)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        taps = live(self.edge_points()) if self.any_hook() else NO_TAPS
        resid, parts = self.embed(tokens, positions, taps, **options)
        return State(0, n_loops, resid, positions, real, parts)

    def checked_inputs(
        self, tokens: Tensor, mask: Tensor | None, n_loops: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """Tokens, mask and iterations of a call in their checked form; raises what `begin` says."""
        tokens = checked_tokens(tokens, self.cfg.d_vocab)
        if self.cfg.n_ctx is not None and tokens.shape[1] > self.cfg.n_ctx:
            raise ValueError(
                f"inputs may have at most n_ctx={self.cfg.n_ctx} positions in this model, got"
                f" {tokens.shape[1]}"
            )
        return tokens, checked_mask(mask, tokens), checked_loops(n_loops, self.cfg.n_loops)

    def advance(
        self,
        state: State,
        until: int | str | None = None,
        *,
        supplied: KeyValueStore | None = None,
        store: KeyValueStore | None = None,
    ) -> State:
        """Run visits from where the state stands.

        Args:
            state: From `begin`, `advance`, or rows of such a state.
            until: The visit to stop before: its index, its name ("loops.3.blocks.0"), an iteration
                ("loops.3"), or None for the end of the schedule.
            supplied: Keys and values of other rows at each visit, by the visit's name, for a state
                that holds a subset of the rows. `store` of an earlier run has the form that is
                needed.
            store: A dictionary that is given each visit's keys and values.
        """
        schedule = self.schedule(state.n_loops)
        stop = self._index_of(until, state)
        if stop == state.visit:
            return state
        hooked = self.any_hook()
        if hooked:
            self.refuse_late_hooks(state.n_loops)
        example = None if supplied is None else supplied[schedule[state.visit].name]
        rows = Rows.make(state, type(self).visible, example)
        resid, parts = state.resid, state.parts
        with running(state.positions if hooked else None):
            for visit in schedule[state.visit : stop]:
                resid, parts = self.run_visit(
                    visit, resid, parts, rows.at(visit.name, supplied, store), hooked
                )
        return replace(state, visit=stop, resid=resid, parts=parts)

    def run_visit(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, hooked: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run one visit on any rows: what opens the iteration, the block, what closes it.

        Args:
            resid, parts: Of the rows, "batch row ...".
            hooked: Whether any hook point may hold a hook.
        """
        boundary = live(visit.boundary) if hooked else NO_TAPS
        if visit.opening:
            resid, parts = self.enter(visit, resid, parts, boundary)
        resid, parts = self.visit_block(
            visit, resid, parts, rows, live(visit.points) if hooked else NO_TAPS
        )
        return self.leave(visit, resid, parts, boundary) if visit.closing else (resid, parts)

    def finish(self, state: State, loop: int) -> State:
        """The state after iteration `loop` (from 0), run through what follows the loop; this is
        what a readout there reads.
        """
        if self.iteration_ends(state.n_loops)[-1] == len(self.schedule(state.n_loops)):
            return state
        return self.advance(replace(state, n_loops=loop + 1))

    def state_parts(self, state: State) -> Mapping[str, Tensor]:
        """What an analysis may read of a state, by name: the residual stream, and the family's
        other parts.
        """
        return {"resid": state.resid, **state.parts}

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """What the head reads of a state that has finished an iteration; the arguments are those of
        `readout`.
        """
        taps = live(self.edge_points()) if self.any_hook() else NO_TAPS
        return self.normalize(stream_at(state, positions), taps)

    def readout(self, state: State, positions: Int[Tensor, " batch"] | None = None) -> Tensor:
        """Logits of a state that has finished an iteration: the family's own readout.

        Args:
            state: At the end of the schedule, or of an iteration.
            positions: Int[Tensor, " batch"], one column of each row; None for all of them.

        Returns:
            Float[Tensor, "batch d_vocab"] at the positions, or Float[Tensor, "batch pos d_vocab"].
        """
        logits = self.unembed(self.read_state(state, positions))
        return logits if positions is None else logits[:, 0]

    def forward(
        self, tokens: Tensor, n_loops: int | None = None, mask: Tensor | None = None, **options: Any
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits at all positions; the arguments are those of `begin`."""
        return self.readout(self.advance(self.begin(tokens, mask, n_loops=n_loops, **options)))

    # The schedule

    def schedule(self, n_loops: int | None = None) -> list[Visit]:
        """The visits of a call with `n_loops` iterations, in order."""
        n_loops = checked_loops(n_loops, self.cfg.n_loops)
        if n_loops not in self._schedules:
            self.grow(n_loops)
            visits = [self._visit(i, slot) for i, slot in enumerate(self.plan(n_loops))]
            if self.visit_blocks is not None:
                if len(visits) != len(self.visit_blocks):
                    raise ValueError(
                        f"an untied copy runs only the n_loops={self.cfg.n_loops} that it was made"
                        f" for, got {n_loops}"
                    )
                visits = [
                    replace(visit, block=block)
                    for visit, block in zip(visits, self.visit_blocks, strict=True)
                ]
            self._schedules[n_loops] = visits
        return self._schedules[n_loops]

    def iteration_ends(self, n_loops: int) -> list[int]:
        """For each iteration, the index in the schedule of the visit after its last one."""
        schedule = self.schedule(n_loops)
        return [max(v.index for v in schedule if v.loop == t) + 1 for t in range(n_loops)]

    def _names_of_call(self, n_loops: int) -> list[str]:
        before, after = self.edge_sites()
        return [
            *before,
            *(name for slot in self.plan(n_loops) for name in slot.hook_names()),
            *after,
        ]

    def _visit(self, index: int, slot: Slot) -> Visit:
        points = {site: self.hook_dict[f"{slot.name}.{site}"] for site in slot.sites}
        boundary = {
            site: self.hook_dict[f"{slot.scope}.{site}"] for site in slot.opening + slot.closing
        }
        own = {f.name: getattr(slot, f.name) for f in fields(Slot)}
        return Visit(**own, index=index, points=points, boundary=boundary)

    def _index_of(self, until: int | str | None, state: State) -> int:
        schedule = self.schedule(state.n_loops)
        if until is None:
            return len(schedule)
        if isinstance(until, str):
            found = [v.index for v in schedule if v.name == until or v.name.startswith(until + ".")]
            if not found:
                raise KeyError(
                    f"{until!r} is no visit of a schedule with n_loops={state.n_loops}; it starts"
                    f" with {schedule[0].name!r}"
                )
            until = found[0]
        if isinstance(until, bool):
            raise TypeError("until must be a visit's index, its name, or None, got a bool")
        if not state.visit <= until <= len(schedule):
            raise ValueError(
                f"the state stands before visit {state.visit} of {len(schedule)}, so it cannot be"
                f" run to visit {until}"
            )
        return until

    # Weight views that every family has

    @property
    @abstractmethod
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding."""

    @property
    @abstractmethod
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding."""

    @property
    @abstractmethod
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The unembedding's bias; zeros where the head has none."""


def at_columns(x: Shaped[Tensor, "batch pos ..."], columns: Int[Tensor, " batch"]) -> Tensor:
    """One position of each row."""
    return x[torch.arange(x.shape[0], device=x.device), columns.to(x.device)]


def stream_at(
    state: State, positions: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream of a state at one position of each row, or at all."""
    return state.resid if positions is None else at_columns(state.resid, positions)[:, None]
