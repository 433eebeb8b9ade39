"""MELT, Ouro with one gated latent and one row of keys and values per layer, carried over the
iterations (arXiv 2605.07721).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.models.basis.fields import limits
from loopscope.models.blocks.components import GatedMLP
from loopscope.models.blocks.decoder_block import Placement
from loopscope.models.blocks.melt_block import LatentAttention, LatentGate, MeltBlock
from loopscope.models.core.attention import KeyValues, KeyValueStore, Rows
from loopscope.models.core.hooks import Taps
from loopscope.models.core.registry import build, family
from loopscope.models.core.state import Slot, State, Visit, running
from loopscope.models.families.ouro import Ouro, OuroConfig


@dataclass(frozen=True, kw_only=True)
class MeltConfig(OuroConfig):
    """Ouro's sizes, and a choice wherever the paper's method is not known.

    Attributes:
        h_0: What a latent is before the first iteration: "first_input" (the input that the gate
            sees there, so that iteration 0 is Ouro's and needs no gate) or "zero".
        gate_input: What the gate and the latent take in: the "normed" input of attention, or the
            "raw" residual stream, whose latent is normed before keys and values are made of it.
        gate_std: Standard deviation of a fresh gate's matrices; 0 for zeros.
        gate_bias: Where a fresh gate's bias starts: 0 blends equally, negative is near the last
            iteration's input.
        prefill_chunk: Positions of a prompt that are run together when generating, and where
            `advance_in_chunks` is told no number; 1 is the exact form, the paper trains with 500,
            None means all of them. A plain call always runs all of them.
        window: Tokens that would keep a row for each iteration, in a later version of the paper;
            not computed.
    """

    family: ClassVar[str] = "melt"
    h_0: Literal["first_input", "zero"] = "first_input"
    gate_input: Literal["normed", "raw"] = "normed"
    gate_std: float | int = field(default=0.02, metadata=limits(least=0))
    gate_bias: float | int = 0.0
    prefill_chunk: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            raise ValueError(
                "window must be None: rows per iteration for the latest tokens are not computed,"
                f" got {self.window!r}"
            )


def checked_chunk(size: int, name: str) -> int:
    """A number of positions; ValueError where it is none."""
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"{name} must be a number of positions, at least 1, got {size!r}")
    return size


@family(MeltConfig)
class Melt(Ouro):
    """MELT, an Ouro whose keys and values are made of a latent: layer l keeps one latent h per
    position, and changes it through a gate at every iteration.

    At iteration t, with x the input of attention in layer l:

        z = sigmoid(x W_z + h U_z + b_z);  h <- z h + (1 - z) x;  q = x W_Q;  k = h W_K;  v = h W_V

    Queries, norms, the loop and the exit gate are Ouro's, and keys are turned by their position
    after the projection. The latents are the parts `latent.{l}` of a `State`, zeros until their
    first visit. Each visit has the points `attn.hook_latent_in` (h as it comes), `attn.hook_gate`
    (z) and `attn.hook_latent_out`; with h_0 = "first_input" iteration 0 has only the last of them,
    because the latent is the input there whatever a gate says.

    A token keeps one row of keys and values per layer, so later tokens see earlier ones as their
    last iteration left them, at every iteration of their own. That makes the model sequential over
    tokens. A plain call takes the whole input as one chunk, as training takes a part of it: inside
    a chunk, iteration t sees the others' rows of iteration t. `exact_logits` goes token by token,
    `advance_in_chunks` by any number, and `generate` follows the rule for every token behind the
    prompt, which it runs in chunks of the config's prefill_chunk. `prefix_readout` holds for one
    chunk only: the rows that later chunks see depend on how many iterations there are.

    Source:
        arXiv 2605.07721. No reference code and no weights were released. This follows the equations
        as secondary sources give them, not checked against the paper's own method section. Where
        they leave something open, the config has an option.
    """

    heads_read_stream: ClassVar[bool] = False
    cfg: MeltConfig

    def block(self, norms: tuple[Placement, ...] = ("input",)) -> MeltBlock:
        cfg = self.cfg
        attn = LatentAttention(cfg.d_model, cfg.n_heads, cfg.kv_heads, cfg.d_head, self.rotary)
        return MeltBlock(
            attn,
            GatedMLP(cfg.d_model, cfg.d_mlp),
            self.norm,
            norms,
            normed=cfg.gate_input == "normed",
        )

    def initialize(self) -> None:
        super().initialize()
        for gate in self.latent_gates:
            gate.reset(self.cfg.gate_std, self.cfg.gate_bias)

    @property
    def loop_parts(self) -> tuple[str, ...]:
        return ("resid", *(f"latent.{layer}" for layer in range(self.cfg.n_layers)))

    @property
    def latent_gates(self) -> list[LatentGate]:
        """The gate of each layer."""
        return [cast(MeltBlock, block).latent_gate for block in self.blocks]

    def plan(self, n_loops: int) -> list[Slot]:
        slots = super().plan(n_loops)
        return [
            (
                replace(
                    slot, sites=tuple(site for site in slot.sites if site not in LatentGate.sites)
                )
                if self._starts(slot)
                else slot
            )
            for slot in slots
        ]

    def _starts(self, slot: Slot) -> bool:
        """Whether the visit makes its latent of its input alone."""
        return slot.loop == 0 and self.cfg.h_0 == "first_input"

    def embed(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid, parts = super().embed(tokens, positions, taps)
        nothing = torch.zeros_like(resid)
        return resid, {
            **parts,
            **{f"latent.{layer}": nothing for layer in range(self.cfg.n_layers)},
        }

    def visit_block(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], rows: Rows, taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        part = f"latent.{visit.layer}"
        resid, latent = visit.block(resid, None if self._starts(visit) else parts[part], rows, taps)
        return resid, {**parts, part: latent}

    def extend(self, state: State, before: KeyValueStore) -> tuple[State, KeyValueStore]:
        new: KeyValueStore = {}
        return advance_in_chunks(self, state, supplied=before or None, store=new), new

    def last_rows(self, store: Mapping[str, KeyValues], n_loops: int) -> dict[int, KeyValues]:
        """The rows that each layer keeps, from a run's keys and values by visit: the last
        iteration's.

        Raises:
            ValueError: The run did not reach the last iteration.
        """
        last = [visit for visit in self.schedule(n_loops) if visit.loop == n_loops - 1]
        missing = [visit.name for visit in last if visit.name not in store]
        if missing:
            raise ValueError(
                "later tokens see the rows of the last iteration, so a run must go to its end, but"
                f" this one has no {missing[0]!r}"
            )
        return {visit.layer: store[visit.name] for visit in last}

    def everywhere(self, rows: Mapping[int, KeyValues], n_loops: int) -> dict[str, KeyValues]:
        """The rows of each layer as `advance(supplied=...)` takes them: the same at every
        iteration.
        """
        return {visit.name: rows[visit.layer] for visit in self.schedule(n_loops)}


def advance_in_chunks(
    model: Melt,
    state: State,
    chunk: int | None = None,
    *,
    supplied: KeyValueStore | None = None,
    store: KeyValueStore | None = None,
) -> State:
    """Run a state to the end some positions at a time; each chunk sees those before it as their
    last iteration left them.

    Hook points see one chunk at a time, "batch chunk ..."; every point of the loop is called once
    for each chunk.

    Args:
        state: Before the first visit; from `begin`, or rows of such a state.
        chunk: How many positions; 1 is the exact form. None means the config's prefill_chunk, and
            all of them where that is None.
        supplied: What an earlier call put in `store`, for a state that holds later rows.
        store: Is given what later tokens see of these rows, by visit.

    Returns:
        The state of all its rows at the end, which `model.readout` reads.

    Raises:
        ValueError: No number of positions, or a state that stands behind the first visit.
    """
    chunk = model.cfg.prefill_chunk if chunk is None else checked_chunk(chunk, "chunk")
    if state.visit != 0:
        raise ValueError(
            "chunks run from the first visit to the last, one after another, but this state stands"
            f" before visit {state.visit}"
        )
    width, n_loops = state.resid.shape[1], state.n_loops
    seen = None if supplied is None else model.last_rows(supplied, n_loops)
    ends: list[State] = []
    made: list[dict[int, KeyValues]] = []
    for start in range(0, width, chunk or width):
        new: KeyValueStore = {}
        piece = state.rows(pos=slice(start, start + (chunk or width)))
        earlier = None if seen is None else model.everywhere(seen, n_loops)
        with running(state.positions):
            ends.append(model.advance(piece, supplied=earlier, store=new))
        made.append(model.last_rows(new, n_loops))
        seen = made[-1] if seen is None else _side_by_side([seen, made[-1]])
    if store is not None:
        store.update(model.everywhere(_side_by_side(made), n_loops))
    return _one_state(ends)


def exact_logits(
    model: Melt, tokens: Tensor, n_loops: int | None = None, mask: Tensor | None = None
) -> Float[Tensor, "batch pos d_vocab"]:
    """Logits at all positions, token by token as in generation; the arguments are those of a plain
    call.
    """
    return model.readout(advance_in_chunks(model, model.begin(tokens, mask, n_loops=n_loops), 1))


def melt_from_ouro(model: Ouro, **options: Any) -> Melt:
    """A MELT with a copy of an Ouro's weights and fresh gates; the paper starts from
    Ouro-1.4B-Thinking.

    Args:
        model: Stays as it is.
        options: Fields of `MeltConfig` that are not to be Ouro's or the default.

    Raises:
        TypeError: A model that is no Ouro with shared weights.
    """
    if type(model) is not Ouro or model.visit_blocks is not None:
        what = (
            "an untied copy"
            if getattr(model, "visit_blocks", None) is not None
            else f"a {type(model).__name__}"
        )
        raise TypeError(f"a MELT is made from an Ouro with shared weights, got {what}")
    facts = {
        known.name: getattr(model.cfg, known.name) for known in fields(OuroConfig) if known.init
    }
    with torch.device("meta"):  # what would be drawn for the rest is not needed
        melt = build(MeltConfig(**{**facts, **options}))
    assert isinstance(melt, Melt), "the config's family"
    for gate in melt.latent_gates:
        gate.to_empty(device=model.device).to(model.W_E.dtype).reset(
            melt.cfg.gate_std, melt.cfg.gate_bias
        )
    copies = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    melt.load_state_dict({**melt.state_dict(), **copies}, assign=True)
    melt.vocab, melt.read_at = model.vocab, model.read_at
    return melt


def _side_by_side(pieces: list[dict[int, KeyValues]]) -> dict[int, KeyValues]:
    """Rows of each layer of several pieces of the sequences, in their order."""
    return {
        layer: reduce(KeyValues.followed_by, (piece[layer] for piece in pieces))
        for layer in pieces[0]
    }


def _one_state(pieces: list[State]) -> State:
    """States of several pieces of the sequences as one."""

    def joined(parts: list[Tensor]) -> Tensor:
        return torch.cat(parts, dim=1)

    return replace(
        pieces[0],
        resid=joined([piece.resid for piece in pieces]),
        positions=joined([piece.positions for piece in pieces]),
        mask=joined([piece.mask for piece in pieces]),
        parts={name: joined([piece.parts[name] for piece in pieces]) for name in pieces[0].parts},
    )
