"""Results of the work items of one call, kept in a folder.

The folder holds `manifest.json`, the tensors that all shards share (`common.safetensors`), and
parts: files with the results of some items. A part appears whole or not at all, and an item that is
there is never computed again. So a process may be killed at any time, and any division into shards
goes on where another one stopped.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loopscope.interp.shards.manifest import MANIFEST, Manifest
from loopscope.interp.shards.share import Shard, checked_shard, own
from loopscope.models.basis.files import atomic_path

_EVERY = 5.0  # seconds for which results may wait in memory
_COMMON = "common.safetensors"
Results = dict[str, Tensor]


class Work:
    """The work items of a call and their results in a folder.

    Args:
        folder: Made where it is absent.
        manifest: Of the call.
        shard: The share (i, n) of the items that this process does; None for all of them.

    Raises:
        ValueError: The folder belongs to another call, or holds other files and no manifest.
    """

    def __init__(
        self, folder: str | Path, manifest: Manifest, shard: Sequence[int] | None = None
    ) -> None:
        self.folder, self.manifest = Path(folder), manifest
        self.shard = checked_shard(shard)
        self._waiting: dict[int, Results] = {}
        self._written = time.monotonic()
        open_folder(self.folder, manifest)
        self._found = parts_in(self.folder)

    def missing(self) -> list[int]:
        """The items of this shard whose results are not there yet."""
        items = own(range(self.manifest.items), self.shard)
        return [item for item in items if item not in self._found]

    def has_common(self) -> bool:
        """Whether the tensors that all shards have in common are there."""
        return (self.folder / _COMMON).exists()

    def share(self, tensors: Results) -> None:
        """Write the tensors that all shards have in common, where they are not there yet."""
        if not self.has_common():
            write_tensors(self.folder / _COMMON, tensors, self.manifest)

    def add(self, item: int, results: Results) -> None:
        """Keep the results of an item; they are on disk within seconds, or after `flush`."""
        self._waiting[item] = {name: value.cpu() for name, value in results.items()}
        if time.monotonic() - self._written >= _EVERY:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        if self._waiting:
            items = sorted(self._waiting)
            known = hashlib.sha256(repr(items).encode()).hexdigest()[:8]
            path = self.folder / f"part-{items[0]:07d}-{known}.safetensors"
            tensors = {
                f"{item}.{name}": value
                for item, results in self._waiting.items()
                for name, value in results.items()
            }
            write_tensors(path, tensors, self.manifest)
            self._found |= dict.fromkeys(items, path)
            self._waiting = {}
        self._written = time.monotonic()

    def read(self, items: Sequence[int] | None = None) -> tuple[Results, list[Results]]:
        """The common tensors, and the results of some items in their order.

        Args:
            items: None means all of the call.

        Raises:
            ValueError: Items that are missing, or a file that was cut or changed.
        """
        wanted = range(self.manifest.items) if items is None else items
        self.refuse_missing(wanted)
        everything: dict[int, Results] = {}
        for path in dict.fromkeys(self._found[item] for item in wanted):
            for name, value in read_tensors(path, self.manifest).items():
                item, _, own_name = name.partition(".")
                everything.setdefault(int(item), {})[own_name] = value
        common = read_tensors(self.folder / _COMMON, self.manifest)
        return common, [everything[item] for item in wanted]

    def refuse_missing(self, wanted: Sequence[int]) -> None:
        """Raise where the results of some items are not there."""
        missing = [item for item in wanted if item not in self._found]
        if missing or not self.has_common():
            raise ValueError(
                f"{self.folder} is not complete: {len(missing)} of {self.manifest.items} work items"
                f" are missing, such as {missing[:3]}; run the same call into it again, with or"
                " without shard=, and only these are computed"
            )


@contextmanager
def locked(folder: Path, shard: Shard) -> Iterator[None]:
    """Inside the `with` block no other process writes this shard.

    Raises:
        ValueError: Another process writes it now.
    """
    with (folder / ".shard-{}-of-{}.lock".format(*shard)).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"shard {shard[0]}/{shard[1]} of {folder} is being written by another process; wait"
                " for it, or run another shard"
            ) from None
        except OSError:  # a file system without locks; two writers then write the same files
            pass
        yield


def open_folder(folder: Path, manifest: Manifest) -> None:
    """Write the manifest into a new folder, or check that the folder belongs to the same call."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"results are kept in a folder, but {folder} is a file; name another one")
    folder.mkdir(exist_ok=True)
    if not (folder / MANIFEST).exists():
        others = [path for path in folder.iterdir() if not path.name.startswith(".")]
        if others and others != [folder / MANIFEST]:
            raise ValueError(f"{folder} holds other files and no manifest; choose an empty folder")
        manifest.write(folder)
    found = Manifest.read(folder)
    if found.call != manifest.call:
        raise ValueError(
            f"{folder} holds the results of another call ({found.method}; what differs:"
            f" {', '.join(found.differences(manifest))}); choose another folder"
        )


def parts_in(folder: Path) -> dict[int, Path]:
    """The file in which the results of each item are."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("part-*.safetensors")):
        with opened(path) as file:
            names = list(file.keys())
        found |= {int(name.partition(".")[0]): path for name in names}
    return found


def write_tensors(path: Path, tensors: Results, manifest: Manifest) -> None:
    """Write tensors of a call, whole or not at all."""
    plain = {name: value.contiguous() for name, value in tensors.items()}
    with enough_disk(path), atomic_path(path) as temporary:
        save_file(plain, temporary, metadata={"call": manifest.call})
        to_disk(temporary)


def read_tensors(path: Path, manifest: Manifest) -> Results:
    """The tensors of a file of a call.

    Raises:
        ValueError: The file was cut, changed, or belongs to another call.
    """
    with opened(path) as file:
        if (file.metadata() or {}).get("call") != manifest.call:
            raise ValueError(
                f"{path} belongs to another call than the manifest beside it; remove the file and"
                " run its shard again"
            )
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # a safetensors file is no mapping


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A safetensors file, read onto the CPU; ValueError where it is cut or something else."""
    try:
        with torch.device("cpu"), safe_open(str(path), "pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(
            f"{path} is cut off or damaged ({error}); remove it and run its shard again"
        ) from None


def to_disk(path: Path) -> None:
    """Wait until a file's content is on the disk, so that a crash cannot leave an empty file under
    the final name.
    """
    with path.open("rb") as file:
        os.fsync(file.fileno())


@contextmanager
def enough_disk(path: Path) -> Iterator[None]:
    """Inside the `with` block an error of a full disk says what is kept and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if not full and "(os error 28)" not in str(error):
            raise
        raise OSError(
            errno.ENOSPC,
            "the disk is full; what was finished before is kept, so make room and run the same call"
            " again",
            str(path),
        ) from None


def on_device(results: Results, device: torch.device) -> Results:
    """Results, which may come from a file, on a device."""
    return {name: value.to(device) for name, value in results.items()}


def stacked(results: Sequence[Results], name: str, dim: int = 0) -> Tensor:
    """One tensor of all items, one item after the other."""
    return torch.cat([each[name] for each in results], dim)


def settings_of(given: Mapping[str, object]) -> dict[str, str]:
    """Arguments as a manifest holds them."""
    return {name: str(value) for name, value in given.items()}
