"""The frame that the recursive puzzle solvers share: a prefix that names the puzzle, two states,
nested cycles of two kinds of runs, and a head that says when to halt.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.blocks.components import GatedMLP, RMSNorm
from loopscope.models.blocks.decoder import stack
from loopscope.models.blocks.decoder_block import Attention, Block
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import Visible, every_key
from loopscope.models.core.base import LoopedModel, stream_at
from loopscope.models.core.hooks import NO_TAPS, Taps, tap
from loopscope.models.core.state import Slot, State, Visit, integers
from loopscope.models.families.puzzle_solvers.config import PuzzleConfig
from loopscope.models.families.puzzle_solvers.position_mlp import PositionBlock

OPENING = ("hook_state_in", "hook_input", "hook_injected")
GATES = ("hook_halt_logit", "hook_continue_logit")
OTHER_LEVEL = {"low": "high", "high": "low"}
LEARNED_SCALE = 0.707106781  # of tokens and learned positions together, as the releases write it


class PuzzleSolver(LoopedModel):
    """A high state and a low state, each one vector at every position at first, and nested cycles.

    One iteration is one supervision step: the unit after which training read the answer, and which
    hands both states to the next one. A step has n_cycles high cycles. In every cycle the low state
    is run n_low_loops times on low + high + input, and then the high state once on high + low. The
    head reads the high state; so does the halting head, at position 0.

    Runs are called `loops.{s}.cycles.{h}.low.{l}` and `loops.{s}.cycles.{h}.high`. At each,
    `hook_state_in` is the state of the level that runs, `hook_input` what is added to it (the other
    level's, and the input embedding in a low run), `hook_injected` the sum, and `hook_state_out`
    the level's new state. `hook_embed` is the input embedding of the whole call: a patch of it
    reaches every low run, and one of `hook_input` that run alone. `loops.{s}.hook_halt_logit` and
    `loops.{s}.hook_continue_logit` are the halting head's two logits at every position, of which
    training reads position 0; no call stops by them.

    The first n_prefix columns of the tokens are the prefix. Their ids are not read: the puzzle's
    vector stands there. Every position sees every other, also those with padding's id, unless a
    mask says otherwise. Gradients flow through every run, where the reference's training lets them
    pass through the last runs of a step only, from `trained_from` on.

    Attributes:
        learns_to_continue: Whether training gives the continue logit a target, and halts where the
            other logit is larger instead of where it is above 0.
    """

    cfg: PuzzleConfig
    causal: ClassVar[bool] = False
    learns_to_continue: ClassVar[bool] = False
    visible: ClassVar[Visible] = staticmethod(every_key)

    def __init__(self, cfg: PuzzleConfig) -> None:
        super().__init__(cfg)
        self.embedding = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.head = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_model))
        self.halt = nn.Linear(cfg.d_model, 2)
        self.puzzles = (
            nn.Parameter(torch.zeros(cfg.n_puzzles, cfg.d_puzzle)) if cfg.n_puzzles else None
        )
        self.W_pos = (
            nn.Parameter(torch.empty(cfg.n_ctx or 0, cfg.d_model))
            if cfg.positions == "learned"
            else None
        )
        self.low_init, self.high_init = (
            nn.Parameter(torch.empty(cfg.d_model), requires_grad=False) for _ in OTHER_LEVEL
        )
        turns = cfg.positions == "rope" and not cfg.d_pos_mlp
        self.rotary = Rotary(cfg.d_head, cfg.rope_theta) if turns else None

    @property
    @abstractmethod
    def stacks(self) -> Mapping[str, nn.ModuleList]:
        """The blocks of a "low" and of a "high" run."""

    @property
    def trained_from(self) -> str:
        """The first run of a supervision step through which gradients pass in training."""
        return f"cycles.{self.cfg.n_cycles - 1}"

    def initialize(self) -> None:
        """Draw the weights, name the modules and make the hook points.

        Weights are normal with the variance one over the inputs, cut at two standard deviations.
        The reference widens its draws so that they have this variance after the cut; these do not,
        so their standard deviation is 0.88 of the reference's.
        """
        for name, parameter in self.named_parameters():
            if parameter.is_meta or name == "puzzles":
                continue
            if name.startswith("halt."):
                nn.init.constant_(parameter, -5.0 if parameter.ndim == 1 else 0.0)
                continue
            std = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1.0
            nn.init.trunc_normal_(parameter, std=std, a=-2 * std, b=2 * std)
        self.setup()
        self.grow(self.cfg.n_loops or 1)

    def block(self) -> nn.Module:
        """One post-norm block of the config's sizes."""
        cfg = self.cfg
        if cfg.d_pos_mlp:
            return PositionBlock(cfg.d_model, cfg.d_mlp, cfg.n_ctx or 0, cfg.d_pos_mlp, cfg.eps)
        attn = Attention(cfg.d_model, cfg.n_heads, cfg.n_heads, cfg.d_head, self.rotary, fused=True)
        return Block(attn, GatedMLP(cfg.d_model, cfg.d_mlp, fused=True), self.norm, ("sum",))

    def norm(self, site: str) -> RMSNorm:
        return RMSNorm(self.cfg.d_model, self.cfg.eps, site, weighted=False)

    @property
    def additive_residual(self) -> bool:
        return False

    @property
    def rowwise(self) -> bool:
        """Whether positions meet in attention alone, and in no MLP along them."""
        return not self.cfg.d_pos_mlp

    @property
    def loop_parts(self) -> tuple[str, ...]:
        return ("resid", "low")

    @property
    def positional(self) -> bool:
        return self.cfg.positions != "none" or bool(self.cfg.d_pos_mlp)

    @property
    def fixed_length(self) -> bool:
        return bool(self.cfg.d_pos_mlp)

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        learned = ("hook_pos_embed",) if self.W_pos is not None else ()
        return (*learned, "hook_embed"), ()

    def plan(self, n_loops: int) -> list[Slot]:
        slots, runs = [], list(runs_of(self.cfg))
        for s in range(n_loops):
            for name, level in runs:
                ends = name == runs[-1][0]
                scope = f"loops.{s}" if ends else f"loops.{s}.{name}"
                own = f"{name}." if ends else ""
                slots += stack(
                    self.stacks[level],
                    f"loops.{s}.{name}.blocks",
                    loop=s,
                    scope=scope,
                    opening=[own + site for site in OPENING],
                    closing=[f"{own}hook_state_out", *(GATES if ends else ())],
                )
        return slots

    def checked_inputs(
        self, tokens: Tensor, mask: Tensor | None, n_loops: int | None
    ) -> tuple[Tensor, Tensor, int]:
        """As for every model; without a mask every cell is real, because the id of padding is a
        cell like the others.
        """
        ids = integers(tokens)
        if mask is None and ids is not None:
            mask = torch.ones_like(ids)
        return super().checked_inputs(tokens, mask, n_loops)

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        taps: Taps,
        *,
        puzzle: int | Tensor = 0,
        high: Tensor | None = None,
        low: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The first high state, the first low state and the input embedding.

        Args:
            puzzle: The puzzle's number, or Int[Tensor, " batch"], one for each row.
            high, low: Float[Tensor, "batch pos d_model"], the states to begin with, such as those
                that a former call ended with; None for the checkpoint's own.

        Raises:
            ValueError: A puzzle that the table does not have, or states of another shape.
        """
        words = F.embedding(tokens, self.embedding)
        if self.cfg.n_prefix:
            prefix = _prefix(self, puzzle, len(tokens)).to(words)
            words = torch.cat([prefix[:, : words.shape[1]], words[:, self.cfg.n_prefix :]], dim=1)
        if self.W_pos is not None:
            places = tap(taps, "hook_pos_embed", F.embedding(positions, self.W_pos))
            words = LEARNED_SCALE * (words + places)
        embedded = tap(taps, "hook_embed", math.sqrt(self.cfg.d_model) * words)
        states = {"high": (high, self.high_init), "low": (low, self.low_init)}
        first = {
            name: _first_state(name, given, own, embedded) for name, (given, own) in states.items()
        }
        return first["high"], {"embed": embedded, "low": first["low"]}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        level, own = level_of(visit), own_sites(visit)
        other = OTHER_LEVEL[level]
        states = {"low": resid, "high": resid, **parts}  # the stream is the one that is no part
        added = states[other] + parts["embed"] if level == "low" else states[other]
        injected = tap(taps, f"{own}hook_state_in", states[level]) + tap(
            taps, f"{own}hook_input", added
        )
        kept = {name: part for name, part in parts.items() if name != level}
        return tap(taps, f"{own}hook_injected", injected), {**kept, other: states[other]}

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        resid = tap(taps, f"{own_sites(visit)}hook_state_out", resid)
        if not taps.keys().isdisjoint(GATES):
            for site, logit in zip(GATES, self.halt(resid).unbind(-1), strict=True):
                tap(taps, site, logit)
        return resid, parts

    def state_parts(self, state: State) -> Mapping[str, Tensor]:
        """The stream and the other parts; between runs also both levels' states, "low" and
        "high".
        """
        named = super().state_parts(state)
        last = self.schedule(state.n_loops)[state.visit - 1] if state.visit else None
        if last is not None and not last.closing:
            return named
        return {**named, "high" if last is None else level_of(last): state.resid}

    def normalize(
        self, resid: Float[Tensor, "batch pos d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "batch pos d_model"]:
        """The stream itself, because every block ends with a norm and the head has none of its
        own.
        """
        return resid

    def read_state(
        self, state: State, positions: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        return stream_at(state, positions)

    def unembed(
        self, normalized: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return F.linear(normalized, self.head)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embedding

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.head.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.head.new_zeros(self.cfg.d_vocab)


def runs_of(cfg: PuzzleConfig) -> Iterator[tuple[str, str]]:
    """The runs of a supervision step in order: the prefix of their names, and their level."""
    for h in range(cfg.n_cycles):
        for run in range(cfg.n_low_loops):
            yield f"cycles.{h}.low.{run}", "low"
        yield f"cycles.{h}.high", "high"


def level_of(visit: Slot) -> str:
    """Which state a visit's run makes, "low" or "high"."""
    return visit.name.split(".")[4]


def own_sites(visit: Slot) -> str:
    """The beginning of the names of a run's own sites, below the visit's scope."""
    return visit.name.removeprefix(f"{visit.scope}.").partition("blocks.")[0]


def _prefix(
    model: PuzzleSolver, puzzle: int | Tensor, n_rows: int
) -> Float[Tensor, "batch prefix d_model"]:
    """The puzzle's vector, filled up with zeros and cut into positions."""
    shape = (n_rows, model.cfg.n_prefix, model.cfg.d_model)
    if model.puzzles is None:
        return model.embedding.new_zeros(shape)
    ids = torch.as_tensor(puzzle, device=model.puzzles.device).expand(n_rows)
    if int(ids.min()) < 0 or int(ids.max()) >= len(model.puzzles):
        raise ValueError(
            f"puzzle must be in 0..{len(model.puzzles) - 1}, got {int(ids.min())}..{int(ids.max())}"
        )
    vectors = F.embedding(ids, model.puzzles)
    filling = shape[1] * shape[2] - vectors.shape[1]
    return F.pad(vectors, (0, filling)).view(shape)


def _first_state(name: str, given: Tensor | None, own: Tensor, like: Tensor) -> Tensor:
    """A level's state before the first run."""
    if given is None:
        return own.to(like.dtype).expand_as(like)
    if given.shape != like.shape:
        raise ValueError(
            f"{name} must have the shape [batch, pos, d_model] = {list(like.shape)}, got"
            f" {list(given.shape)}"
        )
    return given.to(like)
