"""A looped model around a module that calls the same blocks several times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.core.attention import KeyValueStore
from loopscope.models.core.base import LoopedModel, at_columns
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import NO_TAPS, Taps, tap
from loopscope.models.core.state import Slot, State, Visit
from loopscope.models.wrapped.calls import Calls, logits_of, takes

_PREFIX = "Wrapped"
TOKENS, EMBEDDED, LOGITS, OPTION = "tokens", "embedded", "logits", "option."


@dataclass(frozen=True, kw_only=True)
class WrappedConfig(LoopedConfig):
    """Sizes of a wrapped module, as far as its own config tells them."""

    family: ClassVar[str] = "wrapped"
    act_fn: ClassVar[str] = ""
    normalization_type: ClassVar[str] = ""

    def width_of_head(self) -> int:
        return self.d_model // self.n_heads


@dataclass(frozen=True)
class Layout:
    """Where a module's parts are.

    Attributes:
        plan: The slots of a call by its number of iterations.
        paths: Each block's name in the module.
        parts: Submodules of a block whose outputs are shown, by site.
        embedding: The token embedding.
        norm: From the last block's output to what the head reads.
        head: From there to logits; None where no head was named.
        kwargs: Further arguments of every call of the module.
    """

    plan: Callable[[int], list[Slot]]
    paths: Mapping[nn.Module, str]
    parts: Mapping[str, str]
    embedding: nn.Module
    norm: Callable[[Tensor], Tensor] | None
    head: Callable[[Tensor], Tensor] | None
    kwargs: Mapping[str, Any]


class Wrapped(LoopedModel):
    """A looped model around a module whose blocks are hooked during each run; `wrap` makes it.

    The state before a visit is the output of the visit before. A module cannot be entered in the
    middle. So `advance` runs the module from the tokens, and at the state's visit replaces the
    residual stream by that of the state. Hooks at earlier visits run again. All that the module
    carries beside the stream is computed from the tokens too.

    Attributes:
        module: The wrapped module.
    """

    prefix_readout: ClassVar[bool] = False
    heads_read_stream: ClassVar[bool] = False
    runs_visits: ClassVar[bool] = False

    def __init__(self, cfg: WrappedConfig, module: nn.Module, layout: Layout) -> None:
        super().__init__(cfg)
        self.layout = layout
        self.training = module.training
        self.setup()  # before the module is here, since it names every module below
        self.module = module
        self.grow(cfg.n_loops or 1)
        self._checked = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        # a class that is made for a module stands in no file from which pickle could import it
        kind = type(self)
        facts = kind.__name__.removeprefix(_PREFIX), kind.causal, kind.batch_independent
        if kind is not wrapped_kind(*facts):
            return super().__reduce_ex__(protocol)
        state: dict[str, Any] = self.__getstate__()  # type: ignore[no-untyped-call]
        return _empty, facts, state

    @property
    def additive_residual(self) -> bool:
        return False

    @property
    def rowwise(self) -> bool:
        return False

    def plan(self, n_loops: int) -> list[Slot]:
        return self.layout.plan(n_loops)

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return ("hook_embed",), ()

    def schedule(self, n_loops: int | None = None) -> list[Visit]:
        if n_loops not in (None, self.cfg.n_loops):
            raise ValueError(
                f"this wrapped module runs n_loops={self.cfg.n_loops}, got {n_loops}; make the"
                " module run as many and wrap it again"
            )
        if self.visit_blocks is not None:
            raise ValueError(
                "a wrapped module calls its own blocks, so no copy can have a block for each visit;"
                " register a family for `untied`"
            )
        return super().schedule(n_loops)

    # Running

    def begin(
        self,
        tokens: Any,
        mask: Tensor | None = None,
        *,
        n_loops: int | None = None,
        **options: Any,
    ) -> State:
        self.schedule(n_loops)  # refuses another number of iterations
        given = self.texts.given(tokens, mask, options, None)
        return super().begin(
            given.tokens, given.mask, n_loops=n_loops, padding=given.mask, **given.options
        )

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        taps: Taps,
        *,
        padding: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The input of the first block.

        Args:
            padding: The mask, "batch pos", ones for real tokens; None means no padding.
            options: Further arguments of the module, each a tensor "batch pos ...".
        """
        parts = {TOKENS: tokens}
        for name, value in options.items():
            if not isinstance(value, Tensor) or value.shape[:2] != tokens.shape:
                raise ValueError(
                    f"an option of a call must be a tensor [batch, pos, ...] like the tokens, got"
                    f" {name!r}; pass other arguments to wrap(kwargs=...)"
                )
            parts[OPTION + name] = value

        def embedded(value: Tensor) -> Tensor:
            parts[EMBEDDED] = tap(taps, "hook_embed", value.clone())
            return parts[EMBEDDED].clone()  # as the module may write into it

        mask = torch.ones_like(tokens) if padding is None else padding
        calls, _ = self._call(parts, mask, (0, None, 0), embedded, hooked=False)
        assert calls.resid is not None, "a run that stops leaves a stream"
        return calls.resid, parts

    def advance(
        self,
        state: State,
        until: int | str | None = None,
        *,
        supplied: KeyValueStore | None = None,
        store: KeyValueStore | None = None,
    ) -> State:
        if supplied is not None or store is not None:
            raise ValueError(
                "a wrapped module keeps its keys and values to itself, so its rows cannot be run"
                " apart; register the module as a family for that"
            )
        stop = self._schedules.index_of(until, state)
        if stop == state.visit:
            return state
        expected = torch.arange(state.resid.shape[1], device=state.positions.device)
        if not bool((state.positions == expected).all()):
            raise ValueError("a wrapped module runs whole sequences, got a state of some columns")
        hooked = self.any_hook()
        if hooked:
            self.refuse_late_hooks(state.n_loops)
        given = (state.visit, state.resid, stop)
        calls, output = self._call(
            state.parts, state.mask, given, lambda value: state.parts[EMBEDDED].clone(), hooked
        )
        assert calls.resid is not None, "a run leaves a stream"
        parts = state.parts
        if output is not None:
            logits = logits_of(output, parts[TOKENS].shape)
            self._check_head(calls.resid, logits)
            parts = parts if self.layout.head else {**parts, LOGITS: logits}
        return replace(state, visit=stop, resid=calls.resid, parts=parts)

    def _call(
        self,
        parts: Mapping[str, Tensor],
        mask: Tensor,
        given: tuple[int, Tensor | None, int],
        embedded: Callable[[Tensor], Tensor],
        hooked: bool,
    ) -> tuple[Calls, Any]:
        """One run of the module on the tokens of a state, which are copied, as the module may write
        into them; `given` is the visit and the stream that the run takes over, and the visit before
        which it stops.
        """
        layout, kwargs = self.layout, dict(self.layout.kwargs)
        if not bool(mask.all()):
            if takes(self.module, "attention_mask"):
                kwargs["attention_mask"] = mask.long()
            elif not self.causal:
                raise ValueError(
                    "padding needs a module whose forward takes attention_mask, got one without;"
                    " pass unpadded tokens"
                )
        if takes(self.module, "use_cache"):
            kwargs.setdefault("use_cache", False)
        options = [name for name in parts if name.startswith(OPTION)]
        kwargs |= {name.removeprefix(OPTION): parts[name].clone() for name in options}
        start, resid, stop = given
        where = (self.module, self.schedule(), layout.paths, layout.parts)
        calls = Calls(*where, start, resid, stop, hooked)
        return calls, calls.run((layout.embedding, embedded), parts[TOKENS].clone(), **kwargs)

    def _check_head(self, resid: Tensor, logits: Tensor) -> None:
        """Raise, at the first whole run, where norm and head do not make the module's logits."""
        if self._checked or self.layout.head is None:
            return
        logits = logits.detach()
        with torch.no_grad():
            made = self.unembed(self.normalize(resid))
        same = made.shape == logits.shape
        error = float((made - logits).abs().max()) if same else float("inf")
        scale = max(1.0, float(logits.abs().max()))
        if not error <= 1000 * torch.finfo(resid.dtype).eps * scale:
            raise ValueError(
                "norm and head must make the module's logits of the last block's output, got logits"
                f" that differ by {error:.3g}; name the modules between the last block and the"
                " logits"
            )
        self._checked = True

    # Reading

    def state_parts(self, state: State) -> Mapping[str, Tensor]:
        return {"resid": state.resid}

    def finish(self, state: State) -> State:
        ends = self.iteration_ends(state.n_loops)
        if state.visit in ends[:-1]:
            raise ValueError(
                f"the readout after iteration {ends.index(state.visit)} of {state.n_loops} is that"
                " of a shorter call, which a wrapped module cannot make; use logit_lens, or"
                " register a family"
            )
        return super().finish(state)

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_read"]:
        """The residual stream that the head reads at the end of a run. If no head was named, it is
        the module's own logits, which `unembed` then returns unchanged.
        """
        if state.visit != len(self.schedule()):
            raise ValueError(
                f"a wrapped module is read at the end of its schedule, got a state before visit"
                f" {state.visit}; call advance(state) first"
            )
        read = state.parts[LOGITS] if self.layout.head is None else state.resid
        read = read if positions is None else at_columns(read, positions)[:, None]
        return read if self.layout.head is None else self.normalize(read)

    def normalize(
        self, resid: Float[Tensor, "batch pos d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "batch pos d_read"]:
        if self.layout.head is None:
            raise ValueError(
                "a lens needs the module's final norm and head; pass norm= and head= to wrap"
            )
        norm = self.layout.norm
        return resid if norm is None else norm(resid.clone())  # as it may write into its input

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_read"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        head = self.layout.head
        return normalized if head is None else head(normalized.clone())  # likewise

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return _weight(self.layout.embedding, nn.Embedding, "embed")

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return _weight(self.layout.head, nn.Linear, "head").T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        weight = _weight(self.layout.head, nn.Linear, "head")
        bias = getattr(self.layout.head, "bias", None)
        return weight.new_zeros(len(weight)) if bias is None else bias


def _weight(module: object, kind: type[nn.Embedding | nn.Linear], name: str) -> Tensor:
    """The matrix of a module that is of PyTorch's own kind and no other."""
    if type(module) is not kind:
        raise ValueError(
            f"this needs {name}= to be an nn.{kind.__name__}, got a {type(module).__name__}"
        )
    return module.weight


@cache
def wrapped_kind(name: str, causal: bool, batch_independent: bool) -> type[Wrapped]:
    """The class of wrapped modules with some facts.

    Args:
        name: The name of the modules' own class.
        causal, batch_independent: As for `wrap`.
    """
    facts = {"causal": causal, "batch_independent": batch_independent}
    return type(f"{_PREFIX}{name}", (Wrapped,), facts)


def _empty(name: str, causal: bool, batch_independent: bool) -> Wrapped:
    """A wrapped module without anything in it, to be filled by pickle."""
    kind = wrapped_kind(name, causal, batch_independent)
    return kind.__new__(kind)
