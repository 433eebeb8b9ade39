"""Reading a store: by visit, by iteration, all iterations of a token together, in shuffled batches.

Files are memory-mapped: what is read of a file is what is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loopscope.interp.common.fingerprint import described, facts_of_model
from loopscope.interp.common.places import Picked, whole_numbers
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.work import opened, read_tensors
from loopscope.interp.store.files import ACTIVATIONS, file_of
from loopscope.interp.store.groups import Group
from loopscope.models.basis.draws import seeded
from loopscope.models.basis.numbers import checked_count
from loopscope.models.core.base import LoopedModel

TOKENS = "tokens"


@dataclass(frozen=True)
class StoredReads:
    """Activations of some reads; a read is one token of one example.

    Attributes:
        values: Float[Tensor, "read loop layer ..."], all chosen iterations and blocks of each
            token.
        tokens: Int[Tensor, " read"], the token ids.
        example, position: Int[Tensor, " read"], the row and the column of each read.
    """

    values: Float[Tensor, "read loop layer ..."]
    tokens: Int[Tensor, " read"]
    example: Int[Tensor, " read"]
    position: Int[Tensor, " read"]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, reads: slice | Tensor) -> StoredReads:
        return StoredReads(
            self.values[reads], self.tokens[reads], self.example[reads], self.position[reads]
        )

    @classmethod
    def joined(cls, parts: Sequence[StoredReads]) -> StoredReads:
        """Several parts one after the other."""
        return cls(
            torch.cat([part.values for part in parts]),
            torch.cat([part.tokens for part in parts]),
            torch.cat([part.example for part in parts]),
            torch.cat([part.position for part in parts]),
        )


class ActivationStore:
    """The activations that `collect` wrote into a folder, read without loading whole files.

    Args:
        folder: The folder.
        partial: True also opens a store that is not complete, with the examples that are there.

    Raises:
        FileNotFoundError: The folder holds no store.
        ValueError: Examples are missing, or a file is cut off.
    """

    def __init__(self, folder: str | Path, *, partial: bool = False) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder)
        if self.manifest.method != "collect":
            raise ValueError(
                f"{folder} holds the results of {self.manifest.method}, no store of activations"
            )
        self.groups = tuple(map(Group.from_json, self.manifest.about["groups"]))
        self.n_loops: int = self.manifest.about["n_loops"]
        self.items = [
            item
            for item in range(self.manifest.items)
            if file_of(self.folder, item, TOKENS).exists()
        ]
        if len(self.items) < self.manifest.items and not partial:
            raise ValueError(
                f"{folder} is not complete: {self.manifest.items - len(self.items)} of"
                f" {self.manifest.items} ranges of examples are missing; make the same call of"
                " collect again, which computes only these, or open it with partial=True"
            )
        tokens = [
            read_tensors(file_of(self.folder, item, TOKENS), self.manifest) for item in self.items
        ]
        self.counts = [len(each["tokens"]) for each in tokens]
        empty = torch.zeros(0, dtype=torch.int32, device="cpu")
        self.tokens, self.example, self.position = (
            torch.cat([empty, *(each[name] for each in tokens)])
            for name in ("tokens", "example", "position")
        )

    def __len__(self) -> int:
        """How many reads (tokens) the store has."""
        return len(self.tokens)

    def __repr__(self) -> str:
        return (
            f"ActivationStore({str(self.folder)!r}: {len(self)} tokens of"
            f" {self.manifest.about['examples']} examples, {', '.join(self.sites)})"
        )

    @property
    def sites(self) -> tuple[str, ...]:
        """The labels of the stored sites, such as "resid_post" and "prelude.resid_post"."""
        return tuple(group.label for group in self.groups)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The number format of the stored activations."""
        found: torch.dtype = getattr(torch, self.manifest.settings["dtype"])
        return found

    def group(self, site: str | None = None) -> Group:
        """The visits and the shape of one site. The label may be shortened to its end ("z" for
        "attn.z") if no other label ends so; None if there is only one site.
        """
        found = [group for group in self.groups if site in (None, group.label)]
        found = found or [group for group in self.groups if group.label.endswith(f".{site}")]
        if len(found) != 1:
            raise KeyError(f"this store has the sites {', '.join(self.sites)}; got {site!r}")
        return found[0]

    def frame(self) -> pd.DataFrame:
        """One row per read. The columns are example, position and token."""
        return pd.DataFrame(
            {
                "example": self.example.numpy(),
                "position": self.position.numpy(),
                "token": self.tokens.numpy(),
            }
        )

    def check(self, model: LoopedModel) -> None:
        """Refuse a model that did not make the store.

        Raises:
            ValueError: The model has other weights, or another vocabulary.
        """
        words = described(None if model.vocab is None else tuple(model.vocab.words))
        for what, mine, theirs in (
            ("tokenizer", words, self.manifest.settings["vocabulary"]),
            ("model", described(facts_of_model(model)), self.manifest.weights),
        ):
            if mine != theirs:
                raise ValueError(
                    f"{self.folder} was made with another {what} than this model's; collect again,"
                    f" or load the {what} that it was made with"
                )

    def visit(self, name: str) -> Float[Tensor, "read ..."]:
        """The activations of all reads at one hook point, such as
        "loops.2.blocks.0.hook_resid_post".
        """
        self._refuse_empty()
        for group in self.groups:
            for loop, row in enumerate(group.names):
                if name in row:
                    at = [loop], [row.index(name)]
                    parts = [self._slab(item, group, *at)[0, 0] for item in self.items]
                    return torch.cat(parts)
        known = [name for group in self.groups for name in group.points]
        raise KeyError(f"{name!r} is not in this store, which has {', '.join(known[:4])}, ...")

    def read(
        self,
        site: str | None = None,
        loops: Picked | int | None = None,
        layers: Picked | int | None = None,
    ) -> StoredReads:
        """All reads at once, in the order of the examples; `batches` describes the arguments."""
        return StoredReads.joined(list(self.files(site, loops, layers)))

    def files(
        self,
        site: str | None = None,
        loops: Picked | int | None = None,
        layers: Picked | int | None = None,
    ) -> Iterator[StoredReads]:
        """The reads, one file after another; `batches` describes the arguments."""
        group = self.group(site)
        chosen = _index(loops, group.loops, "loops"), _index(layers, group.layers, "layers")
        self._refuse_empty()
        for turn in range(len(self.items)):
            yield self._file(turn, group, *chosen)

    def batches(
        self,
        size: int,
        site: str | None = None,
        *,
        loops: Picked | int | None = None,
        layers: Picked | int | None = None,
        seed: int | None = None,
        buffer: int = 1 << 28,
    ) -> Iterator[StoredReads]:
        """Every read once, in batches.

        Args:
            size: How many reads a batch has; the last one may be smaller.
            site: The label of the site; None if there is only one.
            loops, layers: The iterations and the blocks, from 0; None means all.
            seed: The seed of the order: files are taken at random, and the reads of as many files
                as fit into the buffer are mixed. None keeps the order of the examples.
            buffer: How many bytes of activations are mixed at a time, at least those of one batch.

        Yields:
            `StoredReads` with all chosen iterations of each token. A batch shares no memory with
            the others.
        """
        size, group = checked_count(size, "size"), self.group(site)
        buffer = checked_count(buffer, "buffer")
        self._refuse_empty()
        chosen = _index(loops, group.loops, "loops"), _index(layers, group.layers, "layers")
        draw = None if seed is None else seeded(seed)
        order = torch.arange(len(self.items), device="cpu")
        if draw is not None:
            order = torch.randperm(len(self.items), generator=draw, device="cpu")
        per_read = self.dtype.itemsize * len(chosen[0]) * len(chosen[1]) * math.prod(group.shape)
        wanted = size if draw is None else max(size, buffer // per_read)
        held: list[StoredReads] = []
        for turn, index in enumerate(order.tolist()):
            held.append(self._file(index, group, *chosen))
            last = turn == len(order) - 1
            if sum(map(len, held)) < wanted and not last:
                continue
            found = StoredReads.joined(held)
            reads = torch.arange(len(found), device="cpu")
            if draw is not None:
                reads = torch.randperm(len(found), generator=draw, device="cpu")
            whole = len(found) if last else len(found) // size * size
            yield from (found[reads[at : min(at + size, whole)]] for at in range(0, whole, size))
            held = [found[reads[whole:]]]

    def _refuse_empty(self) -> None:
        """Raise where no file was written yet."""
        if not self.items:
            raise ValueError(
                f"{self.folder} holds no activations yet; run a shard of collect that writes some"
            )

    def _file(self, turn: int, group: Group, loops: list[int], layers: list[int]) -> StoredReads:
        first = sum(self.counts[:turn])
        rows = slice(first, first + self.counts[turn])
        values = self._slab(self.items[turn], group, loops, layers).movedim(2, 0)
        return StoredReads(values, self.tokens[rows], self.example[rows], self.position[rows])

    def _slab(
        self, item: int, group: Group, loops: list[int], layers: list[int]
    ) -> Float[Tensor, "loop layer read ..."]:
        """Some iterations and layers of one file."""
        path = file_of(self.folder, item, group.label)
        with opened(path) as file:
            if (file.metadata() or {}).get("call") != self.manifest.call:
                raise ValueError(f"{path} belongs to another store than the manifest beside it")
            found = file.get_slice(ACTIVATIONS)
            rows = [torch.stack([found[loop, layer] for layer in layers]) for loop in loops]
        return torch.stack(rows)


def _index(wanted: Picked | int | None, has: Sequence[int | None], what: str) -> list[int]:
    """Where the chosen coordinates are on an axis."""
    if wanted is None or (isinstance(wanted, str) and wanted == "all"):
        return list(range(len(has)))
    chosen = whole_numbers(what, wanted)
    if not chosen:
        raise ValueError(f"{what} must be 'all' or name at least one of {list(has)}, got none")
    absent = [each for each in chosen if each not in has]
    if absent:
        raise ValueError(f"{what} of this site are {list(has)} in the store, got {absent[0]}")
    return [list(has).index(each) for each in chosen]
