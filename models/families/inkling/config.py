"""The sizes of an Inkling-2-Mini."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from loopscope.models.basis.fields import MOST_BLOCKS, limits
from loopscope.models.core.config import LoopedConfig

_POSITIVE = limits(above=0)
_NOT_NEGATIVE = limits(least=0)


@dataclass(frozen=True, kw_only=True)
class InklingConfig(LoopedConfig):
    """Sizes; `n_layers` counts the layers of the loop. The release has the defaults.

    Layers are of two kinds, full attention and sliding attention; `n_heads`, `n_key_value_heads`
    and `head_dim` are those of the full ones.

    Attributes:
        n_prelude_layers, n_coda_layers: Layers before and after the loop.
        layers_per_block: Layers whose outputs are summed into one block; the loop must start and
            end where a block does.
        full_layers: The layers with full attention, counted from 0 through prelude, loop and coda.
        n_key_value_heads, head_dim: None means n_heads, and d_model / n_heads.
        n_sliding_heads, n_sliding_key_value_heads, sliding_head_dim: Of the sliding layers; None
            means those of the full ones.
        window: Positions that a row of a sliding layer sees, its own included.
        rel_extent: Distances that have a bias in full layers; in sliding ones all of the window do.
        d_rel: Channels of the relative states that the bias is made of.
        log_floor, log_alpha: Queries of full layers at position p are scaled by
            1 + log_alpha log(max((p + 1) / log_floor, 1)).
        qk_clip, rel_clip: The longest queries and keys, and the longest relative states.
        kernel: Positions that a short convolution reads.
        n_experts, n_chosen: Experts, and how many of them a row is given; d_mlp is the width of
            one.
        route_scale: The sum of the weights of the chosen experts.
        gate_cap, up_cap, logit_cap: Of the two projections into an expert, and of the logits.
        gate_rank: Width of the bottleneck of a message gate.
        d_vocab_padded: Rows of the stored embedding and head, of which the first d_vocab count;
            None for d_vocab.
    """

    family: ClassVar[str] = "inkling2_loop"
    act_fn: ClassVar[str] = "silu"
    normalization_type: ClassVar[str] = "RMS"
    TINY: ClassVar[Mapping[str, Any]] = {
        "n_prelude_layers": 1, "n_coda_layers": 1, "layers_per_block": 1, "full_layers": (2,),
        "window": 4, "rel_extent": 5, "d_rel": 3, "log_floor": 3, "qk_clip": 2.0, "n_experts": 5,
        "n_chosen": 2, "gate_rank": 5,
    }  # fmt: skip
    n_prelude_layers: int = field(metadata=limits(most=MOST_BLOCKS))
    n_coda_layers: int = field(metadata=limits(least=0, most=MOST_BLOCKS))
    layers_per_block: int = field(default=6, metadata=limits(most=MOST_BLOCKS))
    full_layers: Sequence[int]
    n_key_value_heads: int | None = None
    head_dim: int | None = None
    n_sliding_heads: int | None = None
    n_sliding_key_value_heads: int | None = None
    sliding_head_dim: int | None = None
    window: int = 1024
    rel_extent: int = 1024
    d_rel: int = 16
    log_floor: float | int = field(default=8192, metadata=_POSITIVE)
    log_alpha: float | int = field(default=0.1, metadata=_NOT_NEGATIVE)
    qk_clip: float | int = field(default=512**0.5, metadata=_POSITIVE)
    rel_clip: float | int = field(default=8.0, metadata=_POSITIVE)
    kernel: int = 4
    n_experts: int = 128
    n_chosen: int = 8
    route_scale: float | int = field(default=8.0, metadata=_POSITIVE)
    gate_cap: float | int = field(default=4.0, metadata=_POSITIVE)
    up_cap: float | int = field(default=25.0, metadata=_POSITIVE)
    logit_cap: float | int = field(default=30.0, metadata=_POSITIVE)
    gate_rank: int = 64
    d_vocab_padded: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_layers()
        for name, heads, kv_heads in (
            ("n_key_value_heads", *self.heads(full=True)[:2]),
            ("n_sliding_key_value_heads", *self.heads(full=False)[:2]),
        ):
            if heads % kv_heads:
                raise ValueError(f"{name} must divide the query heads={heads}, got {kv_heads}")
        if self.n_chosen > self.n_experts:
            raise ValueError(
                f"n_chosen must be at most n_experts={self.n_experts}, got {self.n_chosen}"
            )
        if self.padded_vocab < self.d_vocab:
            raise ValueError(
                f"d_vocab_padded must be at least d_vocab={self.d_vocab}, got {self.padded_vocab}"
            )

    def _check_layers(self) -> None:
        """Refuse a loop that cuts a block, and layers that are not there."""
        start, total = self.n_prelude_layers, self.n_real_layers
        for name, layer in (("start", start), ("end", start + self.n_layers)):
            if layer % self.layers_per_block:
                raise ValueError(
                    f"the {name} of the loop must be a multiple of"
                    f" layers_per_block={self.layers_per_block}, got layer {layer}"
                )
        whole = all(isinstance(x, int) and not isinstance(x, bool) for x in self.full_layers)
        if not whole or any(not 0 <= layer < total for layer in self.full_layers):
            raise ValueError(
                f"full_layers must be layers in 0..{total - 1}, got {self.full_layers!r:.200}"
            )
        object.__setattr__(self, "full_layers", tuple(sorted(set(self.full_layers))))

    @property
    def n_real_layers(self) -> int:
        """Layers with weights of their own."""
        return self.n_prelude_layers + self.n_layers + self.n_coda_layers

    @property
    def n_start_blocks(self) -> int:
        """Blocks that are finished before the loop."""
        return self.n_prelude_layers // self.layers_per_block

    @property
    def padded_vocab(self) -> int:
        """Rows of the stored embedding and head."""
        return self.d_vocab if self.d_vocab_padded is None else self.d_vocab_padded

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_key_value_heads is None else self.n_key_value_heads

    def width_of_head(self) -> int:
        return super().width_of_head() if self.head_dim is None else self.head_dim

    def heads(self, *, full: bool) -> tuple[int, int, int]:
        """Query heads, key and value heads, and channels of a head of one kind of layer."""
        sliding = (self.n_sliding_heads, self.n_sliding_key_value_heads, self.sliding_head_dim)
        shared = (self.n_heads, self.kv_heads, self.d_head)
        own = (None, None, None) if full else sliding
        n_heads, kv_heads, d_head = (
            common if given is None else given for given, common in zip(own, shared, strict=True)
        )
        return n_heads, kv_heads, d_head
