"""The base of all looped models: a program over shared blocks that can stop and resume at every
visit.

A forward pass is a schedule of visits. `begin` makes the state before the first visit, `advance`
runs visits, `readout` reads logits; everything else in this project is built on these three. Axes:
batch pos d_model head d_head d_mlp d_vocab loop layer.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from loopscope.models.core import texts as texts_of
from loopscope.models.core.attention import KeyValueStore, Rows, Visible, causal_keys
from loopscope.models.core.cache import LoopCache
from loopscope.models.core.caching import RESIDUAL_STREAM, PosSlice, keeping
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import NO_TAPS, NamesFilter, SitePoints, Taps, is_pattern, live
from loopscope.models.core.points import Attached, Direction, Hook, HookPoints
from loopscope.models.core.schedule import BlockWatch, index_of
from loopscope.models.core.state import (
    Slot,
    State,
    Visit,
    checked_loops,
    checked_mask,
    checked_tokens,
    running,
)
from loopscope.models.core.tokens import Batch, Readout, Words

HookPairs = Sequence[tuple[NamesFilter, Hook]]


class LoopedModel(HookedRootModule):
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
        self.vocab: Words | None = None
        self.read_at: Readout | None = None
        self.visit_blocks: nn.ModuleList | None = None
        self.points = HookPoints(self, self._names_of_call, self.spare_names, cfg.n_loops)
        self._schedules: dict[int, list[Visit]] = {}
        self._blocks_seen = BlockWatch(self)

    def setup(self) -> None:
        """Name the modules; a family calls it when its weights are made."""
        super().setup()
        self.hook_dict = self.points  # type: ignore[assignment]  # a dictionary that grows

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
        """Act before a visit that opens an iteration."""
        return resid, parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Act after a visit that closes an iteration."""
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

    @property
    def positional(self) -> bool:
        """Whether a token's position changes what the model computes for it."""
        return True

    @abstractmethod
    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Hook names before the first visit, and after the last."""

    def spare_names(self) -> list[str]:
        """Hook names that no plain call has."""
        return []

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
        stop = index_of(until, schedule, state)
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
        """The parts of a state that an analysis may read, by name: the residual stream, and the
        family's other parts.
        """
        return {"resid": state.resid, **state.parts}

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream that the head reads of a state after an iteration; the arguments are those of
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
        if self._blocks_seen.changed():
            self._schedules.clear()
            self.points.forget_names()
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
            self._blocks_seen.watch([visit.block for visit in visits])
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
        own = {f.name: getattr(slot, f.name) for f in fields(Slot)}
        points = self.points.at(slot.name, slot.sites)
        boundary = self.points.at(slot.scope, slot.opening + slot.closing)
        return Visit(**own, index=index, points=points, boundary=boundary)

    # Hooks, by `HookPoints`

    def hook_names(self, n_loops: int | None = None) -> list[str]:
        """Every hook name of a call with `n_loops` iterations, in order of execution."""
        return list(self.points.names(checked_loops(n_loops, self.cfg.n_loops)))

    def resolve_names(self, names: NamesFilter, n_loops: int | None = None) -> list[str]:
        """The hook names that a filter means in a call; see `models.core.points`."""
        return self.points.resolve(names, n_loops)

    def grow(self, n_loops: int) -> None:
        """Let the points of calls of up to `n_loops` iterations exist; they never go away."""
        self.points.grow(n_loops)

    def edge_points(self) -> SitePoints:
        """The points outside the schedule's visits, by name."""
        before, after = self.edge_sites()
        return self.points.at("", before + after)

    def any_hook(self) -> bool:
        """Whether any point holds a hook."""
        return bool(self.points.watch)

    def refuse_late_hooks(self, n_loops: int) -> None:
        """Raise ValueError if a hook would silently never fire in a call of `n_loops`."""
        self.points.refuse_late(n_loops)

    def hook_points(self) -> list[HookPoint]:
        """The points that something has asked for; no other can hold a hook."""
        return list(self.points.made.values())

    def add_hook(
        self,
        name: NamesFilter,
        hook: Hook,
        dir: Direction = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
        n_loops: int | None = None,
    ) -> None:
        """Attach a hook `fn(value, hook)` to every point that the filter means in a call of
        `n_loops` iterations.
        """
        options = {"is_permanent": is_permanent, "level": level, "prepend": prepend}
        self._attach([(name, hook, dir)], n_loops, **options)

    def add_perma_hook(
        self, name: NamesFilter, hook: Hook, dir: Direction = "fwd", n_loops: int | None = None
    ) -> None:
        """Attach a hook that `reset_hooks` leaves in place."""
        self.add_hook(name, hook, dir=dir, is_permanent=True, n_loops=n_loops)

    def _attach(
        self,
        wanted: Sequence[tuple[NamesFilter, Hook, Direction]],
        n_loops: int | None,
        **options: Any,
    ) -> list[Attached]:
        """Attach several hooks, all of them or none."""
        resolved = [self.resolve_names(names, n_loops) for names, _, _ in wanted]
        attached: list[Attached] = []
        try:
            for (names, hook, dir), found in zip(wanted, resolved, strict=True):
                only = checked_loops(n_loops, self.cfg.n_loops) if is_pattern(names) else None
                attached += self.points.attach(found, hook, dir, only, **options)
        except BaseException:
            for one in attached:
                one.remove()
            raise
        return attached

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookPairs = (),
        bwd_hooks: HookPairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        n_loops: int | None = None,
    ) -> Iterator[LoopedModel]:
        """Hooks for the length of a `with` block; also after an error, exactly these are removed
        and no others.

        Args:
            fwd_hooks, bwd_hooks: Pairs of a filter and a hook `fn(value, hook)`.
            reset_hooks_end: Remove them at the end.
            clear_contexts: Also clear the points' contexts at the end.
            n_loops: Iterations of the calls inside; patterns are resolved for it, and a call of
                another length raises.
        """
        wanted: list[tuple[NamesFilter, Hook, Direction]] = []
        wanted += [(name, fn, "fwd") for name, fn in fwd_hooks]
        wanted += [(name, fn, "bwd") for name, fn in bwd_hooks]
        attached = self._attach(wanted, n_loops, level=self.context_level + 1)
        self.context_level += 1
        try:
            yield self
        finally:
            self.context_level -= 1
            for one in attached if reset_hooks_end else ():
                one.remove()
            if clear_contexts:
                self.clear_contexts()

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: HookPairs = (),
        bwd_hooks: HookPairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Tensor:
        """Run the model with temporary hooks. Hooks are resolved for the call's own `n_loops`.

        Raises:
            KeyError: A name that this call does not have; nothing is attached then.
            ValueError: Backward hooks that would be removed before any backward pass.
        """
        if bwd_hooks and reset_hooks_end:
            raise ValueError(
                "backward hooks would be removed before a backward pass; pass"
                " reset_hooks_end=False, use `with model.hooks(bwd_hooks=...)`, or"
                " loopscope.gradients"
            )
        n_loops = self._loops_of_call(model_args, model_kwargs)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, n_loops):
            output: Tensor = self(*model_args, **model_kwargs)
        return output

    def _loops_of_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        given = kwargs.get("n_loops", args[1] if len(args) > 1 else None)
        return checked_loops(given, self.cfg.n_loops)

    # Caching

    def get_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        pos_slice: PosSlice = None,
        n_loops: int | None = None,
    ) -> tuple[dict[str, Tensor], list[tuple[NamesFilter, Hook]], list[tuple[NamesFilter, Hook]]]:
        """Hooks that fill a dictionary; they are not attached yet. See `run_with_cache` for the
        arguments.
        """
        if incl_bwd:
            raise ValueError(
                "incl_bwd is not supported: a looped model's gradients belong to one iteration"
                " each; use loopscope.gradients"
            )
        store: dict[str, Tensor] = {} if cache is None else cache
        keep = keeping(store, device, pos_slice, remove_batch_dim)
        wanted = RESIDUAL_STREAM if names_filter is None else names_filter
        return store, [(name, keep) for name in self.resolve_names(wanted, n_loops)], []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        n_loops: int | None = None,
    ) -> dict[str, Tensor]:
        """Attach hooks that fill a dictionary until `reset_hooks`. See `run_with_cache` for the
        arguments.
        """
        store, fwd, _ = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, n_loops=n_loops
        )
        wanted = RESIDUAL_STREAM if names_filter is None else names_filter
        if fwd:
            self.add_hook(wanted, fwd[0][1], n_loops=n_loops)
        return store

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: PosSlice = None,
        **model_kwargs: Any,
    ) -> tuple[Tensor, LoopCache]:
        """Run the model and keep activations, each under the name of its own iteration.

        Args:
            names_filter: What to keep: a name, a pattern, a list or a predicate. None keeps the
                residual stream (embedding, resid_pre, resid_mid, resid_post); `"**"` keeps
                everything.
            device: Where to keep it, e.g. "cpu".
            remove_batch_dim: Drop the batch axis of a batch of one.
            reset_hooks_end, clear_contexts: As in `hooks`.
            pos_slice: Positions to keep (for scores and patterns: query positions), in any form of
                TransformerLens's Slice; an int keeps an axis of one.

        Returns:
            The logits and a `LoopCache`.

        Raises:
            KeyError: The filter matches nothing in this call.
            ValueError: `remove_batch_dim` with a batch of more than one, or `incl_bwd`.
        """
        n_loops = self._loops_of_call(model_args, model_kwargs)
        tokens = model_kwargs.get("tokens", model_args[0] if model_args else None)
        if remove_batch_dim and isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) > 1:
            raise ValueError(f"remove_batch_dim needs a batch of one, got {len(tokens)}")
        store, fwd, _ = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, pos_slice=pos_slice, n_loops=n_loops
        )
        with self.hooks(fwd, [], reset_hooks_end, clear_contexts, n_loops):
            logits: Tensor = self(*model_args, **model_kwargs)
        return logits, LoopCache(store, n_loops, has_batch_dim=not remove_batch_dim)

    # Texts, by `models.core.texts`

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def encode(self, texts: str | Sequence[str]) -> Batch:
        """Right-padded tokens, mask and readout column of some texts, with the padding that the
        readout needs.

        Raises:
            ValueError: The checkpoint has no vocabulary, or does not say where answers are read.
        """
        n_ctx = self.cfg.n_ctx
        batch = texts_of.encoded(texts, self.vocab, self.read_at, n_ctx, self.positional)
        return batch.to(self.device)

    def to_tokens(self, texts: str | Sequence[str]) -> Int[Tensor, "batch pos"]:
        """Token ids of some texts, padded on the right with id 0."""
        rows = texts_of.ids_of(texts, self.vocab)
        return texts_of.pad_right(rows, max(map(len, rows)))[0].to(self.device)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token."""
        return texts_of.single_id(text, self.vocab)

    def to_str_tokens(self, tokens: str | Int[Tensor, " pos"]) -> list[str]:
        """The tokens of one text, or of one row of ids, as strings."""
        return texts_of.words_of(tokens, self.vocab)

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
