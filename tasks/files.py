"""Writing files and folders so that an error or a kill never leaves half of one."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary path that becomes `path` when the block ends, and vanishes if it fails."""
    path = Path(path).resolve()
    with _beside(path) as folder:
        yield folder / path.name
        os.replace(folder / path.name, path)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends, and vanishes if it fails.

    Raises:
        ValueError: `path` is there already and not an empty folder.
    """
    path = Path(path).resolve()
    refuse_unless_new(path)
    with _beside(path) as folder:
        inner = folder / path.name
        inner.mkdir()
        yield inner
        refuse_unless_new(path)
        os.replace(inner, path)


def refuse_unless_new(path: str | Path) -> None:
    """Check that `path` is free, or an empty folder.

    Raises:
        ValueError: It is a file, or a folder with something in it.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        kind = "a folder that is not empty" if path.is_dir() else "a file"
        raise ValueError(
            f"data are written into a new or empty folder, but {path} is {kind}; name another one"
        )


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    made = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not path.exists():
            for parent in made:
                with suppress(OSError):  # another process has put something there
                    parent.rmdir()
