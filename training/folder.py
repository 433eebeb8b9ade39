"""The folder of a run: one process at a time writes there, and drafts of killed ones go."""

from __future__ import annotations

import atexit
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import IO

from loopscope.training.recipes import Recipe

_LOCK = "run.lock"
_HELD: dict[Path, IO[str]] = {}  # kept open, so that the system frees a lock when its process ends


def claim(folder: Path, names: Iterable[str]) -> None:
    """Take a run's folder for this process, and remove the drafts that a killed process left there.

    Args:
        folder: The folder of the run; it is made where it is absent.
        names: The files and folders that a run writes as hidden drafts beside their place.

    Raises:
        ValueError: Another process writes to the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.resolve()
    if place not in _HELD or not (place / _LOCK).exists():
        _HELD[place] = _locked(place)
    for name in names:
        path = folder / name
        for draft in path.parent.glob(f".{path.name}.*"):
            shutil.rmtree(draft) if draft.is_dir() else draft.unlink()


@atexit.register
def _release() -> None:
    for file in _HELD.values():
        file.close()


def refuse_unless_resumed(state: Path, resume: bool) -> None:
    """Refuse to begin a run where a saved state lies.

    Raises:
        ValueError: The state is there, and the run does not go on from it.
    """
    if state.exists() and not resume:
        raise ValueError(
            f"{state.parent} holds a run already; pass --resume to go on with it, or choose another"
            " folder"
        )


def _locked(place: Path) -> IO[str]:
    file = (place / _LOCK).open("a+")
    with suppress(ImportError):  # a system without such locks takes none
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            owner = file.read() or "unknown"
            file.close()
            raise ValueError(
                f"another process (number {owner}) writes to {place}; wait until it ends, or choose"
                " another folder"
            ) from None
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    return file


def drafts_of(recipe: Recipe) -> list[str]:
    """The files and folders that a run of a recipe writes, as `claim` takes them."""
    stages = [stage.name for stage in recipe.stages]
    released = [f"released/{name}/checkpoint_epoch_*" for name in stages]
    return ["state.pt", "log.jsonl", *stages, *released]
