"""Bringing public releases onto this machine: from the Hugging Face hub, or from the Google Drive
folder of arXiv 2604.07822.
"""

from __future__ import annotations

from pathlib import Path

from loopscope.checkpoints.hub.drive import cache_home, from_drive
from loopscope.checkpoints.hub.repository import from_hub
from loopscope.checkpoints.remote import find_release


def fetch(name: str, *, revision: str | None = None, folder: str | Path | None = None) -> Path:
    """Download a public release for `load`, unless it is on this machine already.

    From the Hugging Face hub it takes configs, tokenizer files and safetensors, and pickles only if
    a repository has no safetensors. The release of arXiv 2604.07822 is on Google Drive; that
    download has not been tried against the real folder. The folder is returned only when every file
    in it is complete.

    Args:
        name: A name that `available()` lists, or the id of a Hugging Face repository, "owner/name".
        revision: A branch, tag or commit of the Hugging Face repository; None means its main
            branch.
        folder: Where downloads are kept. None means the hub's own cache, or for Google Drive
            $LOOPSCOPE_HOME or else the folder loopscope in $XDG_CACHE_HOME or ~/.cache.

    Returns:
        The folder of the release, to be given to `load`. If the folder holds several pickles, one
        per training stage, `load` asks for the path of one of them.

    Raises:
        ValueError: No release has the name (the message lists the nearest names), or `revision` is
            given for a release on Google Drive.
        FileNotFoundError: The repository, the revision or the run does not exist, or holds no
            weights.
        PermissionError: The repository is not open to everyone.
        ConnectionError: There is no network, or the connection broke off; partial files are
            removed.
        FileExistsError: The folder for a release on Google Drive already holds something else.
    """
    release = find_release(name)
    if not release.on_drive:
        return from_hub(release.at, revision, folder)
    if revision is not None:
        raise ValueError(
            f"{name!r} lies on Google Drive, which has no revisions, got revision={revision!r};"
            " leave it out"
        )
    return from_drive(name, cache_home() if folder is None else Path(folder).expanduser())
