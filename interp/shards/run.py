"""Running a shard of a call's work items, in memory or into a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from loopscope.interp.common.processes import n_ranks
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.share import Shard, own
from loopscope.interp.shards.work import Results, Work, locked

Compute = Callable[[list[int]], tuple[Results, Iterable[Results]]]


def run_items(
    n_items: int,
    shard: Shard,
    compute: Compute,
    folder: str | Path | None = None,
    manifest: Callable[[], Manifest] | None = None,
) -> tuple[list[int], Results, list[Results]]:
    """Do a shard of the work items of a call.

    Args:
        n_items: Of the call.
        compute: From some items to what all items have in common, and the results of each of them
            in their order. Results must not depend on which other items are asked for.
        folder: Where the results are kept, and taken from where they are there; None for nowhere.
        manifest: Of the call, with a folder.

    Returns:
        The items of the shard, what all have in common, and the results of each of the items.

    Raises:
        ValueError: The folder belongs to another call, another process writes this shard, or
            several processes of `accelerate launch` would write it.
    """
    items = own(range(n_items), shard)
    if folder is None or manifest is None:
        common, found = compute(items)
        return items, common, list(found)
    if n_ranks() > 1:
        raise ValueError(
            "save_to is for one process, but `accelerate launch` started several, which share their"
            " results in memory only; start processes of their own with shard=(i, n)"
        )
    work = Work(folder, manifest(), shard)
    with locked(work.folder, shard):
        missing = work.missing()
        if missing or not work.has_common():
            common, found = compute(missing)
            work.share(common)
            for item, results in zip(missing, found, strict=True):
                work.add(item, results)
            work.flush()
    return items, *work.read(items)
