"""One record of all shards of a call."""

from __future__ import annotations

from pathlib import Path

from loopscope.interp.patching.kept import kept_sweep
from loopscope.interp.patching.sweep import Sweep
from loopscope.interp.shards.manifest import Manifest
from loopscope.interp.shards.work import Work
from loopscope.interp.store.reading import ActivationStore


def merge(folder: str | Path) -> Sweep | ActivationStore:
    """Make the record of a whole call from the folder that its shards wrote.

    The record is the one that the undivided call returns, to the last bit on machines that compute
    alike.

    Args:
        folder: The `save_to=` of a sweep, or the `to=` of `collect`.

    Raises:
        FileNotFoundError: The folder holds no results.
        ValueError: Work items are missing, or a file is cut off.
    """
    manifest = Manifest.read(Path(folder))
    if manifest.method == "collect":
        return ActivationStore(folder)
    return kept_sweep(manifest, *Work(folder, manifest).read())
