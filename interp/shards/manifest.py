"""To which call the results in a folder belong."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_FORMAT = "loopscope work 1"
_VERSIONS = ("loopscope", "torch", "transformer-lens")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that decides the results of a call.

    Attributes:
        method: The public call, such as "activation_patch".
        weights: A hash of the model (`facts_of_model`).
        inputs: A hash of the inputs.
        settings: The call's other arguments, each as text or as a hash.
        items: How many work items the call has.
        about: What a reader needs to make the record; it follows from the fields above.
        versions: Of the libraries that compute.
    """

    method: str
    weights: str
    inputs: str
    settings: Mapping[str, str]
    items: int
    about: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=lambda: _installed())

    @cached_property
    def call(self) -> str:
        """A hash of the whole call."""
        decisive = {key: value for key, value in self._content().items() if key != "about"}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self)}

    def write(self, folder: Path) -> None:
        """Write the manifest, whole or not at all, unless another process was faster."""
        content = {"format": _FORMAT, "call": self.call, **self._content()}
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as drafts:
            draft = Path(drafts, MANIFEST)
            draft.write_text(json.dumps(content, indent=1) + "\n")
            try:
                os.link(draft, folder / MANIFEST)
            except FileExistsError:
                return
            except OSError:  # a file system without links
                os.replace(draft, folder / MANIFEST)

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            FileNotFoundError: The folder has no manifest.
            ValueError: The file is no manifest, or was changed.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(
                f"{folder} has no {MANIFEST}, so it holds no results of a shard; name the folder"
                " that was given to the shards"
            )
        try:
            content = json.loads(path.read_text())
            found = cls(**{each.name: content[each.name] for each in fields(cls)})
            known = content["format"] == _FORMAT and content["call"] == found.call
        except (ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise ValueError(
                f"{path} is no manifest of this version of loopscope, or was changed; run the"
                " shards into another folder"
            )
        return found

    def differences(self, other: Manifest) -> list[str]:
        """The names of what differs between two calls."""
        names = [
            each.name
            for each in fields(self)
            if each.name not in ("settings", "about")
            and getattr(self, each.name) != getattr(other, each.name)
        ]
        settings = {**self.settings, **other.settings}
        return names + [
            name for name in settings if self.settings.get(name) != other.settings.get(name)
        ]


def _installed() -> dict[str, str]:
    """The versions of the libraries that compute; a checkout that is not installed has none."""
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
