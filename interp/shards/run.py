"""Running a shard of a call's work items, in memory or into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from loopscope.interp.common.processes import n_ranks
from loopscope.interp.shards.manifest import MANIFEST, Manifest
from loopscope.interp.shards.share import Shard, checked_shard, own
from loopscope.interp.shards.work import Results, Work, locked

_INTO: ContextVar[tuple[Path, Shard | None] | None] = ContextVar("_INTO", default=None)
Compute = Callable[[list[int]], tuple[Results, Iterable[Results]]]


class ShardWritten(Exception):  # it ends a run that did what it was asked for
    """A call inside `into` wrote its shard, and other shards are still missing."""


@contextmanager
def into(folder: str | Path, shard: Shard | None = (0, 1)) -> Iterator[None]:
    """Inside the `with` block every call that has work items does its shard of them into a folder
    below `folder`, and goes on with the whole record once all shards are there.

    Args:
        shard: None computes nothing: all results must be there.

    Raises:
        ShardWritten: From a call whose other shards are missing.
        ValueError: Without a shard, from a call of which results are missing.
    """
    token = _INTO.set((Path(folder), None if shard is None else checked_shard(shard)))
    try:
        yield
    finally:
        _INTO.reset(token)


def in_pieces(save_to: str | Path | None, shard: Shard | None) -> bool:
    """Whether a call is done in work items, because it is a shard or its results are kept."""
    return save_to is not None or shard is not None or _INTO.get() is not None


def run_items(
    n_items: int,
    shard: Shard,
    compute: Compute,
    folder: str | Path | None,
    manifest: Callable[[], Manifest],
) -> tuple[list[int], Results, list[Results]]:
    """Do a shard of the work items of a call.

    Args:
        n_items: Of the call.
        compute: From some items to what all items have in common, and the results of each of them
            in their order. Results must not depend on which other items are asked for.
        folder: Where the results are kept, and taken from where they are there; None for nowhere.
        manifest: Of the call; made only where results are kept.

    Returns:
        The items of the shard, what all have in common, and the results of each of the items.

    Raises:
        ValueError: The folder belongs to another call, another process writes this shard, or
            several processes of `accelerate launch` would write it.
        ShardWritten: Inside `into`, where other shards are missing.
    """
    around = _INTO.get() if folder is None and shard == (0, 1) else None
    if (folder is not None or around is not None) and n_ranks() > 1:
        raise ValueError(
            "results are kept by one process, but `accelerate launch` started several, which share"
            " theirs in memory only; start processes of their own with shard=(i, n)"
        )
    if around is not None:
        return _run_into(n_items, compute, manifest(), *around)
    items = own(range(n_items), shard)
    if folder is None:
        common, found = compute(items)
        return items, common, list(found)
    work = _done(Work(folder, manifest(), shard), compute)
    return items, *work.read(items)


def _done(work: Work, compute: Compute) -> Work:
    """The work after all missing items of its shard are computed and written."""
    with locked(work.folder, work.shard):
        missing = work.missing()
        if missing or not work.has_common():
            common, found = compute(missing)
            work.share(common)
            for item, results in zip(missing, found, strict=True):
                work.add(item, results)
            work.flush()
    return work


def _run_into(
    n_items: int, compute: Compute, manifest: Manifest, folder: Path, shard: Shard | None
) -> tuple[list[int], Results, list[Results]]:
    """As `run_items`, for a shard that goes on with the whole record where that is complete."""
    here = folder / f"{manifest.method}-{manifest.call[:12]}"
    if shard is not None:
        _done(Work(here, manifest, shard), compute)
    elif not (here / MANIFEST).exists():
        raise ValueError(
            f"{folder} holds no results of this {manifest.method}; its shards must write theirs"
            " before they are merged"
        )
    work = Work(here, manifest)
    missing = len(work.missing())
    if missing and shard is not None:
        raise ShardWritten(
            f"wrote shard {shard[0]}/{shard[1]} of {manifest.method} into {here}; {missing} of"
            f" {n_items} work items are still missing"
        )
    return list(range(n_items)), *work.read()
