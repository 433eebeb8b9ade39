"""The base of all looped models: a program over shared blocks that can stop and resume at every
visit.

A forward pass is a schedule of visits. `begin` makes the state before the first visit, `advance`
runs visits, `readout` reads logits; everything else in this project is built on these three. Axes:
batch pos d_model head d_head d_mlp d_vocab loop layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from loopscope.models.basis.names import NamesFilter, is_pattern
from loopscope.models.basis.tensor_files import TensorFile, kept_in
from loopscope.models.basis.tokens import Batch, Readout, Words
from loopscope.models.core import describe
from loopscope.models.core.attention import KeyValues, KeyValueStore, Rows
from loopscope.models.core.cache import LoopCache
from loopscope.models.core.compiled import EagerWhileHooked
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.family import Family
from loopscope.models.core.hooks import NO_TAPS, Hook, Taps, existing_modules, live, tap
from loopscope.models.core.intervene import (
    RESIDUAL_STREAM,
    Direction,
    Interventions,
    Keep,
    PosSlice,
    check_one_row,
    in_directions,
    loops_of_call,
)
from loopscope.models.core.points import HookPoints
from loopscope.models.core.schedule import EditedSchedule, Schedules, UnrunnableSchedule
from loopscope.models.core.state import (
    State,
    Visit,
    checked_loops,
    checked_mask,
    checked_tokens,
    integers,
    refuse_unmasked_padding,
    running,
)
from loopscope.models.core.texts import ReturnType, TextInputs, Texts

Pairs = Sequence[tuple[NamesFilter, Hook]]


class LoopedModel(Family, EagerWhileHooked, HookedRootModule):
    """A looped transformer: shared weights, with hook points of their own for every iteration.

    A run has three steps: `begin` makes the first state, `advance` runs visits, and `readout` reads
    logits. `forward` makes all three. The family declares which blocks run in which order; see
    `Family`.

    Attributes:
        cfg: The frozen configuration.
        vocab: The vocabulary or tokenizer, which `encode` and `to_tokens` need; None if the
            checkpoint has none.
        read_at: The column at which answers are read; None if the checkpoint does not say it.
        visit_blocks: One block per visit in a copy made by `untied`; None if the weights are
            shared.
    """

    def __init__(self, cfg: LoopedConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.vocab: Words | None = None
        self.read_at: Readout | None = None
        self.visit_blocks: nn.ModuleList | None = None
        self._points = HookPoints(self, self.plan, self.edge_sites, self.aside)
        self.watch = self._points.watch
        self._schedules = Schedules(self, self.plan, self._points)
        self._hooking = Interventions(self, self._points)

    if TYPE_CHECKING:

        @overload
        def __call__(self, *inputs: Any, return_type: None, **options: Any) -> None: ...
        @overload
        def __call__(
            self, *inputs: Any, return_type: Literal["both"], **options: Any
        ) -> tuple[Tensor, Tensor]: ...
        @overload
        def __call__(
            self, *inputs: Any, return_type: Literal["logits", "loss"] = ..., **options: Any
        ) -> Tensor: ...
        def __call__(self, *inputs: Any, **options: Any) -> Any: ...

    def __repr__(self) -> str:
        return describe.as_text(self)

    def _repr_html_(self) -> str:
        """The model on one screen of a notebook."""
        return describe.as_html(self)

    # Running

    def begin(
        self,
        tokens: Tensor | Batch,
        mask: Tensor | None = None,
        *,
        n_loops: int | None = None,
        **options: Any,
    ) -> State:
        """Make the state before the first visit of a run.

        Args:
            tokens: Token ids Int[Tensor, "batch pos"], or a `Batch`, which has a mask and options
                of its own.
            mask: The mask, "batch pos", ones for real tokens and then zeros; None means no padding.
            n_loops: The number of iterations; None means the number that the checkpoint records.
            options: Further inputs that the family takes, such as an initial state, a seed or token
                types.

        Returns:
            The state, to be given to `advance`.

        Raises:
            ValueError: A token is outside the vocabulary, the mask is not ones and then zeros, an
                input is longer than learned positions allow, there is less than one iteration, or a
                hook is at an iteration that this call does not have.
        """
        if isinstance(tokens, Batch):
            given = self.texts.given(tokens, mask, options, None)
            return self.begin(given.tokens, given.mask, n_loops=n_loops, **given.options)
        tokens, real, n_loops = self.checked_inputs(tokens, mask, n_loops)
        self.refuse_late_hooks(n_loops)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        taps = live(self.edge_points()) if self.any_hook() else NO_TAPS
        resid, parts = self.embed(tokens, positions, taps, **options)
        edit = self._schedules.edit
        order = None if edit is None else edit.order
        return State(0, n_loops, resid, positions, real, parts, order)

    def checked_inputs(
        self, tokens: Tensor, mask: Tensor | None, n_loops: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """Check the tokens, the mask and the number of iterations of a call, and return them in
        their usual form. It raises the errors of `begin`.
        """
        tokens = checked_tokens(tokens, self.cfg.d_vocab)
        if self.cfg.n_ctx is not None and tokens.shape[1] > self.cfg.n_ctx:
            raise ValueError(
                f"inputs may have at most n_ctx={self.cfg.n_ctx} positions in this model, got"
                f" {tokens.shape[1]}"
            )
        if mask is None and not self.causal:
            refuse_unmasked_padding(tokens)
        return tokens, checked_mask(mask, tokens), checked_loops(n_loops, self.cfg.n_loops)

    def advance(
        self,
        state: State,
        until: int | str | None = None,
        *,
        supplied: KeyValueStore | None = None,
        store: KeyValueStore | None = None,
    ) -> State:
        """Run visits from the one at which the state stands.

        Args:
            state: A state from `begin` or `advance`, or some rows of one.
            until: The visit before which the run stops: its index, its name ("loops.3.blocks.0"),
                or an iteration ("loops.3"). None means the end of the schedule.
            supplied: Keys and values of other rows at each visit, by the visit's name, if the state
                holds only some of the rows. `store` of an earlier run has the right form.
            store: A dictionary to which each visit's keys and values are added.

        Returns:
            The state before the visit `until`.
        """
        schedule = self.schedule(state.n_loops)
        stop = self._schedules.index_of(until, state)
        if stop == state.visit:
            return state
        hooked = self.any_hook()
        if hooked:
            self.refuse_late_hooks(state.n_loops)
        example = _supplied_first(schedule[state.visit : stop], supplied)
        rows = Rows.make(state, type(self).visible, example)
        resid, parts = state.resid, state.parts
        with running(state.positions if hooked else None):
            for visit in schedule[state.visit : stop]:
                here = rows if visit.frozen else rows.at(visit.name, supplied, store)
                resid, parts = self.run_visit(visit, resid, parts, here, hooked)
        return replace(state, visit=stop, resid=resid, parts=parts)

    def run_visit(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, hooked: bool
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run one visit on some rows: the start of the iteration if the visit opens it, the block,
        and the end of the iteration if the visit closes it.

        Args:
            resid, parts: The residual stream and the other parts of the state of these rows, "batch
                row ...".
            hooked: Whether any hook point may hold a hook.
        """
        boundary = live(visit.boundary) if hooked else NO_TAPS
        taps = live(visit.points) if hooked else NO_TAPS
        own = visit.acts_as or visit
        if visit.opening:
            resid, parts = self.enter(own, resid, parts, boundary)
        if visit.keeps or visit.frozen:
            resid, parts = self._run_kept(visit, resid, parts, rows, taps)
        else:
            resid, parts = self.visit_block(own, resid, parts, rows, taps)
        return self.leave(own, resid, parts, boundary) if visit.closing else (resid, parts)

    def _run_kept(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Run a block whose addition to the stream is kept, or add one that was kept."""
        if visit.frozen:
            resid = tap(taps, "hook_resid_pre", resid) + parts[visit.frozen]
            return tap(taps, "hook_resid_post", resid), parts
        after, made = self.visit_block(visit.acts_as or visit, resid, parts, rows, taps)
        if any(made[name] is not parts.get(name) for name in made):
            changed = next(name for name in made if made[name] is not parts.get(name))
            raise UnrunnableSchedule(
                f"a block of this {type(self).__name__} changes more than the stream ({changed!r}),"
                " so it cannot be frozen"
            )
        return after, {**made, visit.keeps: after - resid}

    def finish(self, state: State) -> State:
        """Take a state at the end of an iteration through the visits that follow the loop (the
        coda), so that `readout` can read it.
        """
        self._schedules.check(state)
        end = self.iteration_ends(state.n_loops)[-1]
        if end == len(self.schedule(state.n_loops)):
            return state
        return self.advance(replace(state, visit=end))

    def state_parts(self, state: State) -> Mapping[str, Tensor]:
        """The parts of a state that can be analysed, by name: the residual stream ("resid"), and
        the family's other parts.
        """
        return {"resid": state.resid, **state.parts}

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream from which the head would read the answer of a state, if the run
        stopped there; `readout` describes the arguments.
        """
        taps = live(self.edge_points()) if self.any_hook() else NO_TAPS
        return self.normalize(stream_at(state, positions), taps)

    def readout(self, state: State, positions: Int[Tensor, " batch"] | None = None) -> Tensor:
        """Read the logits of a state at the end of an iteration, as the family's own answer if the
        run stopped there.

        Args:
            state: A state at the end of the schedule or of an iteration.
            positions: Int[Tensor, " batch"], the column of each row to read; None for all columns.

        Returns:
            Float[Tensor, "batch d_vocab"] at the positions, or Float[Tensor, "batch pos d_vocab"].

        Raises:
            TypeError: The positions are not integers.
        """
        columns = None if positions is None else integers(positions)
        if positions is not None and columns is None:
            raise TypeError(
                "positions must be an integer tensor, one column for each row, got"
                f" {getattr(positions, 'dtype', type(positions).__name__)}"
            )
        logits = self.unembed(self.read_state(state, columns))
        return logits if positions is None else logits[:, 0]

    def forward(
        self,
        tokens: Tensor | Batch | Texts,
        n_loops: int | None = None,
        mask: Tensor | None = None,
        *,
        return_type: ReturnType = "logits",
        prepend_bos: bool | None = None,
        **options: Any,
    ) -> Any:
        """Run the model and return its logits at all positions.

        Args:
            tokens: Token ids, a `Batch`, a text or a list of texts.
            n_loops: The number of iterations; None means the number that the checkpoint records.
            mask, options: Padding and further inputs, as `begin` describes them.
            return_type: "logits", "loss" (the mean cross-entropy of each real token after the first
                one, in nats), "both" (the pair of them), or None, which returns None and is for
                hooks alone.
            prepend_bos: Whether texts begin with a special token, as `encode` describes it.

        Returns:
            Float[Tensor, "batch pos d_vocab"], or the value that `return_type` names.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise ValueError(
                f"return_type must be 'logits', 'loss', 'both' or None, got {return_type!r}"
            )
        given = self.texts.given(tokens, mask, options, prepend_bos)
        state = self.begin(given.tokens, given.mask, n_loops=n_loops, **given.options)
        logits = self.readout(self.advance(state))
        if return_type in ("logits", None):
            return logits if return_type else None
        loss = given.loss(logits, self.causal)
        return loss if return_type == "loss" else (logits, loss)

    def extend(self, state: State, before: KeyValueStore) -> tuple[State, KeyValueStore]:
        """Run the next tokens of sequences that are being generated.

        The family decides which keys and values of earlier tokens the new ones see.

        Args:
            state: The state of the new tokens before the first visit.
            before: The keys and values of earlier tokens; empty for the first tokens.

        Returns:
            The state at the end, and the keys and values of these tokens for later ones, in the
            form that `advance` takes as `supplied`.
        """
        new: KeyValueStore = {}
        return self.advance(state, supplied=before or None, store=new), new

    # The schedule and the hook points

    @property
    def edited(self) -> EditedSchedule | None:
        """The edited schedule that is on at the moment; None if the model's own schedule is."""
        return self._schedules.edit

    @contextmanager
    def scheduled(self, visits: Sequence[Visit]) -> Iterator[Self]:
        """Inside the `with` block other visits run instead of the model's own;
        `loopscope.schedule_edit` is the call for users.
        """
        self._schedules.begin_edit(visits)
        try:
            yield self
        finally:
            self._schedules.end_edit()

    def setup(self) -> None:
        """Give the modules their names; a family calls it once its weights are made."""
        with self._points.hidden():
            for name, module in self.named_modules():
                module.name = name

    @property
    def hook_dict(self) -> dict[str, HookPoint]:  # type: ignore[override]  # made when asked for
        """Every hook point by name."""
        return self._points.all()

    @property
    def mod_dict(self) -> dict[str, nn.Module]:  # type: ignore[override]  # made when asked for
        """Every module by name, hook points included."""
        return dict(self.named_modules())

    def hooked_points(self) -> dict[str, HookPoint]:
        """The hook points that hold a hook now, by name."""
        return self._points.hooked()

    def hook_point(self, name: str) -> HookPoint:
        """The hook point of a full name, such as "loops.3.blocks.0.attn.hook_z"."""
        return self._points.point(name)

    def _named_members(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        """PyTorch's walk for parameters and buffers, which hook points do not have."""
        with self._points.hidden():
            members = list(super()._named_members(*args, **kwargs))
        return iter(members)

    def schedule(self, n_loops: int | None = None) -> list[Visit]:
        """List the visits of a call with `n_loops` iterations, in the order in which they run."""
        return self._schedules.of(checked_loops(n_loops, self.cfg.n_loops))

    def iteration_ends(self, n_loops: int) -> list[int]:
        """For each iteration, the index in the schedule of the visit that follows the iteration."""
        ends = {v.loop: v.index + 1 for v in self.schedule(n_loops)}
        return [ends[loop] for loop in range(n_loops)]

    def grow(self, n_loops: int) -> None:
        """Allow hooks at the iterations of calls of up to `n_loops` iterations. A point is made
        only when a hook or a walk through the modules needs it.
        """
        self._schedules.refresh()
        self._points.grow(n_loops)

    def hook_names(self, n_loops: int | None = None) -> list[str]:
        """List every hook name of a call with `n_loops` iterations, in order of execution."""
        self._schedules.refresh()
        return list(self._points.names(checked_loops(n_loops, self.cfg.n_loops)))

    def resolve_names(self, names: NamesFilter, n_loops: int | None = None) -> list[str]:
        """List the hook names of a call that a filter matches; see `HookPoints.resolve`."""
        self._schedules.refresh()
        return self._points.resolve(names, n_loops, self.cfg.n_loops)

    def edge_points(self) -> dict[str, HookPoint]:
        """The hook points before the first visit and after the last, by name."""
        return self._points.place("")

    def refuse_late_hooks(self, n_loops: int) -> None:
        """Refuse a call in which some hook would never fire; see `HookPoints.refuse_late`."""
        self._schedules.refresh()
        self._points.grow(n_loops)
        if self.any_hook():
            self._points.refuse_late(n_loops)

    # Hooks and caches

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
        """Attach a hook `fn(value, hook)` to every point that a filter matches, until
        `reset_hooks`.

        Args:
            name: A hook name, a pattern, a list, or a function from a name to a bool.
            hook: The function. If it returns a tensor, the run goes on with it.
            dir: "fwd" for activations, "bwd" for gradients.
            is_permanent: Whether `reset_hooks` leaves the hook in place.
            level, prepend: The level and the order of the hook, as in TransformerLens.
            n_loops: The number of iterations of the call whose names the filter is matched with;
                None means the number that the checkpoint records, beyond which an exact name may
                lie.
        """
        self._schedules.refresh()
        how: dict[str, Any] = {"is_permanent": is_permanent, "prepend": prepend}
        self._hooking.attach([(name, hook, dir)], n_loops, self.cfg.n_loops, level, **how)

    def add_perma_hook(
        self, name: NamesFilter, hook: Hook, dir: Direction = "fwd", n_loops: int | None = None
    ) -> None:
        """Attach a hook that `reset_hooks` leaves in place; `add_hook` describes the arguments."""
        self.add_hook(name, hook, dir=dir, is_permanent=True, n_loops=n_loops)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Pairs = (),
        bwd_hooks: Pairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        n_loops: int | None = None,
    ) -> Iterator[Self]:
        """Attach hooks for the length of a `with` block. At its end, also after an error, these
        hooks are removed and no others.

        Args:
            fwd_hooks, bwd_hooks: Pairs of a filter and a hook `fn(value, hook)`, for activations
                and for gradients.
            reset_hooks_end: Whether the hooks are removed at the end.
            clear_contexts: Whether the points' contexts are cleared at the end too.
            n_loops: The number of iterations of the calls inside, for which patterns are resolved.
                A call of another number is refused.

        Yields:
            The model.
        """
        self._schedules.refresh()
        with self._hooking.during(
            in_directions(fwd_hooks, bwd_hooks),
            n_loops,
            self.cfg.n_loops,
            remove=reset_hooks_end,
            clear_contexts=clear_contexts,
        ):
            yield self

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: Pairs = (),
        bwd_hooks: Pairs = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Run the model once with hooks that are removed afterwards.

        Args:
            model_args, model_kwargs: The inputs, as `forward` describes them. Filters are matched
                with the names of this call.
            fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts: The hooks, as `hooks` describes
                them.

        Returns:
            The logits at all positions.

        Raises:
            KeyError: The call does not have a name; then no hook is attached.
            ValueError: Backward hooks would be removed before any backward pass.
        """
        if bwd_hooks and reset_hooks_end:
            raise ValueError(
                "backward hooks would be removed before a backward pass; pass"
                " reset_hooks_end=False, use `with model.hooks(bwd_hooks=...)`, or"
                " loopscope.gradients"
            )
        n_loops = loops_of_call(model_args, model_kwargs, self.cfg.n_loops)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts, n_loops):
            logits: Tensor = self(*model_args, **model_kwargs)
        return logits

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
        """Make hooks that copy activations into a dictionary, without attaching them;
        `run_with_cache` describes the arguments.

        Returns:
            The dictionary, the forward hooks and the backward hooks.
        """
        if incl_bwd:
            raise ValueError(
                "incl_bwd is not supported: a looped model's gradients belong to one iteration"
                " each; use loopscope.gradients"
            )
        store: dict[str, Tensor] = {} if cache is None else cache
        save = Keep(device, remove_batch_dim, pos_slice).into(store)
        wanted = RESIDUAL_STREAM if names_filter is None else names_filter
        return store, [(name, save) for name in self.resolve_names(wanted, n_loops)], []

    def add_caching_hooks(
        self,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        cache: dict[str, Tensor] | None = None,
        n_loops: int | None = None,
    ) -> dict[str, Tensor]:
        """Attach hooks that copy activations into a dictionary until `reset_hooks`;
        `run_with_cache` describes the arguments.

        Returns:
            The dictionary, which each run fills.
        """
        store, fwd, _ = self.get_caching_hooks(
            names_filter, incl_bwd, device, remove_batch_dim, cache, n_loops=n_loops
        )
        attached = self._hooking.attach(in_directions(fwd, ()), n_loops, self.cfg.n_loops)
        if names_filter is None or is_pattern(names_filter):
            length = checked_loops(n_loops, self.cfg.n_loops)
            self._points.belongs_to(length, [handle for _, handle in attached])
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
        to: str | Path | None = None,
        **model_kwargs: Any,
    ) -> tuple[Float[Tensor, "batch pos d_vocab"], LoopCache]:
        """Run the model and keep activations, each under a name with its iteration.

        Args:
            model_args, model_kwargs: The inputs, as `forward` describes them.
            names_filter: The activations to keep: a hook name, a pattern, a list, or a function
                from a name to a bool. None keeps the residual stream (embedding, resid_pre,
                resid_mid, resid_post), and `"**"` keeps everything.
            device: The device of the kept activations, e.g. "cpu"; None leaves them where they are.
            remove_batch_dim: Whether the batch axis of a batch of one is removed.
            incl_bwd: Not supported; it must be False.
            reset_hooks_end, clear_contexts: The end of the hooks, as `hooks` describes it.
            pos_slice: The positions to keep (for scores and patterns the query positions), in any
                form of TransformerLens's Slice. An int keeps an axis of length one.
            to: "cpu" copies activations from a GPU into pinned memory while the run goes on. A path
                writes each activation into that file as it is computed, and the cache reads it
                memory-mapped, so that it may be larger than memory. `LoopCache.load` opens the file
                again.

        Returns:
            The logits at all positions, and a `LoopCache`.

        Raises:
            KeyError: The filter matches nothing in this call.
            ValueError: `remove_batch_dim` is set for a batch of more than one, `incl_bwd` is set,
                or both `to` and `device` are given.
        """
        n_loops = loops_of_call(model_args, model_kwargs, self.cfg.n_loops)
        if remove_batch_dim:
            check_one_row(model_args, model_kwargs)
        if to is not None and device is not None:
            raise ValueError(
                f"to= says where the cache is kept already, so leave device={device} out"
            )
        wanted = self.resolve_names(
            RESIDUAL_STREAM if names_filter is None else names_filter, n_loops
        )
        about = {"n_loops": str(n_loops), "has_batch_dim": str(not remove_batch_dim)}
        with kept_in(to, len(wanted), about) as held:
            _, fwd, _ = self.get_caching_hooks(
                wanted,
                incl_bwd,
                device,
                remove_batch_dim,
                held,
                pos_slice,
                n_loops,
            )
            with self.hooks(fwd, [], reset_hooks_end, clear_contexts, n_loops):
                logits = self(*model_args, **model_kwargs)
        if isinstance(held, TensorFile):
            return logits, LoopCache.load(str(to))
        return logits, LoopCache(dict(held), n_loops, has_batch_dim=not remove_batch_dim)

    # Texts

    @property
    def device(self) -> torch.device:
        """The device of the weights (of the first one)."""
        weights = (
            weight for part in existing_modules(self) for weight in part._parameters.values()
        )
        return next(weight.device for weight in weights if weight is not None)

    @property
    def texts(self) -> TextInputs:
        """The converter of texts to inputs, with the model's vocabulary and readout."""
        return TextInputs(self.vocab, self.read_at, self.cfg.n_ctx, self.positional, self.device)

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of transformers that the checkpoint came with; None if it has none."""
        return getattr(self.vocab, "tokenizer", None)

    def encode(self, texts: Texts, prepend_bos: bool | None = None) -> Batch:
        """Turn texts into a `Batch`: tokens padded on the right, a mask, and the column at which
        each answer is read.

        Args:
            texts: A text or a list of texts.
            prepend_bos: True puts the token that begins a text in front, False puts no special
                token anywhere. None does what the checkpoint's tokenizer does by default.

        Returns:
            The batch, as wide as the readout needs.

        Raises:
            ValueError: The checkpoint has no vocabulary, or does not say where answers are read.
        """
        return self.texts.encode(texts, prepend_bos)

    def to_tokens(self, texts: Texts, prepend_bos: bool | None = None) -> Int[Tensor, "batch pos"]:
        """Turn texts into token ids, padded on the right with id 0; `encode` describes the
        arguments.
        """
        return self.texts.to_tokens(texts, prepend_bos)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: The text is not exactly one token.
        """
        return self.texts.to_single_token(text)

    def to_string(self, tokens: Sequence[Any] | Tensor) -> str | list[str]:
        """The text of one row of token ids, or the texts of several rows, special tokens included.

        Raises:
            ValueError: The input is not made of integers, or an id is outside the vocabulary.
        """
        return self.texts.to_string(tokens)

    def to_str_tokens(
        self, tokens: str | Sequence[int] | Tensor, prepend_bos: bool | None = None
    ) -> list[str]:
        """The tokens of one text, or of one row of token ids, each as a string.

        Args:
            tokens: The text or the token ids.
            prepend_bos: Whether the text begins with a special token, as `encode` describes it.

        Raises:
            ValueError: The input is neither a text nor a row of integers, or an id is outside the
                vocabulary.
        """
        return self.texts.to_str_tokens(tokens, prepend_bos)


def at_columns(x: Shaped[Tensor, "batch pos ..."], columns: Int[Tensor, " batch"]) -> Tensor:
    """The values of each row at one column of its own."""
    return x[torch.arange(x.shape[0], device=x.device), columns.to(x.device)]


def _supplied_first(visits: Sequence[Visit], supplied: KeyValueStore | None) -> KeyValues | None:
    """The keys and values supplied to the first of some visits that has any; None without them."""
    if supplied is None:
        return None
    return next((supplied[visit.name] for visit in visits if not visit.frozen), None)


def stream_at(
    state: State, positions: Int[Tensor, " batch"] | None
) -> Float[Tensor, "batch pos d_model"]:
    """The residual stream of a state, at one column of each row or at all columns."""
    return state.resid if positions is None else at_columns(state.resid, positions)[:, None]
