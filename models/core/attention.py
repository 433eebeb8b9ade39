"""Attention for any set of rows: which keys a row may see, and the kernel.

A row is one (batch, position). A block may be run on all rows of a batch or on a subset of them;
the keys and values of the other rows are then supplied from elsewhere (the same run, a stored run,
a generation cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from loopscope.models.core.hooks import Taps, tap


@runtime_checkable
class Places(Protocol):
    """Where some rows or keys stand: what a mask can depend on.

    Attributes:
        positions: Int[Tensor, "batch row"], in the sequence.
        mask: Bool[Tensor, "batch row"], True for real tokens.
        tags: Int[Tensor, "batch row"], what else a family's mask needs (a token type, say); None
            for most.
    """

    @property
    def positions(self) -> Int[Tensor, "batch row"]: ...
    @property
    def mask(self) -> Bool[Tensor, "batch row"]: ...
    @property
    def tags(self) -> Int[Tensor, "batch row"] | None: ...


@dataclass(frozen=True)
class KeyValues:
    """Keys and values as they enter the kernel, with where they stand.

    Attributes:
        k: Float[Tensor, "batch key head d_head"], after rotation where the family rotates.
        v: Float[Tensor, "batch key head d_head"].
        positions, mask, tags: As in `Places`.
    """

    k: Float[Tensor, "batch key head d_head"]
    v: Float[Tensor, "batch key head d_head"]
    positions: Int[Tensor, "batch key"]
    mask: Bool[Tensor, "batch key"]
    tags: Int[Tensor, "batch key"] | None = None

    def followed_by(self, later: KeyValues) -> KeyValues:
        """These keys and values and later ones of the same sequences, one after the other."""
        k, v, positions, mask = (
            torch.cat([getattr(self, part), getattr(later, part)], dim=1)
            for part in ("k", "v", "positions", "mask")
        )
        tags = (
            None
            if self.tags is None or later.tags is None
            else torch.cat([self.tags, later.tags], dim=1)
        )
        return KeyValues(k, v, positions, mask, tags)


KeyValueStore = MutableMapping[str, KeyValues]
Visible = Callable[[Places, Places], Bool[Tensor, "batch query key"]]


def causal_keys(queries: Places, keys: Places) -> Bool[Tensor, "batch query key"]:
    """A row sees the keys at its own position and before it."""
    return keys.positions[:, None, :] <= queries.positions[:, :, None]


def prefix_keys(queries: Places, keys: Places) -> Bool[Tensor, "batch query key"]:
    """A row sees the keys at its own position and before it; where there are tags, those tagged 1
    also see each other.
    """
    seen = causal_keys(queries, keys)
    if queries.tags is None or keys.tags is None:
        return seen
    return seen | ((queries.tags == 1)[:, :, None] & (keys.tags == 1)[:, None, :])


@dataclass(frozen=True)
class Rows:
    """The rows a block is given at one visit, and the keys that they see.

    Attributes:
        places: Where each row stands; a padded row is never a key.
        allowed: Bool[Tensor, "batch 1 query key"]; None means plain causal attention over unpadded
            rows.
        supplied: Keys and values of other rows, put before the rows' own. A supplied key at a
            position that the rows themselves cover is not used.
        store, visit: Where to keep this visit's keys and values, when asked.
    """

    places: Places
    allowed: Bool[Tensor, "batch 1 query key"] | None
    supplied: KeyValues | None = None
    store: KeyValueStore | None = None
    visit: str = ""

    @classmethod
    def make(cls, places: Places, visible: Visible, others: KeyValues | None = None) -> Rows:
        """Work out once what each row sees; `others` is an example of what will be supplied at
        every visit.

        Raises:
            ValueError: A row would see no key at all (a padded row whose sequence is neither given
                nor supplied).
        """
        plain = visible is causal_keys or (visible is prefix_keys and places.tags is None)
        if others is None and plain and _is_whole(places):
            return cls(places, None)
        allowed = visible(places, places) & places.mask[:, None, :]
        if others is not None:
            covered = (others.positions[:, :, None] == places.positions[:, None, :]).any(-1)
            seen = visible(places, others) & (others.mask & ~covered)[:, None, :]
            allowed = torch.cat([seen, allowed], dim=-1)
        if not bool(allowed.any(-1).all()):
            raise ValueError(
                "each row must see at least one key: these rows leave out the real tokens before"
                " them; supply their keys and values, or give the rows from position 0"
            )
        return cls(places, allowed[:, None])

    def at(self, visit: str, supplied: KeyValueStore | None, store: KeyValueStore | None) -> Rows:
        """These rows at one visit of the schedule."""
        if supplied is None and store is None:
            return self
        return replace(
            self, supplied=None if supplied is None else supplied[visit], store=store, visit=visit
        )

    def attend(
        self,
        q: Float[Tensor, "batch row head d_head"],
        k: Float[Tensor, "batch row kv_head d_head"],
        v: Float[Tensor, "batch row kv_head d_head"],
        taps: Taps,
        dropout: float = 0.0,
    ) -> Float[Tensor, "batch row head d_head"]:
        """Scaled dot-product attention of the rows over the keys that they see.

        Scores and pattern are computed only when hooked, or when a number is not finite: the fused
        kernels hide some of those, and a hook that changes nothing must change nothing.
        """
        if self.store is not None:
            self.store[self.visit] = KeyValues(
                k, v, self.places.positions, self.places.mask, self.places.tags
            )
        if self.supplied is not None:
            k = torch.cat([self.supplied.k, k], dim=1)
            v = torch.cat([self.supplied.v, v], dim=1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = k.shape[1] != q.shape[1]
        hooked = "attn.hook_attn_scores" in taps or "attn.hook_pattern" in taps
        if hooked or not (torch.compiler.is_compiling() or _are_finite(q, k, v)):
            if grouped:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            z = self._explicit(q, k, v, taps, dropout)
        elif self.allowed is None:
            z = F.scaled_dot_product_attention(
                q, k, v, is_causal=q.shape[2] > 1, dropout_p=dropout, enable_gqa=grouped
            )
        else:
            z = F.scaled_dot_product_attention(
                q, k, v, attn_mask=self.allowed, dropout_p=dropout, enable_gqa=grouped
            )
        return z.transpose(1, 2)

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, taps: Taps, dropout: float) -> Tensor:
        allowed = self.allowed
        if allowed is None:
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        scores = tap(taps, "attn.hook_attn_scores", scores.masked_fill(~allowed, -torch.inf))
        return (
            F.dropout(
                tap(taps, "attn.hook_pattern", scores.softmax(-1)), dropout, training=dropout > 0.0
            )
            @ v
        )

    def within(self, window: int) -> Rows:
        """The same rows where each sees the last `window` positions only, its own included."""
        distance = self._distances()
        if self.allowed is None:
            if distance.shape[-1] <= window:
                return self  # the plain kernel serves rows that see all keys before them
            return replace(self, allowed=((distance >= 0) & (distance < window))[:, None])
        return replace(self, allowed=self.allowed & (distance < window)[:, None])

    def _distances(self) -> Int[Tensor, "batch query key"]:
        """How many positions before each row each key stands."""
        here = keys = self.places.positions
        if self.supplied is not None:
            keys = torch.cat([self.supplied.positions, keys], dim=1)
        return here[:, :, None] - keys[:, None, :]


def _are_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite."""
    sums = [x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return math.isfinite(sum(sums))


def _is_whole(places: Places) -> bool:
    """Whether the rows are positions 0..n-1 of sequences without padding."""
    expected = torch.arange(places.positions.shape[1], device=places.positions.device)
    return bool(places.mask.all()) and bool((places.positions == expected).all())
