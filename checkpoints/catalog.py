"""Which checkpoints there are: those that are shipped, and the known public releases."""

from __future__ import annotations

import re
import sys

import pandas as pd

from loopscope.checkpoints.load import read_family
from loopscope.checkpoints.locate import locate, shipped_names
from loopscope.checkpoints.remote import remote_releases
from loopscope.checkpoints.tables import TABLES
from loopscope.models.core.registry import FAMILIES

_UNKNOWN = "unknown"
_COLUMNS = ("name", "family", "size", "where", "at", "epoch", "sha256")


def available() -> pd.DataFrame:
    """List the checkpoints that can be loaded by name: those that this package ships, and the
    public releases that `fetch` downloads.

    Families of which nobody has published weights are listed too.

    Returns:
        A table with one row per checkpoint or unreleased family. Its columns are name, family, size
        (bytes, or "unknown"), where ("shipped", "remote" for a release to fetch, "unreleased"), at
        (a folder or an address), epoch and sha256 (the hash of the file). A fact that nobody has
        published is "unknown".
    """
    rows = [*_shipped(), *_remote(), *_unreleased()]
    return pd.DataFrame([{"epoch": _UNKNOWN, "sha256": _UNKNOWN, **row} for row in rows])[
        list(_COLUMNS)
    ]


def _shipped() -> list[dict[str, str]]:
    located = {name: locate(name) for name in shipped_names()}
    return [
        {
            "name": name,
            "family": read_family(name),
            "size": str(files.weights.stat().st_size),
            "where": "shipped",
            "at": str(files.weights.parent),
        }
        for name, files in located.items()
    ]


def _remote() -> list[dict[str, str]]:
    return [
        {
            "name": release.name,
            "family": release.family,
            "size": _UNKNOWN,
            "where": "remote",
            "at": release.at if release.on_drive else f"https://huggingface.co/{release.at}",
            "epoch": release.epoch or _UNKNOWN,
        }
        for release in remote_releases()
    ]


def _unreleased() -> list[dict[str, str]]:
    """The families that no table reads and of which no release is known, each with its paper."""
    known = {table.family for table in TABLES} | {each.family for each in remote_releases()}
    return [
        {
            "name": family,
            "family": family,
            "size": _UNKNOWN,
            "where": "unreleased",
            "at": _paper(family),
        }
        for family in sorted(set(FAMILIES) - known)
    ]


def _paper(family: str) -> str:
    """The paper that the family's module names first."""
    about = sys.modules[FAMILIES[family][1].__module__].__doc__ or ""
    found = re.search(r"arXiv\s+\d{4}\.\d{5}", about)
    return " ".join(found.group().split()) if found else _UNKNOWN
