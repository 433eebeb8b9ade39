"""Activations of any number of texts, written to a folder as they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from loopscope.interp.common import collecting
from loopscope.interp.common.fingerprint import described, facts_of_model
from loopscope.interp.common.inputs import ReadoutColumn, checked_batch_size, rows_apart
from loopscope.interp.common.modes import evaluated, ungraphed
from loopscope.interp.common.places import Picked, VisitNames, Where
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.share import Shard, checked_shard, own
from loopscope.interp.shards.work import (
    enough_disk,
    locked,
    open_folder,
    settings_of,
    to_disk,
    write_tensors,
)
from loopscope.interp.store.files import FLOATS, Slab, file_of
from loopscope.interp.store.groups import Group, groups_of
from loopscope.interp.store.pieces import Piece, Positions, checked_positions, cut, reads_of
from loopscope.interp.store.reading import TOKENS, ActivationStore
from loopscope.interp.store.texts import Source, Sources, source_of
from loopscope.models.basis.cpu_copies import begun_copy, wait_for_copies
from loopscope.models.basis.files import atomic_path
from loopscope.models.basis.numbers import checked_count
from loopscope.models.basis.tokens import Batch
from loopscope.models.core.base import LoopedModel
from loopscope.models.core.state import checked_loops


@evaluated
def collect(
    model: LoopedModel,
    inputs: Sources,
    sites: str | Sequence[str] = "resid_post",
    n_loops: int | None = None,
    *,
    to: str | Path,
    loops: Picked | int | None = None,
    layers: Picked | int | None = None,
    visits: VisitNames | None = None,
    positions: Picked | int | None = "all",
    dtype: torch.dtype | None = None,
    max_bytes: int = 1 << 28,
    batch_size: int = 32,
    per_file: int = 256,
    column: str | None = None,
    context: int | None = None,
    readout: ReadoutColumn = None,
    shard: Shard | None = None,
) -> ActivationStore:
    """Write the activations of many texts into a folder, which may become larger than memory.

    If the call was interrupted, the same call goes on from there.

    Args:
        inputs: A `Batch`, texts, token ids, a data set of `datasets`, or the path of a file with
            one example per line (JSON if the name ends with .jsonl, else text).
        sites: Names of sites, such as "resid_post", "z", "mlp_out" or "state_out".
        n_loops: The number of iterations; None means the number that the checkpoint records.
        to: The folder.
        loops, layers: The iterations and the blocks to store, from 0; None means all.
        visits: The visits to store, by name or pattern, such as "loops.0.low.1.blocks.0"; None
            means all.
        positions: The tokens to store: "all" except padding, some columns, or None for the answer
            position. A column that an example does not have is left out for it.
        dtype: The number format in the files; None means that of the model.
        max_bytes: How many bytes of activations may be in memory at a time; if necessary, fewer
            rows run at a time.
        batch_size: How many rows run at a time, at most.
        per_file: How many examples share a file.
        column: The column of a data set or the field of a JSON line that holds the text; None if
            there is only one.
        context: The number of tokens after which texts and rows of ids are cut; None does not cut
            them.
        readout: The column at which answers are read, for token ids; None means the last one.
        shard: (i, n) writes the i-th of n shares of the files; None writes all.

    Returns:
        The store; for a shard, with all that the folder holds so far.

    Raises:
        KeyError: The model does not have a site or a visit, or the data does not have the column.
        ValueError: The folder holds another call, `max_bytes` is too small for one example, no
            example has a position, the visits are no full grid of loops and layers, or rows may
            depend on each other (the model's own do, or a hook could tell them apart) and do not
            fit into one piece.
        OSError: The disk is full; files that were finished before are kept.
    """
    n_loops = checked_loops(n_loops, model.cfg.n_loops)
    part = checked_shard(shard)
    source = source_of(model, inputs, readout, column, context)
    with torch.no_grad():
        groups = groups_of(
            model, source.batches(range(1)), sites, Where(loops, layers, visits), n_loops
        )
    per_file, batch_size = checked_count(per_file, "per_file"), checked_batch_size(batch_size)
    max_bytes = checked_count(max_bytes, "max_bytes")
    positions = checked_positions(source, positions, batch_size)
    if not rows_apart(model) and source.count > min(per_file, batch_size):
        raise ValueError(
            f"{_joined(model)}, so all {source.count} examples must be run at once; give per_file"
            f" and batch_size of at least {source.count}"
        )
    kind = next(model.parameters()).dtype if dtype is None else dtype
    if kind not in FLOATS:
        raise ValueError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {kind}")
    settings = {
        "sites": [group.names for group in groups],
        "n_loops": n_loops,
        "positions": positions,
        "dtype": str(kind).removeprefix("torch."),
        "max_bytes": max_bytes,
        "batch_size": batch_size,
        "per_file": per_file,
        "vocabulary": described(None if model.vocab is None else tuple(model.vocab.words)),
        "read_at": None if isinstance(inputs, Batch | Tensor) else model.read_at,
    }
    manifest = Manifest(
        method="collect",
        weights=described(facts_of_model(model)),
        inputs=source.digest,
        settings=settings_of(settings),
        items=-(-source.count // per_file),
        about={
            "groups": [group.to_json() for group in groups],
            "examples": source.count,
            "n_loops": n_loops,
        },
    )
    job = _Job(model, source, groups, n_loops, positions, kind, max_bytes, batch_size, per_file)
    folder = Path(to)
    open_folder(folder, manifest)
    with locked(folder, part):
        items = own(range(manifest.items), part)
        todo = [item for item in items if not file_of(folder, item, TOKENS).exists()]
        for item in tqdm(todo, desc="collecting", leave=False, disable=len(todo) < 8):
            job.write(folder, item, manifest)
    return ActivationStore(folder, partial=shard is not None)


def _joined(model: LoopedModel) -> str:
    """Why rows must be run together."""
    if not model.batch_independent:
        return "rows of this model depend on each other"
    return (
        "a hook that is attached now may tell rows apart (mark it with by_rows of"
        " loopscope.models.core.hooks where it does not)"
    )


@dataclass(frozen=True)
class _Job:
    """The work of one `collect`."""

    model: LoopedModel
    source: Source
    groups: list[Group]
    n_loops: int
    positions: Positions
    dtype: torch.dtype
    max_bytes: int
    batch_size: int
    per_file: int

    def write(self, folder: Path, item: int, manifest: Manifest) -> None:
        """Write the files of one range of examples; that of the tokens comes last, so that a range
        whose tokens are there is complete.
        """
        self._clear(folder, item)
        pieces = list(self._pieces(item))
        count = sum(int(piece.shown.sum()) for piece in pieces)
        with ExitStack() as stack:
            slabs = []
            for group in self.groups:
                path = file_of(folder, item, group.label)
                stack.enter_context(enough_disk(path))
                temporary = stack.enter_context(atomic_path(path))
                stack.callback(to_disk, temporary)
                file = stack.enter_context(temporary.open("wb"))
                shape = (len(group.loops), len(group.layers), count, *group.shape)
                slabs.append(Slab(file, shape, self.dtype, manifest))
            stack.enter_context(ungraphed(self.model))
            for piece in pieces:
                self._run(piece, slabs)
        write_tensors(file_of(folder, item, TOKENS), self._tokens(pieces), manifest)

    def _clear(self, folder: Path, item: int) -> None:
        """Remove what runs that were killed left of the files of one range of examples."""
        for label in (TOKENS, *(group.label for group in self.groups)):
            for left in folder.glob(f".{file_of(folder, item, label).name}.*"):
                left.unlink(missing_ok=True)

    def _run(self, piece: Piece, slabs: list[Slab]) -> None:
        """Run a piece and write what passes its hook points."""
        names = [name for group in self.groups for name in group.points]
        wanted = set(names)
        schedule = self.model.schedule(self.n_loops)
        last = max(
            (visit.index for visit in schedule if wanted & set(visit.hook_names())), default=-1
        )
        values = collecting.collect(
            self.model,
            piece.batch,
            names,
            self.n_loops,
            reduce=lambda value, name: begun_copy(piece.at_reads(value).to(self.dtype)),
            until=last + 1,
        ).values
        wait_for_copies(self.model.device)
        for group, slab in zip(self.groups, slabs, strict=True):
            for loop, row in enumerate(group.names):
                for layer, name in enumerate(row):
                    slab.write(loop, layer, piece.first, values.pop(name))

    def _pieces(self, item: int) -> Iterator[Piece]:
        """The examples of a file, cut so that no piece holds more than `max_bytes`."""
        first = item * self.per_file
        end, read = min(first + self.per_file, self.source.count), 0
        per_read = self.dtype.itemsize * sum(
            len(group.points) * torch.Size(group.shape).numel() for group in self.groups
        )
        for start in range(first, end, self.batch_size):
            batch = self.source.batches(range(start, min(start + self.batch_size, end)))
            columns, shown = reads_of(batch, self.positions)
            sizes = (shown.sum(1) * per_read).tolist()
            if not rows_apart(self.model) and sum(sizes) > self.max_bytes:
                raise ValueError(
                    f"{_joined(self.model)}, so max_bytes must hold the {sum(sizes)} bytes of all"
                    f" examples, got {self.max_bytes}"
                )
            for rows in cut(sizes, start, self.max_bytes):
                piece = Piece(batch[rows], columns[rows], shown[rows], read, start + rows.start)
                read += int(piece.shown.sum())
                yield piece

    def _tokens(self, pieces: list[Piece]) -> dict[str, Tensor]:
        """Token, example and position of every read."""
        found: dict[str, list[Tensor]] = {"tokens": [], "example": [], "position": []}
        for piece in pieces:
            row, k = piece.shown.nonzero(as_tuple=True)
            found["tokens"].append(piece.at_reads(piece.batch.tokens))
            found["example"].append(piece.example + row)
            found["position"].append(piece.columns[row, k])
        return {name: torch.cat(each).int().cpu() for name, each in found.items()}
