"""ALBERT, a bidirectional encoder whose layers share their weights (arXiv 1909.11942)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.basis.tokens import checked_token_types
from loopscope.models.blocks.components import MLP, LayerNorm
from loopscope.models.blocks.decoder import stack
from loopscope.models.blocks.decoder_block import Attention, Block
from loopscope.models.core.attention import Visible, every_key
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.config import LoopedConfig
from loopscope.models.core.hooks import NO_TAPS, Taps, tap
from loopscope.models.core.registry import family
from loopscope.models.core.state import Slot, Visit

Factors = Float[Tensor, "batch pos d_factor"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}


@dataclass(frozen=True, kw_only=True)
class AlbertConfig(LoopedConfig):
    """Sizes; n_layers counts the blocks that one iteration runs, and n_loops what the releases call
    layers.

    Attributes:
        act_fn: "gelu_new" (by tanh) or "gelu" (exact), in the MLPs and in the head.
        d_factor: Width of the stored token, position and type embeddings.
        n_token_types: Rows of the type embedding.
        n_groups: How many sets of n_layers blocks there are; consecutive iterations share one.
        n_grouped_loops: The iterations among which several groups are shared out, however many of
            them a call runs.
    """

    family: ClassVar[str] = "albert"
    TINY: ClassVar[Mapping[str, Any]] = {"d_factor": 8}
    normalization_type: ClassVar[str] = "LN"
    tied: ClassVar[bool] = True
    act_fn: str = "gelu_new"  # type: ignore[misc]  # releases of this one family differ in it
    eps: float | int = field(default=1e-12, metadata=limits(least=0))
    d_factor: int
    n_token_types: int = 2
    n_groups: int = field(default=1, metadata=limits(most=MOST_BLOCKS))
    n_grouped_loops: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_ctx is None:
            raise ValueError("n_ctx must be given: this family has learned positions")
        if self.act_fn not in ACTIVATIONS:
            raise ValueError(f"act_fn must be 'gelu_new' or 'gelu', got {self.act_fn!r}")
        if (self.n_grouped_loops is None) != (self.n_groups == 1):
            raise ValueError(
                "n_grouped_loops must be given where there are several groups and only there, "
                f"got {self.n_grouped_loops} with n_groups={self.n_groups}"
            )
        self.check_loops(self.n_loops or 1)

    def check_loops(self, n_loops: int) -> None:
        """Raise where some of so many iterations would have no group of blocks."""
        if self.n_grouped_loops is not None and n_loops > self.n_grouped_loops:
            raise ValueError(
                f"this model shares out {self.n_groups} groups of blocks among"
                f" {self.n_grouped_loops} iterations, so n_loops must be at most that, got"
                f" {n_loops}"
            )

    def group_of(self, loop: int) -> int:
        """The group of blocks that iteration `loop`, from 0, runs."""
        return (
            0
            if self.n_grouped_loops is None
            else int(loop / (self.n_grouped_loops / self.n_groups))
        )


@family(AlbertConfig)
class Albert(LoopedModel):
    """ALBERT, a bidirectional masked language model: a group of n_layers shared blocks applied
    n_loops times. A LayerNorm of the stream follows every addition.

    Every row sees every real token. Token, position and type vectors of width d_factor are added,
    normed (`ln_embed`) and mapped to d_model; `hook_embed` is the mapped stream, and the
    `hook_*_factors` are the three vectors. With several groups, iteration t runs group floor(t /
    (n_grouped_loops / n_groups)); the groups stay where they are in a shorter call, so that
    stopping earlier is the same as fewer iterations. With one group there may be more of them than
    the checkpoint records.

    `normalize` is the head up to its own LayerNorm, a map to d_factor with an activation in it:
    `head.hook_pre`, `head.hook_post`, and the norm's points at `head.ln`. So no logit
    is a linear function of the stream, and methods that need one refuse. There is no dropout, also
    not in train mode.

    Source:
        arXiv 1909.11942.
    """

    cfg: AlbertConfig
    causal: ClassVar[bool] = False
    visible: ClassVar[Visible] = staticmethod(every_key)

    def __init__(self, cfg: AlbertConfig) -> None:
        super().__init__(cfg)
        self.act = ACTIVATIONS[cfg.act_fn]
        self.embedding = nn.Parameter(torch.empty(cfg.d_vocab, cfg.d_factor))
        self.W_pos = nn.Parameter(torch.empty(cfg.n_ctx or 0, cfg.d_factor))
        self.W_type = nn.Parameter(torch.empty(cfg.n_token_types, cfg.d_factor))
        self.embed_norm = LayerNorm(cfg.d_factor, cfg.eps, "ln_embed")
        self.embed_in = nn.Linear(cfg.d_factor, cfg.d_model)
        self.groups = nn.ModuleList(
            nn.ModuleList(self.block() for _ in range(cfg.n_layers)) for _ in range(cfg.n_groups)
        )
        self.head_in = nn.Linear(cfg.d_model, cfg.d_factor)
        self.head_norm = LayerNorm(cfg.d_factor, cfg.eps, "head.ln")
        self.head_bias = nn.Parameter(torch.zeros(cfg.d_vocab))
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and not parameter.is_meta:
                nn.init.normal_(parameter, std=0.02)
            elif name.endswith(".bias"):
                nn.init.zeros_(parameter)
        self.setup()
        self.grow(cfg.n_loops or 1)

    def block(self) -> Block:
        """Attention and an MLP, each followed by a LayerNorm of the stream."""
        cfg = self.cfg
        attn = Attention(cfg.d_model, cfg.n_heads, cfg.n_heads, cfg.d_head, None, bias=True)
        return Block(
            attn,
            MLP(cfg.d_model, cfg.d_mlp, self.act),
            lambda site: LayerNorm(cfg.d_model, cfg.eps, site),
            ("sum",),
        )

    @property
    def additive_residual(self) -> bool:
        return False

    def edge_sites(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        factors = ("hook_embed_factors", "hook_pos_embed_factors", "hook_type_embed_factors")
        return (*factors, *self.embed_norm.sites, "hook_embed"), (
            "head.hook_pre",
            "head.hook_post",
            *self.head_norm.sites,
        )

    def plan(self, n_loops: int) -> list[Slot]:
        self.cfg.check_loops(n_loops)
        slots = []
        for t in range(n_loops):
            blocks = self.groups.get_submodule(str(self.cfg.group_of(t)))
            slots += stack(
                blocks.children(),
                f"loops.{t}.blocks",
                loop=t,
                opening=("hook_state_in",),
                closing=("hook_state_out",),
            )
        return slots

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        positions: Int[Tensor, "batch pos"],
        taps: Taps,
        *,
        token_types: Tensor | None = None,
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The stream before the first iteration.

        Args:
            token_types: Int[Tensor, "batch pos"], the segment of each token; None means type 0
                everywhere.

        Raises:
            TypeError: Token types that are no integers.
            ValueError: Token types of another shape than the tokens, or that the model does not
                have.
        """
        types = (
            torch.zeros_like(tokens)
            if token_types is None
            else _known_types(checked_token_types(token_types, tokens), self.cfg.n_token_types)
        )
        words = tap(taps, "hook_embed_factors", F.embedding(tokens, self.embedding))
        places = tap(taps, "hook_pos_embed_factors", F.embedding(positions, self.W_pos))
        kinds = tap(taps, "hook_type_embed_factors", F.embedding(types, self.W_type))
        normed = self.embed_norm(words + kinds + places, taps)
        return tap(taps, "hook_embed", self.embed_in(normed)), {}

    def enter(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_in", resid), parts

    def leave(
        self, visit: Visit, resid: Tensor, parts: Mapping[str, Tensor], taps: Taps
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        return tap(taps, "hook_state_out", resid), parts

    def normalize(self, resid: Float[Tensor, "batch pos d_model"], taps: Taps = NO_TAPS) -> Factors:
        """The input of the head's last matrix, made of a residual stream."""
        pre = tap(taps, "head.hook_pre", self.head_in(resid))
        normalized: Tensor = self.head_norm(tap(taps, "head.hook_post", self.act(pre)), taps)
        return normalized

    def unembed(self, normalized: Factors) -> Float[Tensor, "batch pos d_vocab"]:
        return F.linear(normalized, self.embedding, self.head_bias)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The token embedding times the map to d_model, without the LayerNorm and the bias on the
        way.
        """
        return self.embedding @ self.embed_in.weight.T

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The product of the head's two matrices, without the activation and the LayerNorm between
        them.
        """
        return (self.embedding @ self.head_in.weight).T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.head_bias


def _known_types(types: Int[Tensor, "batch pos"], n_token_types: int) -> Int[Tensor, "batch pos"]:
    """Token types of which each has a row in the type embedding."""
    low, high = int(types.min()), int(types.max())
    if low < 0 or high >= n_token_types:
        wrong = low if low < 0 else high
        raise ValueError(
            f"token types must be in 0..{n_token_types - 1} (n_token_types={n_token_types}), got"
            f" {wrong}"
        )
    return types
