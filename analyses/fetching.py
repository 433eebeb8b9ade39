"""The command that fetches a release."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Fetch:
    """Bring a public release onto this machine, after saying how large it is."""

    name: Annotated[str, tyro.conf.Positional]
    """A name that `loopscope list` shows, or a repository "owner/name" on Hugging Face."""
    revision: str | None = None
    """A branch, tag or commit of the repository."""
    folder: Path | None = None
    """Where to keep it, in place of the cache in which every command finds it by its name."""


def run(command: Fetch) -> None:
    """Print the size before anything is brought, fetch the release, and print its folder."""
    where = {"revision": command.revision, "folder": command.folder}
    size = import_module("loopscope.checkpoints.hub.fetched").download_size(command.name, **where)
    what = "of unknown size" if size is None else f"{size / 1e9:.3g} GB to download ({size} bytes)"
    print(f"{command.name}: {what}", flush=True)
    fetch = import_module("loopscope.checkpoints.download").fetch
    print(f"It is in {fetch(command.name, **where)}")
