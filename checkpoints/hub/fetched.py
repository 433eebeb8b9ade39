"""A checkpoint by any name that `load` takes, among them public releases that have been fetched."""

from __future__ import annotations

from pathlib import Path

from loopscope.checkpoints.hub.drive import cache_home, holds_weights
from loopscope.checkpoints.hub.repository import in_cache, size_on_hub
from loopscope.checkpoints.locate import CheckpointFiles, locate, shipped_names
from loopscope.checkpoints.remote import RemoteRelease, find_release


def find(source: str | Path) -> CheckpointFiles:
    """A checkpoint's files.

    Args:
        source: A shipped name, a file, a folder, or the name of a public release that has been
            fetched ("Ouro-1.4B", or a repository's "owner/name").

    Raises:
        FileNotFoundError: None of these; for a known release the message says how to fetch it.
        CheckpointError: A folder with no checkpoint, or with several.
    """
    if str(source) in shipped_names() or Path(source).exists():
        return locate(source)
    try:
        release = find_release(str(source))
    except ValueError:
        return locate(source)
    folder = fetched(release)
    if folder is not None:
        return locate(folder)
    if release.family == "unknown":
        return locate(source)
    raise FileNotFoundError(
        f"{release.name!r} is a public release that is not on this machine;"
        f" loopscope.fetch({release.name!r}) or, on the command line, loopscope fetch"
        f" {release.name} brings it"
    )


def fetched(release: RemoteRelease) -> Path | None:
    """The folder of a release that `fetch` has brought to its usual place; None where it has
    not.
    """
    if not release.on_drive:
        return in_cache(release.at)
    folder = cache_home() / release.name
    return folder if holds_weights(folder) else None


def download_size(
    name: str, *, revision: str | None = None, folder: str | Path | None = None
) -> int | None:
    """The bytes that `fetch` would bring now, with the same arguments; None where that is unknown.

    Raises:
        ValueError, ConnectionError, PermissionError, FileNotFoundError: As in `fetch`.
    """
    release = find_release(name)
    return None if release.on_drive else size_on_hub(release.at, revision, folder)
