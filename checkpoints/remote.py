"""The known public releases: which there are, of which family, and where they lie."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

DRIVE_FOLDER = "https://drive.google.com/drive/folders/1AQvp8erdtRRn9_ix7E1ssmyWarwFNLVU"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REPOSITORIES = (
    ("ouro", "ByteDance/Ouro-1.4B", "24 layers, 4 iterations, exit gate"),
    ("ouro", "ByteDance/Ouro-1.4B-Thinking", "24 layers, 4 iterations, exit gate"),
    ("ouro", "ByteDance/Ouro-2.6B", "48 layers, 4 iterations, exit gate"),
    ("ouro", "ByteDance/Ouro-2.6B-Thinking", "48 layers, 4 iterations, exit gate"),
    ("huginn", "tomg-group-umd/huginn-0125", "3.5 B parameters; prelude 2, core 4, coda 2"),
    ("hrm_text", "sapientinc/HRM-Text-1B", "two stacks of 16 layers in nested cycles"),
    ("nanbeige", "Nanbeige/Nanbeige4.2-3B", "22 layers, 2 iterations"),
    ("parcae", "SandyResearch/parcae-140m", "pickled weights; prelude 2, core 2, coda 2"),
    ("parcae", "SandyResearch/parcae-370m", "pickled weights; prelude 4, core 4, coda 4"),
    ("parcae", "SandyResearch/parcae-770m", "pickled weights; prelude 6, core 6, coda 6"),
    ("parcae", "SandyResearch/parcae-1.3b", "pickled weights; prelude 8, core 8, coda 8"),
    ("albert", "albert/albert-base-v2", "one layer, 12 iterations; reads in both directions"),
    ("albert", "albert/albert-large-v2", "one layer iterated; reads in both directions"),
    ("albert", "albert/albert-xlarge-v2", "one layer iterated; reads in both directions"),
    ("albert", "albert/albert-xxlarge-v2", "one layer iterated; reads in both directions"),
    (
        "smollm",
        "akhljndl/smollm",
        "pickled weights; one layer, 8 iterations; several models and seeds in one repository",
    ),
)
_RUNS = (
    *(f"multi_hop/final_models/{run}" for run in (*(f"r{r}" for r in range(1, 9)), "r_dyn")),
    "multi_hop/12_hop/r<X>",
    "systematicity/r<X>_l<Y>",
)


@dataclass(frozen=True)
class RemoteRelease:
    """One public release.

    Attributes:
        name: What `fetch` takes; <X> and <Y> stand for what a run's folder is called.
        family: The family's registered name, or "unknown".
        at: A Hugging Face repository id "owner/name", or the address of a Google Drive folder.
        note: What helps to choose it.
    """

    name: str
    family: str
    at: str
    note: str = ""

    @property
    def on_drive(self) -> bool:
        """Whether it lies in a Google Drive folder and not on the Hugging Face hub."""
        return self.at.startswith("https://")


def remote_releases() -> tuple[RemoteRelease, ...]:
    """The known releases, whose names are unique without regard to case.

    Source: the model cards of the families; arXiv 2604.07822 for the runs on Google Drive.
    """
    hub = tuple(
        RemoteRelease(at.partition("/")[2], family, at, note) for family, at, note in _REPOSITORIES
    )
    return hub + tuple(
        RemoteRelease(
            run, "recurrent_depth", DRIVE_FOLDER, "a folder of pickles, about 342 MB each"
        )
        for run in _RUNS
    )


def find_release(name: str) -> RemoteRelease:
    """The release of this name, or of this Hugging Face repository id, known or not.

    Args:
        name: A known name ("Ouro-1.4B", in any case), a run ("multi_hop/final_models/r_dyn"), or
            "owner/name".

    Raises:
        ValueError: None of these; the message gives the nearest known names.
    """
    known = remote_releases()
    for release in known:
        if not release.on_drive and name.casefold() in (
            release.name.casefold(),
            release.at.casefold(),
        ):
            return release
        if release.on_drive and re.fullmatch(re.sub("<[XY]>", "[A-Za-z0-9_]+", release.name), name):
            return RemoteRelease(name, release.family, release.at, release.note)
    _refuse_shipped(name)
    if _REPOSITORY.fullmatch(name) and not name.startswith(("multi_hop/", "systematicity/")):
        return RemoteRelease(name, "unknown", name)
    by_spelling = {
        spelling.casefold(): release.name
        for release in known
        for spelling in (release.at, release.name)
    }
    nearest = dict.fromkeys(
        by_spelling[match]
        for match in difflib.get_close_matches(name.casefold(), by_spelling, n=4, cutoff=0.4)
    )
    raise ValueError(
        f"{name!r} is no known release (nearest: {', '.join(list(nearest)[:3]) or 'none'}); name"
        " one that loopscope.available() lists, or any Hugging Face repository as 'owner/name'"
    )


def _refuse_shipped(name: str) -> None:
    from loopscope.checkpoints.locate import shipped_names  # late, because it brings torch

    if name in shipped_names():
        raise ValueError(
            f"{name!r} is shipped with loopscope, so there is nothing to fetch;"
            f" loopscope.load({name!r}) takes it as it is"
        )
