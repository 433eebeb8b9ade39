"""The known public releases: which there are, of which family, and where they lie."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace

DRIVE_FOLDER = "https://drive.google.com/drive/folders/1AQvp8erdtRRn9_ix7E1ssmyWarwFNLVU"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_KNOWN_EPOCHS = {"r2": "2765", "r6": "1015", "r7": "1050", "r8": "1259", "r_dyn": "5388"}
_FINAL = "multi_hop/final_models/"
_RUNS = (
    *(f"{_FINAL}{run}" for run in (*(f"r{r}" for r in range(1, 9)), "r_dyn")),
    "multi_hop/12_hop/r<X>",
    "systematicity/r<X>_l<Y>",
)


@dataclass(frozen=True)
class RemoteRelease:
    """One public release.

    Attributes:
        name: The name that `fetch` takes; <X> and <Y> stand for the numbers in a run's folder name.
        family: The family's registered name, or "unknown".
        at: A Hugging Face repository id "owner/name", or the address of a Google Drive folder.
        note: A few words that help to choose.
        epoch: The epoch whose checkpoint was released, where it was published.
    """

    name: str
    family: str
    at: str
    note: str = ""
    epoch: str | None = None

    @property
    def on_drive(self) -> bool:
        """Whether the release lies in a Google Drive folder and not on the Hugging Face hub."""
        return self.at.startswith("https://")


def remote_releases() -> tuple[RemoteRelease, ...]:
    """The known releases, whose names are unique without regard to case.

    Source: the model cards of the families; arXiv 2604.07822 for the runs on Google Drive.
    """
    from loopscope.checkpoints.tables import TABLES  # late, because the tables bring torch

    hub = tuple(
        RemoteRelease(at.partition("/")[2], table.family, at, note)
        for table in TABLES
        for at, note in table.releases
    )
    about = "a folder of pickles, about 342 MB each"
    return hub + tuple(
        RemoteRelease(
            run,
            "recurrent_depth",
            DRIVE_FOLDER,
            about,
            _KNOWN_EPOCHS.get(run.removeprefix(_FINAL)),
        )
        for run in _RUNS
    )


def find_release(name: str) -> RemoteRelease:
    """The release of a name, or of a Hugging Face repository id, which need not be known.

    Args:
        name: A known name ("Ouro-1.4B", in any case), a run ("multi_hop/12_hop/r_dyn"), or an id.

    Raises:
        ValueError: None of these; the message gives the nearest known names.
    """
    for release in remote_releases():
        if not release.on_drive and name.casefold() in (
            release.name.casefold(),
            release.at.casefold(),
        ):
            return release
        if release.on_drive and re.fullmatch(re.sub("<[XY]>", "[A-Za-z0-9_]+", release.name), name):
            return replace(release, name=name)
    _refuse_shipped(name)
    if _REPOSITORY.fullmatch(name) and not name.startswith(("multi_hop/", "systematicity/")):
        return RemoteRelease(name, "unknown", name)
    raise ValueError(
        f"{name!r} is no known release (nearest: {', '.join(_nearest(name)) or 'none'}); name one"
        " that loopscope.available() lists, or any Hugging Face repository as 'owner/name'"
    )


def _nearest(name: str) -> list[str]:
    """At most three known names that are spelled like a name or a repository id."""
    by_spelling = {
        spelling.casefold(): release.name
        for release in remote_releases()
        for spelling in (release.at, release.name)
    }
    matches = difflib.get_close_matches(name.casefold(), by_spelling, n=4, cutoff=0.4)
    return list(dict.fromkeys(by_spelling[match] for match in matches))[:3]


def _refuse_shipped(name: str) -> None:
    from loopscope.checkpoints.locate import shipped_names  # late, because it brings torch

    if name in shipped_names():
        raise ValueError(
            f"{name!r} is shipped with loopscope, so there is nothing to fetch;"
            f" loopscope.load({name!r}) takes it as it is"
        )
