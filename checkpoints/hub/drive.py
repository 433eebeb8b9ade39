"""Runs in the Google Drive folder of arXiv 2604.07822: bringing them here."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NoReturn

from loopscope.checkpoints.hub.repository import is_broken_connection, unreachable
from loopscope.checkpoints.remote import DRIVE_FOLDER

_DRIVE_TIMEOUT, _DRIVE_RETRIES = 60.0, 3


def cache_home() -> Path:
    """The folder for releases from Google Drive; the XDG rules ignore a relative cache folder."""
    if os.environ.get("LOOPSCOPE_HOME"):
        return Path(os.environ["LOOPSCOPE_HOME"]).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (cache if cache.is_absolute() else Path.home() / ".cache") / "loopscope"


def from_drive(name: str, home: Path) -> Path:
    """The folder of one run. A hidden draft beside the folder takes its place when whole; a killed
    process leaves the draft.
    """
    from loopscope.models.basis.files import usual_mode  # late, because it brings torch

    target = home / name
    if holds_weights(target):
        return target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists and holds no .pt file; remove it, or choose another place with"
            " folder="
        )
    made = [parent for parent in target.parents if not parent.exists()]
    draft = None
    try:
        files = _drive_files(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        usual_mode(draft)
        _download_from_drive(files, draft)
        if not holds_weights(target):  # another process may have been faster
            draft.replace(target)
    finally:
        if draft is not None:
            shutil.rmtree(draft, ignore_errors=True)
        if not target.exists():
            _remove_empty(made)
    return target


def holds_weights(folder: Path) -> bool:
    """Whether the pickles of a run lie in a folder."""
    return any(path.is_file() for path in folder.glob("*.pt"))


def _remove_empty(made: Sequence[Path]) -> None:
    for parent in made:
        if parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def _drive_files(name: str) -> dict[PurePosixPath, str]:
    """The Drive id of each file of a run, by its path in the run's folder.

    Raises:
        FileNotFoundError: The Drive folder has no such run.
        ConnectionError: The Drive folder could not be listed.
    """
    import gdown

    try:
        listed = gdown.download_folder(
            DRIVE_FOLDER, quiet=True, skip_download=True, timeout=_DRIVE_TIMEOUT
        )
    except Exception as error:
        _raise_from_drive(error)
    wanted, found, folders = PurePosixPath(name).parts, {}, set()
    for entry in listed:
        assert not isinstance(entry, str), "a listing without a download has no local paths"
        parts = PurePosixPath(entry.path.replace(os.sep, "/")).parts
        folders.add("/".join(parts[:-1]))
        starts = [
            i for i in range(len(parts) - len(wanted)) if parts[i : i + len(wanted)] == wanted
        ]
        if starts:
            found[PurePosixPath(*parts[starts[0] + len(wanted) :])] = entry.id
    if not any(path.suffix == ".pt" and len(path.parts) == 1 for path in found):
        there = ", ".join(sorted(folders)[:20]) or "nothing"
        raise FileNotFoundError(
            f"{DRIVE_FOLDER} has no folder {name!r} with .pt files; it has {there}"
        )
    return found


def _download_from_drive(files: dict[PurePosixPath, str], draft: Path) -> None:
    import gdown

    for path, identity in files.items():
        local = draft / path
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            gdown.download(
                id=identity, output=str(local), timeout=_DRIVE_TIMEOUT, retries=_DRIVE_RETRIES
            )
        except Exception as error:
            _raise_from_drive(error)


def _raise_from_drive(error: Exception) -> NoReturn:
    import gdown

    if isinstance(error, gdown.DownloadError) or is_broken_connection(error):
        raise unreachable(
            error, DRIVE_FOLDER, "the network, and in a browser whether the folder is still public"
        ) from error
    raise error
