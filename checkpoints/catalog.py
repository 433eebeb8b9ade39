"""Which checkpoints there are: those that are shipped, and the known public releases."""

from __future__ import annotations

import pandas as pd

from checkpoints.load import read_family
from checkpoints.locate import locate, shipped_names

RELEASES_AT = "https://drive.google.com/drive/folders/1AQvp8erdtRRn9_ix7E1ssmyWarwFNLVU"
_UNKNOWN = "unknown"
_KNOWN_EPOCHS = {"r2": "2765", "r6": "1015", "r7": "1050", "r8": "1259", "r_dyn": "5388"}


def available() -> pd.DataFrame:
    """The checkpoints that `load` knows by name, and the public releases of arXiv 2604.07822.

    Returns:
        One row each: name, family, size (bytes, or "unknown"), where ("shipped" or "remote"), at (a folder or an address),
        epoch and sha256 ("unknown" where nobody has published them).
    """
    rows = []
    for name in shipped_names():
        files = locate(name)
        family = read_family(name)
        rows.append((name, family, str(files.weights.stat().st_size), "shipped", str(files.weights.parent), _UNKNOWN, _UNKNOWN))
    runs = [f"r{r}" for r in range(1, 9)] + ["r_dyn"]
    released = {f"multi_hop/final_models/{run}": _KNOWN_EPOCHS.get(run, _UNKNOWN) for run in runs}
    released.update({"multi_hop/12_hop/r<X>": _UNKNOWN, "systematicity/r<X>_l<Y>": _UNKNOWN})
    rows += [(name, "recurrent_depth", _UNKNOWN, "remote", RELEASES_AT, epoch, _UNKNOWN) for name, epoch in released.items()]
    return pd.DataFrame(rows, columns=["name", "family", "size", "where", "at", "epoch", "sha256"])
