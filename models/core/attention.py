"""Attention for any set of rows: which keys a row may see, and the kernel.

A row is one (batch, position). A block may be run on all rows of a batch or on a subset of them;
the keys and values of the other rows are then supplied from elsewhere (the same run, a stored run,
a generation cache).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol, runtime_checkable

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
        inputs: What the visit's convolutions read at these places, "batch key width" by the
            convolution's name; empty for most families.
    """

    k: Float[Tensor, "batch key head d_head"]
    v: Float[Tensor, "batch key head d_head"]
    positions: Int[Tensor, "batch key"]
    mask: Bool[Tensor, "batch key"]
    tags: Int[Tensor, "batch key"] | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

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
        inputs = {
            name: torch.cat([earlier, later.inputs[name]], dim=1)
            for name, earlier in self.inputs.items()
        }
        return KeyValues(k, v, positions, mask, tags, inputs)


class Scoring(NamedTuple):
    """How a score is made of the product of a query and a key.

    Attributes:
        scale: Its factor; None means 1 / sqrt(d_head).
        cap: A cap c turns a scaled product x into c tanh(x / c); None for none.
    """

    scale: float | None = None
    cap: float | None = None


def softcapped(x: Float[Tensor, "*axes"], cap: float | int) -> Float[Tensor, "*axes"]:
    """cap * tanh(x / cap), of scores, gates or logits."""
    return cap * torch.tanh(x / cap)


PLAIN = Scoring()
KeyValueStore = MutableMapping[str, KeyValues]
BiasAt = Callable[[Int[Tensor, "batch query key"]], Float[Tensor, "batch head query key"]]
Visible = Callable[[Places, Places], Bool[Tensor, "batch query key"]]


def causal_keys(queries: Places, keys: Places) -> Bool[Tensor, "batch query key"]:
    """A row sees the keys at its own position and before it."""
    return keys.positions[:, None, :] <= queries.positions[:, :, None]


def every_key(queries: Places, keys: Places) -> Bool[Tensor, "batch query key"]:
    """A row sees the keys at all positions."""
    return keys.positions.new_ones(
        (*queries.positions.shape, keys.positions.shape[1]), dtype=torch.bool
    )


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
        inputs: What the visit's convolutions have read so far, when it is kept.
        lagged: Where the places before each row are, by their number; the same at every visit.
    """

    places: Places
    allowed: Bool[Tensor, "batch 1 query key"] | None
    supplied: KeyValues | None = None
    store: KeyValueStore | None = None
    visit: str = ""
    inputs: dict[str, Tensor] = field(default_factory=dict)
    lagged: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

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
        given = None if supplied is None else supplied[visit]
        return replace(self, supplied=given, store=store, visit=visit, inputs={})

    def attend(
        self,
        q: Float[Tensor, "batch row head d_head"],
        k: Float[Tensor, "batch row kv_head d_head"],
        v: Float[Tensor, "batch row kv_head d_head"],
        taps: Taps,
        dropout: float = 0.0,
        scoring: Scoring = PLAIN,
    ) -> Float[Tensor, "batch row head d_head"]:
        """Scaled dot-product attention of the rows over the keys that they see.

        Scores and pattern are computed only when hooked, when scores are capped, or when a number
        is not finite: the fused kernels hide some of those, and a hook that changes nothing must
        change nothing.
        """
        k, v = self._with_supplied(k, v)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = k.shape[1] != q.shape[1]
        if not is_fused((q, k, v), taps, scoring):
            if grouped:
                k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
            z = self._explicit(q, k, v, taps, dropout, scoring)
        else:
            z = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=self.allowed,
                is_causal=self.allowed is None and q.shape[2] > 1,
                dropout_p=dropout,
                scale=scoring.scale,
                enable_gqa=grouped,
            )
        return z.transpose(1, 2)

    def attend_biased(
        self,
        q: Float[Tensor, "batch row head d_head"],
        k: Float[Tensor, "batch row kv_head d_head"],
        v: Float[Tensor, "batch row kv_head d_head"],
        bias: BiasAt,
        sink: Float[Tensor, "batch row head"],
        taps: Taps,
    ) -> Float[Tensor, "batch row head d_head"]:
        """Attention with a bias of the scores that depends on distance, and with a sink.

        Args:
            bias: The bias of each score from the distance of its query and key in positions; -inf
                where the key is out of reach.
            sink: The logit of a place without a value, which takes its share of each row's
                attention. Rows of the pattern sum to 1 minus that share.
        """
        k, v = self._with_supplied(k, v)
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, dim=2).transpose(1, 2) for x in (k, v))
        here, keys = self.places.positions, self.places.positions
        if self.supplied is not None:
            keys = torch.cat([self.supplied.positions, keys], dim=1)
        distance = here[:, :, None] - keys[:, None, :]
        allowed = (distance >= 0)[:, None] if self.allowed is None else self.allowed
        scores = q.transpose(1, 2) @ k.transpose(-1, -2) * q.shape[-1] ** -0.5 + bias(distance)
        scores = tap(taps, "attn.hook_attn_scores", scores.masked_fill(~allowed, -torch.inf))
        logits = torch.cat([scores, sink.transpose(1, 2)[..., None].to(scores.dtype)], dim=-1)
        kind = torch.promote_types(logits.dtype, torch.float32)
        pattern = logits.softmax(-1, dtype=kind)[..., :-1].to(v.dtype)
        return (tap(taps, "attn.hook_pattern", pattern) @ v).transpose(1, 2)

    def recent(
        self, name: str, x: Float[Tensor, "batch row width"], size: int
    ) -> Float[Tensor, "batch row lag width"]:
        """The values at each row's place and at the places right before it; zeros at padding and
        before the first place.

        Args:
            name: The convolution that reads them, within the visit.
            size: Places; lag 0 is the row's own.
        """
        x = x.masked_fill(~self.places.mask[..., None], 0)
        if self.store is not None:
            self.inputs[name] = x
        if self.allowed is None:  # all places from the first one on
            padded = F.pad(x, (0, 0, size - 1, 0))
            return padded.unfold(1, size, 1).flip(-1).transpose(-1, -2)
        if self.supplied is not None:
            x = torch.cat([self.supplied.inputs[name], x], dim=1)
        if size not in self.lagged:
            self.lagged[size] = self._places_before(size)
        index, absent = self.lagged[size]
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        return x[batch, index].masked_fill(absent[..., None], 0)

    def _places_before(
        self, size: int
    ) -> tuple[Int[Tensor, "batch row lag"], Bool[Tensor, "batch row lag"]]:
        """The column among supplied and own rows of the places at and before each row, and whether
        there is none.
        """
        positions, real = self.places.positions, self.places.mask
        wanted = positions[:, :, None] - torch.arange(size, device=positions.device)
        if self.supplied is not None:
            covered = (self.supplied.positions[:, :, None] == positions[:, None, :]).any(-1)
            real = torch.cat([self.supplied.mask & ~covered, real], dim=1)
            positions = torch.cat([self.supplied.positions, positions], dim=1)
        found = (wanted[..., None] == positions[:, None, None, :]) & real[:, None, None, :]
        return found.int().argmax(-1), ~found.any(-1)

    def _with_supplied(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' keys and values behind the supplied ones; those of the rows are kept, when
        asked.
        """
        if self.store is not None:
            places = self.places
            self.store[self.visit] = KeyValues(
                k, v, places.positions, places.mask, places.tags, self.inputs
            )
        if self.supplied is None:
            return k, v
        return torch.cat([self.supplied.k, k], dim=1), torch.cat([self.supplied.v, v], dim=1)

    def _explicit(
        self, q: Tensor, k: Tensor, v: Tensor, taps: Taps, dropout: float, scoring: Scoring
    ) -> Tensor:
        allowed = self.allowed
        if allowed is None:
            allowed = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
        scale = q.shape[-1] ** -0.5 if scoring.scale is None else scoring.scale
        scores = q @ k.transpose(-1, -2) * scale
        if scoring.cap is not None:
            scores = softcapped(scores, scoring.cap)
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
        near = self.allowed & (distance < window)[:, None]
        blind = ~near.any(-1, keepdim=True)  # padded rows, which must not see nothing
        return replace(self, allowed=near | (blind & self.allowed))

    def _distances(self) -> Int[Tensor, "batch query key"]:
        """How many positions before each row each key stands."""
        here = keys = self.places.positions
        if self.supplied is not None:
            keys = torch.cat([self.supplied.positions, keys], dim=1)
        return here[:, :, None] - keys[:, None, :]


def is_fused(numbers: Sequence[Tensor], taps: Taps, scoring: Scoring) -> bool:
    """Whether a fused kernel may compute attention from some numbers."""
    if "attn.hook_attn_scores" in taps or "attn.hook_pattern" in taps or scoring.cap is not None:
        return False
    return torch.compiler.is_compiling() or _are_finite(*numbers)


def _are_finite(*tensors: Tensor) -> bool:
    """Whether all numbers are finite."""
    sums = [x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return math.isfinite(sum(sums))


def _is_whole(places: Places) -> bool:
    """Whether the rows are positions 0..n-1 of sequences without padding."""
    expected = torch.arange(places.positions.shape[1], device=places.positions.device)
    return bool(places.mask.all()) and bool((places.positions == expected).all())
