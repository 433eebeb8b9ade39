"""The states of probes in pieces: shared among processes, and kept in one folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jaxtyping import Int
from torch import Tensor

from loopscope.interp.common.fingerprint import described, facts_of_inputs, facts_of_model
from loopscope.interp.probes.states import ReadStates, Side, States
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.run import in_pieces, run_items
from loopscope.interp.shards.share import Shard, checked_shard
from loopscope.interp.shards.work import Results, settings_of

_Record = TypeVar("_Record", covariant=True)


class Fit(Protocol[_Record]):
    """A fit on states: all but the states themselves."""

    def about(self) -> dict[str, Any]:
        """The fit without its tensors, as JSON."""

    def tensors(self) -> Results:
        """The tensors of the fit."""

    def of(self, train: Side, test: Side) -> _Record:
        """Fit on one side, and score on the other."""

    def of_shard(self, train: Int[Tensor, " read"], test: Int[Tensor, " held_out"]) -> _Record:
        """The record of a shard, which fits nothing."""


@dataclass(frozen=True)
class StatesJob:
    """The states of the rows of a probe, some rows at a time.

    Attributes:
        method: The public call.
        train, test: The rows that are fitted, and held out.
        save_to, shard: As for `probe`.
    """

    method: str
    states: ReadStates
    train: Int[Tensor, " train"]
    test: Int[Tensor, " test"]
    save_to: str | Path | None
    shard: Shard | None

    def record(self, fit: Fit[_Record], settings: Mapping[str, object]) -> _Record:
        """Read the states, and fit on them where they are not those of a shard.

        Args:
            settings: The arguments that change results, besides those in the states and the fit.

        Raises:
            ValueError: A shard without a folder, or what `run_items` raises.
        """
        if self.shard is not None and self.save_to is None:
            raise ValueError(
                f"a shard of {self.method} keeps states, on which the probes are fitted when all"
                " shards are there; pass save_to=, the folder in which they meet"
            )
        states, train, test = self.states, self.train, self.test
        reads = states.reads(train), states.reads(test)
        if not in_pieces(self.save_to, self.shard):
            return fit.of(Side(reads[0], states.chunks(train)), Side(reads[1], states.chunks(test)))
        pieces = [*states.pieces(train), *states.pieces(test)]

        def compute(items: list[int]) -> tuple[Results, Iterator[Results]]:
            common = {**fit.tensors(), "train": reads[0], "test": reads[1]}
            return common, (self._piece(pieces[item]) for item in items)

        manifest = self._manifest(fit, settings, len(pieces))
        part = checked_shard(self.shard)
        _, common, found = run_items(len(pieces), part, compute, self.save_to, lambda: manifest)
        if part[1] > 1:
            return fit.of_shard(*reads)
        return fit.of(*kept_sides(manifest, common, found))

    def _piece(self, rows: Int[Tensor, " row"]) -> Results:
        states = self.states.run(rows)
        by_place = {f"states {i}": states[name] for i, name in enumerate(self.states.names)}
        return {"reads": self.states.reads(rows), **by_place}

    def _manifest(self, fit: Fit[object], settings: Mapping[str, object], count: int) -> Manifest:
        states, about = self.states, fit.about()
        facts = {
            **about,
            **settings,
            "places": described(states.names),
            "positions": described((states.columns, states.shown)),
            "targets": described(fit.tensors()),
            "held_out": described((self.train, self.test)),
            "n_loops": states.n_loops,
            "batch_size": states.batch_size,
        }
        fitted = len(states.pieces(self.train))
        return Manifest(
            method=self.method,
            weights=described(facts_of_model(states.model)),
            inputs=described(facts_of_inputs([states.batch])),
            settings=settings_of(facts),
            items=count,
            about={**about, "names": list(states.names), "fitted": fitted},
        )


def kept_sides(manifest: Manifest, common: Results, found: Sequence[Results]) -> tuple[Side, Side]:
    """The rows that are fitted and those that are held out, from what a folder holds.

    The states stay in the files, which are read piece by piece.
    """
    names, fitted = manifest.about["names"], manifest.about["fitted"]

    def pieces(part: Sequence[Results]) -> Iterator[tuple[Int[Tensor, " read"], States]]:
        for each in part:  # copied, since how a product is rounded may depend on the alignment
            yield each["reads"], {name: each[f"states {i}"].clone() for i, name in enumerate(names)}

    return Side(common["train"], pieces(found[:fitted])), Side(
        common["test"], pieces(found[fitted:])
    )
