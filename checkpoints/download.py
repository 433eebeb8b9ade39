"""Bringing public releases onto this machine: from the Hugging Face hub, or from the Google Drive
folder of arXiv 2604.07822.
"""

from __future__ import annotations

from pathlib import Path

from loopscope.checkpoints.hub.drive import cache_home, from_drive
from loopscope.checkpoints.hub.repository import from_hub
from loopscope.checkpoints.remote import find_release


def fetch(name: str, *, revision: str | None = None, folder: str | Path | None = None) -> Path:
    """Bring a public release onto this machine, unless it is there already.

    From the hub come configs, tokenizer files and safetensors; pickles only where a repository has
    no safetensors. A folder is returned only when everything in it is whole. The folder that is
    returned can be given to `load`. Where the folder holds several pickles (one per training
    stage), `load` asks for one of the files. The download from Google Drive has not been tried
    against the real folder.

    Args:
        name: A name that `available()` lists, or a Hugging Face repository id "owner/name".
        revision: A branch, tag or commit of a Hugging Face repository; None means the main branch.
        folder: Where downloads are kept, in place of the hub's own cache or, for Google Drive, of
            $LOOPSCOPE_HOME or loopscope in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        ValueError: No such name, with the nearest ones; or a revision of a release on Google Drive.
        FileNotFoundError: No such repository, revision or run, or one without weights.
        PermissionError: A repository that is not open to everyone.
        ConnectionError: No network, or a connection that broke off; half a file is removed.
        FileExistsError: A folder with other content where a release on Google Drive would go.
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
