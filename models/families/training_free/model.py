"""Training-free looping of ordinary frozen models: a window of their layers is run several times
(arXiv 2605.23872).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from loopscope.models.blocks.components import GatedMLP
from loopscope.models.blocks.decoder import LoopedDecoder
from loopscope.models.blocks.decoder_block import Attention, Block
from loopscope.models.blocks.normed_attention import HeadNormedAttention
from loopscope.models.core.attention import KeyValues, KeyValueStore, Rows
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.hooks import NO_TAPS, Taps, live, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, State, Visit
from loopscope.models.families.training_free.reach import ReachConfig
from loopscope.models.families.training_free.rules import (
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
    `coda.{l}` after it. A pass of the whole window is an iteration. At `loops.{k}.hook_state_in` is
    its state x_k, at `.hook_window_out` the output g(x_k) of the layers, and at `.hook_state_out`
    the state to which the rule moves. In layer mode each layer has these sites,
    `loops.{k}.blocks.{l}.hook_state_in`, and the K passes of a layer follow each other at once;
    "after iteration k" is then after pass k of the window's last layer.

    During a pass the state has the part `x_k`. If the rule needs it, the state also has the part
    `g_0`, from the end of the first pass to the end of the last one. The keys and values that a
    generation cache gets come from a pass of their own, whose points are `stash.blocks.{l}.…`; see
    `loopscope.models.families.training_free.cache`.

    `prefix_readout` is False, because a step is a share 1/K of the call's own K (the naive rule in
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
            self._pass_slot(layer, loop, unit)
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

    def aside(self) -> list[Slot]:
        """Visits to the layers of the window that belong to no schedule, for the pass that makes
        canonical keys and values.
        """
        first, last = self.cfg.window
        return [self._slot(STASH, layer) for layer in range(first, last + 1)]

    def stash_visits(self, layers: range) -> list[Visit]:
        """The visits of the stash pass to some layers of the window."""
        slots = [slot for slot in self.aside() if slot.layer in layers]
        return [self._schedules.visit(index, slot) for index, slot in enumerate(slots)]

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

    def _pass_slot(self, layer: int, loop: int, unit: range) -> Slot:
        block: Any = self.blocks[layer]
        name = f"loops.{loop}.blocks.{layer}"
        return Slot(
            name=name,
            stage="loops",
            loop=loop,
            layer=layer,
            block=block,
            sites=block.sites,
            scope=f"loops.{loop}" if self.cfg.mode == "block" else name,
            opening=("hook_state_in",) if layer == unit[0] else (),
            closing=("hook_window_out", "hook_state_out") if layer == unit[-1] else (),
        )

    # Running

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, "hook_state_in", resid)
        return resid, entered(self.cfg, resid, parts)

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        state, kept = moved(self.cfg, visit, tap(taps, "hook_window_out", resid), parts)
        return tap(taps, "hook_state_out", state), kept

    def finish(self, state: State) -> State:
        """A state at the end of an iteration, run through the layers after the window."""
        end = self.iteration_ends(state.n_loops)[-1]
        return self.advance(replace(state, visit=end, parts={}))

    def extend(self, state: State, before: KeyValueStore) -> tuple[State, KeyValueStore]:
        if state.n_loops == 1:
            return super().extend(state, before)
        new: KeyValueStore = {}
        return (
            advance_stashing(self, state, new, source=self.cfg.stash, supplied=before or None),
            new,
        )

    def loops_after_prompt(self, n_loops: int) -> int:
        return 1 if self.cfg.decode == "bypass" else n_loops

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Logits at all positions; the arguments are those of `LoopedModel.forward`."""
        hooked = self._points.hooked_aside() if self.any_hook() else []
        if hooked:
            raise ValueError(
                f"a hook is attached at {hooked[0]!r}, but a plain call makes no stash pass;"
                " prefill and decode_looped of loopscope.models.families.training_free.cache do"
            )
        return super().forward(*inputs, **options)


def refuse_edited(model: WindowLoops) -> None:
    """Refuse an edited schedule, whose window has other visits than a cache counts on."""
    if model.edited is not None:
        raise ValueError(
            "a cache of one entry per layer is made by the model's own schedule, so there is none"
            " inside schedule_edit; call the model, or leave schedule_edit"
        )


def advance_stashing(
    model: WindowLoops,
    state: State,
    store: KeyValueStore,
    *,
    source: str = "last",
    supplied: KeyValueStore | None = None,
) -> State:
    """Run a state to the end as `model.advance` does, and keep one entry per layer.

    Args:
        state: From `begin`, before the window.
        store: Is given the keys and values of these rows by the visits of a call with n_loops = 1.
        source: As in `prefill`.
        supplied: Entries of earlier rows, in the same form.

    Raises:
        ValueError: Another source, or a state that stands inside or behind the window.
    """
    check_source(source)
    starts = [
        visit.index for visit in model.schedule(state.n_loops) if visit.opening and visit.loop == 0
    ]
    refuse_edited(model)
    if state.visit > starts[0]:
        raise ValueError(
            f"the state must stand at or before the window (visit {starts[0]}), got one before"
            f" visit {state.visit}"
        )
    passes = None if supplied is None else for_passes(model, supplied, state.n_loops)
    state = model.advance(state, starts[0], supplied=passes, store=store)
    for unit, start in zip(model.units, starts, strict=True):
        before, state = (
            state,
            model.advance(state, start + len(unit) * state.n_loops, supplied=passes),
        )
        store.update(stash(model, before if source == "first" else state, unit, supplied))
    return model.advance(state, supplied=passes, store=store)


def stash(
    model: WindowLoops, state: State, layers: range, supplied: KeyValueStore | None = None
) -> dict[str, KeyValues]:
    """Run some layers of the window once over a state, for their keys and values alone; the hook
    points are `stash.blocks.{l}.…`.

    Args:
        layers: Which layers, of those that follow one another in the window.
        supplied: Entries of earlier rows.

    Returns:
        Keys and values of the state's rows by visit, "loops.0.blocks.{l}".
    """
    store: dict[str, KeyValues] = {}
    hooked, resid = model.any_hook(), state.resid
    rows = Rows.make(
        state, type(model).visible, None if supplied is None else supplied[_entry(layers[0])]
    )
    for visit in model.stash_visits(layers):
        here = rows.at(_entry(visit.layer), supplied, store)
        resid, _ = model.visit_block(
            visit, resid, state.parts, here, live(visit.points) if hooked else NO_TAPS
        )
    return store


def for_passes(model: WindowLoops, cache: KeyValueStore, n_loops: int) -> KeyValueStore:
    """The cache as `advance(supplied=...)` takes it for a call of `n_loops` passes: every pass of a
    layer reads the layer's one entry.
    """
    visits = model.schedule(n_loops)
    return {
        visit.name: cache[visit.name if visit.loop is None else _entry(visit.layer)]
        for visit in visits
    }


def _entry(layer: int) -> str:
    return f"loops.0.blocks.{layer}"


@dataclass(frozen=True, kw_only=True)
class TrainingFreeConfig(WindowConfig, ReachConfig):
    """Sizes of a Llama, Mistral, Qwen2 or Qwen3 model.

    Attributes:
        qk_norm: RMSNorm of each head's queries and keys before the rotation (Qwen3).
        attention_bias: Biases of the four projections of attention.
        qkv_bias: Biases of queries, keys and values at least (Qwen2).
        mlp_bias: Biases of the three projections of the MLP.
    """

    family: ClassVar[str] = "training_free"
    qk_norm: bool = False
    attention_bias: bool = False
    qkv_bias: bool = False
    mlp_bias: bool = False


@family(TrainingFreeConfig)
class TrainingFree(WindowLoops, LoopedDecoder):
    """A frozen Llama, Mistral, Qwen2 or Qwen3 in which a window of layers runs several times,
    without training.

    `WindowLoops` has the rules of the loop.

    Source:
        arXiv 2605.23872; the base models are those of arXiv 2407.21783, arXiv 2310.06825, arXiv
        2412.15115 and arXiv 2505.09388.
    """

    cfg: TrainingFreeConfig

    def __init__(self, cfg: TrainingFreeConfig) -> None:
        super().__init__(cfg)
        self.blocks = nn.ModuleList(self.make_block(layer) for layer in range(cfg.n_layers))
        self.initialize()

    def make_block(self, layer: int) -> Block:
        """One layer of the ordinary model."""
        cfg = self.cfg
        sizes: tuple[Any, ...] = (cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        bias: Any = cfg.attention_bias or ("qkv" if cfg.qkv_bias else False)
        if cfg.qk_norm:
            attn: Attention = HeadNormedAttention(*sizes, eps=cfg.eps, bias=bias)
        else:
            attn = Attention(*sizes, bias=bias)
        attn.window = cfg.reach(layer)
        return Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp, bias=cfg.mlp_bias), self.norm)
