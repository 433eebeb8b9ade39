"""Lenses in pieces: shared among processes, and kept in a folder from which one record is made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from loopscope.interp.common.columns import read_columns
from loopscope.interp.common.fingerprint import described, facts_of_inputs, facts_of_model
from loopscope.interp.common.inputs import in_chunks, rows_at_once
from loopscope.interp.common.places import Picked
from loopscope.interp.common.processes import over_ranks
from loopscope.interp.lens.record import Lens, ReadVisit
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.run import in_pieces, run_items
from loopscope.interp.shards.share import Shard, checked_shard
from loopscope.interp.shards.work import Results, settings_of, stacked
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel


@dataclass(frozen=True)
class LensJob:
    """A lens to compute, some examples at a time.

    Attributes:
        method: The public call.
        places: What is read, visit by visit.
        positions: The columns that are read; None for the readout.
        compute: From some examples to the head's input, Float[Tensor, "visit read d_model"].
        save_to, shard: As for `logit_lens`.
    """

    method: str
    model: LoopedModel
    batch: Batch
    n_loops: int
    places: Sequence[ReadVisit]
    positions: Picked | None
    batch_size: int
    compute: Callable[[Batch], Float[Tensor, "visit read d_model"]]
    save_to: str | Path | None
    shard: Shard | None

    @property
    def _size(self) -> int:
        """How many examples are run at a time: all where rows depend on each other."""
        return rows_at_once(self.model, self.batch, self.batch_size)

    def lens(self, keep_logits: bool) -> Lens:
        """The record; of a shard, that of its examples."""
        columns = read_columns(self.batch, self.positions)
        if not in_pieces(self.save_to, self.shard):
            heads_input = over_ranks(self.model, self.batch, self._whole, dim=1)
            return Lens.of(self.model, heads_input, self.places, columns, keep_logits)
        size = self._size
        count = -(-len(self.batch) // size)
        part = checked_shard(self.shard)
        items, _, found = run_items(
            count, part, self._pieces, self.save_to, lambda: self._manifest(count)
        )
        rows = torch.arange(len(self.batch), device="cpu").split(size)
        mine = torch.cat([rows[item] for item in items]) if items else rows[0][:0]
        if not len(mine):
            raise ValueError(
                f"shard {part} of this lens is empty: there are {count} pieces of batch_size={size}"
                " examples; take fewer shards or a smaller batch_size"
            )
        heads_input = stacked(found, "heads_input", 1).to(self.batch.tokens.device)
        own = columns[mine.to(columns.device)]
        lens = Lens.of(self.model, heads_input, self.places, own, keep_logits)
        return replace(lens, example=mine.to(lens.example)[lens.example])

    def _whole(self, examples: Batch) -> Tensor:
        parts = in_chunks(examples, self._size, self.method)
        return torch.cat([self.compute(part) for part in parts], dim=1)

    def _pieces(self, items: list[int]) -> tuple[Results, Iterator[Results]]:
        size = self._size
        parts = (self.batch[slice(item * size, (item + 1) * size)] for item in items)
        common = {"columns": read_columns(self.batch, self.positions)}
        return common, ({"heads_input": self.compute(part)} for part in parts)

    def _manifest(self, count: int) -> Manifest:
        settings = {
            "n_loops": self.n_loops,
            "positions": self.positions,
            "batch_size": self.batch_size,
        }
        return Manifest(
            method=self.method,
            weights=described(facts_of_model(self.model)),
            inputs=described(facts_of_inputs([self.batch])),
            settings=settings_of(settings),
            items=count,
            about={"places": [list(place) for place in self.places]},
        )


def kept_lens(
    model: LoopedModel, manifest: Manifest, common: Results, found: Sequence[Results]
) -> Lens:
    """The record of a whole lens from its folder.

    Raises:
        ValueError: Another model than the one that was read.
    """
    if described(facts_of_model(model)) != manifest.weights:
        raise ValueError(
            f"the results of {manifest.method} were read from another model than the one that is"
            " given; load the model with the same weights"
        )
    places: list[ReadVisit] = [
        (loop, layer, name) for loop, layer, name in manifest.about["places"]
    ]
    heads_input = stacked(found, "heads_input", 1).to(model.device)
    return Lens.of(model, heads_input, places, common["columns"].to(model.device))
