"""Which checkpoints there are: those that are shipped, and the known public releases."""

from __future__ import annotations

import pandas as pd

from loopscope.checkpoints.load import read_family
from loopscope.checkpoints.locate import locate, shipped_names
from loopscope.checkpoints.remote import remote_releases

_UNKNOWN = "unknown"
_KNOWN_EPOCHS = {"r2": "2765", "r6": "1015", "r7": "1050", "r8": "1259", "r_dyn": "5388"}
_UNRELEASED = {"hyperloop": "arXiv 2604.21254", "melt": "arXiv 2605.07721"}


def available() -> pd.DataFrame:
    """The checkpoints that `load` knows by name, the public releases that `fetch` brings, and the
    families without any.

    Returns:
        One row each: name, family, size (bytes, or "unknown"), where ("shipped", "remote", or
        "unreleased" for a family of which nobody has published weights or code), at (a folder or an
        address), epoch and sha256 ("unknown" where nobody has published them).
    """
    rows = []
    for name in shipped_names():
        files = locate(name)
        family = read_family(name)
        rows.append(
            (
                name,
                family,
                str(files.weights.stat().st_size),
                "shipped",
                str(files.weights.parent),
                _UNKNOWN,
            )
        )
    for release in remote_releases():
        at = release.at if release.on_drive else f"https://huggingface.co/{release.at}"
        epoch = _KNOWN_EPOCHS.get(release.name.removeprefix("multi_hop/final_models/"), _UNKNOWN)
        rows.append((release.name, release.family, _UNKNOWN, "remote", at, epoch))
    rows += [
        (family, family, _UNKNOWN, "unreleased", paper, _UNKNOWN)
        for family, paper in _UNRELEASED.items()
    ]
    return pd.DataFrame(
        [(*row, _UNKNOWN) for row in rows],
        columns=["name", "family", "size", "where", "at", "epoch", "sha256"],
    )
