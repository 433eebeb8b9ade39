"""Decoder blocks of the Llama kind: grouped-query attention with rotary positions, an MLP, and
norms where a family puts them.

Projections are stored as the releases store them, output first; W_Q, W_K, W_V, W_O and the biases
are views in TransformerLens's shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from loopscope.models.blocks.components import MLP, GatedMLP, Norm, Reader
from loopscope.models.blocks.rotary import Rotary
from loopscope.models.core.attention import PLAIN, Rows, Scoring
from loopscope.models.core.hooks import Taps, tap

Stream = Float[Tensor, "batch pos d_model"]
Heads = Float[Tensor, "batch pos head d_head"]
KeyHeads = Float[Tensor, "batch pos kv_head d_head"]
Projection = Literal["q", "k", "v"]
Placement = Literal["input", "output", "sum"]


class Attention(nn.Module):
    """Attention in which groups of query heads share a key and value head.

    A family with more in it (norms of queries and keys, a gate) overrides `projected`, `normed`,
    `positioned` or `gated`. `dropout` is the share of the attention weights that a family drops in
    train mode, `window` the positions that a row sees, its own included (None for all before it),
    `scoring` how scores are made.

    Args:
        d_model, n_heads, n_kv_heads, d_head: Widths; n_heads * d_head need not be d_model.
        rotary: None for attention without positions.
        bias: Biases of the three input projections, and of the output one; "qkv" for the former
            alone.
        fused: One stored matrix `qkv` with the rows of q, k and v below each other, instead of
            three.
    """

    sites: ClassVar[tuple[str, ...]] = (
        "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k",
        "attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_z",
    )  # fmt: skip
    dropout: float = 0.0
    window: int | None = None
    scoring: Scoring = PLAIN

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        d_head: int,
        rotary: Rotary | None,
        *,
        bias: bool | Literal["qkv"] = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.d_head, self.rotary = (
            n_heads,
            n_kv_heads,
            d_head,
            rotary,
        )
        self.widths = (n_heads * d_head, n_kv_heads * d_head, n_kv_heads * d_head)
        if fused:
            self.qkv = nn.Linear(d_model, sum(self.widths), bias=bool(bias))
        else:
            self.q, self.k, self.v = (
                nn.Linear(d_model, width, bias=bool(bias)) for width in self.widths
            )
        self.o = nn.Linear(n_heads * d_head, d_model, bias=bias is True)
        self.fused = fused

    def forward(self, x: Stream, rows: Rows, taps: Taps) -> Stream:
        seen = rows if self.window is None else rows.within(self.window)
        return self.attended(*self.projected(x), x, seen, taps)

    def attended(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Stream, rows: Rows, taps: Taps
    ) -> Stream:
        """Attend with projected queries, keys and values; x is the stream of which the queries are
        made of.
        """
        q, k, v = (
            tap(taps, "attn.hook_q", q),
            tap(taps, "attn.hook_k", k),
            tap(taps, "attn.hook_v", v),
        )
        q, k = self.normed(q, k, taps)
        q, k = self.positioned(q, k, rows.places.positions, taps)
        q, k = tap(taps, "attn.hook_rot_q", q), tap(taps, "attn.hook_rot_k", k)
        dropout = self.dropout if self.training else 0.0
        z = tap(taps, "attn.hook_z", rows.attend(q, k, v, taps, dropout, self.scoring))
        out: Tensor = self.o(self.gated(z.flatten(-2), x, taps))
        return out

    def projected(self, x: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of every head."""
        flat = (
            self.qkv(x).split(self.widths, dim=-1)
            if self.fused
            else (self.q(x), self.k(x), self.v(x))
        )
        q, k, v = (part.unflatten(-1, (-1, self.d_head)).contiguous() for part in flat)
        return q, k, v

    def normed(self, q: Heads, k: KeyHeads, taps: Taps) -> tuple[Tensor, Tensor]:
        """Queries and keys before their positions."""
        return q, k

    def positioned(
        self, q: Heads, k: KeyHeads, positions: Int[Tensor, "batch pos"], taps: Taps
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys as they enter the kernel."""
        return (
            (q, k)
            if self.rotary is None
            else (self.rotary(q, positions), self.rotary(k, positions))
        )

    def gated(
        self, z: Float[Tensor, "batch pos width"], x: Stream, taps: Taps
    ) -> Float[Tensor, "batch pos width"]:
        """The input of the output projection, given all heads' results and the block's normed
        input.
        """
        return z

    def _weight(self, which: Projection) -> Float[Tensor, "head d_model d_head"]:
        stored = self._rows(self.qkv.weight, which) if self.fused else getattr(self, which).weight
        return rearrange(stored, "(head d_head) d_model -> head d_model d_head", d_head=self.d_head)

    def _bias(self, which: Projection) -> Float[Tensor, "head d_head"]:
        bias = self.qkv.bias if self.fused else getattr(self, which).bias
        if bias is None:
            bias = self.o.weight.new_zeros(self.widths["qkv".index(which)])
        elif self.fused:
            bias = self._rows(bias, which)
        return rearrange(bias, "(head d_head) -> head d_head", d_head=self.d_head)

    def _rows(self, stored: Tensor, which: Projection) -> Tensor:
        rows: tuple[Tensor, ...] = stored.split(self.widths)
        return rows["qkv".index(which)]

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        return self._weight("q")

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._weight("k")

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self._weight("v")

    @property
    def b_Q(self) -> Float[Tensor, "head d_head"]:
        return self._bias("q")

    @property
    def b_K(self) -> Float[Tensor, "kv_head d_head"]:
        return self._bias("k")

    @property
    def b_V(self) -> Float[Tensor, "kv_head d_head"]:
        return self._bias("v")

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return rearrange(
            self.o.weight, "d_model (head d_head) -> head d_head d_model", d_head=self.d_head
        )

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return self.o.weight.new_zeros(self.o.out_features) if self.o.bias is None else self.o.bias


class Block(nn.Module):
    """Attention and an MLP on a residual stream, with each of their norms where a family puts it.

    "input" norms what a sub-layer reads (pre-norm), "output" what it adds (so that `attn.hook_out`
    is before and `hook_attn_out` after the norm), "sum" the stream after the addition (so that the
    stream is no sum of what was added).

    Args:
        norm: Makes a norm, given the site of its hook points: ln1 and ln2 read the stream, ln1_post
            and ln2_post come after.
        norms: The placements that the family has.
    """

    def __init__(
        self,
        attn: Attention,
        mlp: GatedMLP | MLP,
        norm: Callable[[str], Norm],
        norms: tuple[Placement, ...] = ("input",),
    ) -> None:
        super().__init__()
        self.attn, self.mlp = attn, mlp
        before, after = "input" in norms, "output" in norms or "sum" in norms
        self.ln1: Norm | None = norm("ln1") if before else None
        self.ln2: Norm | None = norm("ln2") if before else None
        self.ln1_post: Norm | None = norm("ln1_post") if after else None
        self.ln2_post: Norm | None = norm("ln2_post") if after else None
        self.of_output = "output" in norms
        self.sites = self._sites()

    def _sites(self) -> tuple[str, ...]:
        sites = ["hook_resid_pre"]
        for name, part, ln, post, end in (
            ("attn", self.attn, self.ln1, self.ln1_post, "hook_resid_mid"),
            ("mlp", self.mlp, self.ln2, self.ln2_post, "hook_resid_post"),
        ):
            after = () if post is None else post.sites
            added = (f"hook_{name}_out",)
            tail = (f"{name}.hook_out", *after, *added) if self.of_output else (*added, *after)
            sites += [*(() if ln is None else ln.sites), *part.sites, *tail, end]
        return tuple(sites)

    @property
    def norm_readers(self) -> list[tuple[Norm | None, list[Reader]]]:
        """The norms of the stream, each with the maps that read its output."""
        attn, mlp = self.attn, self.mlp
        into = [attn.qkv] if attn.fused else [attn.q, attn.k, attn.v]
        up = [mlp.gate, mlp.up] if isinstance(mlp, GatedMLP) and not mlp.fused else [mlp.up]
        return [
            (norm, [Reader(linear, "weight", "bias", input_first=False) for linear in maps])
            for norm, maps in ((self.ln1, into), (self.ln2, up))
        ]

    def forward(self, x: Stream, rows: Rows, taps: Taps) -> Stream:
        x = tap(taps, "hook_resid_pre", x)
        return self.added(
            x, self.attn(x if self.ln1 is None else self.ln1(x, taps), rows, taps), taps
        )

    def added(self, x: Stream, out: Stream, taps: Taps) -> Stream:
        """The stream after the block, given what attention made of it."""
        x = tap(taps, "hook_resid_mid", self._add(x, out, "attn", self.ln1_post, taps))
        out = self.mlp(x if self.ln2 is None else self.ln2(x, taps), taps)
        return tap(taps, "hook_resid_post", self._add(x, out, "mlp", self.ln2_post, taps))

    def _add(self, x: Stream, out: Stream, name: str, post: Norm | None, taps: Taps) -> Stream:
        if post is None:
            return x + tap(taps, f"hook_{name}_out", out)
        if self.of_output:
            normed: Tensor = post(tap(taps, f"{name}.hook_out", out), taps)
            return x + tap(taps, f"hook_{name}_out", normed)
        summed: Tensor = post(x + tap(taps, f"hook_{name}_out", out), taps)
        return summed
