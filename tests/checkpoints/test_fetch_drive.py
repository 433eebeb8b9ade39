"""Downloads of runs from Google Drive: with a stand-in for gdown's two calls, and once with gdown
itself before a stand-in for Drive.
"""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec
from urllib.parse import parse_qs, urlsplit

import gdown
import pytest
import requests
import torch
from gdown.download import GoogleDriveFileToDownload

from loopscope.checkpoints.download import fetch
from loopscope.checkpoints.load import load
from loopscope.checkpoints.remote import DRIVE_FOLDER
from paths import ROOT
from release_files import release_tensors, write_release

RUN = "multi_hop/final_models/r8"
HALF = b"half of a fi"


class Drive:
    """A stand-in for the Drive folder behind gdown's calls, whose signatures are kept.

    Attributes:
        files: Content by path in the folder; an exception is raised after half of a file was
            written.
        listed, sent: How often the folder was listed, and the paths of the files that were asked
            for.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes | BaseException]
    ) -> None:
        self.files, self.listed, self.sent = files, 0, list[str]()
        monkeypatch.setattr(
            gdown, "download_folder", create_autospec(gdown.download_folder, side_effect=self.list)
        )
        monkeypatch.setattr(
            gdown, "download", create_autospec(gdown.download, side_effect=self.send)
        )

    def list(
        self, url: str, skip_download: bool = False, **_: Any
    ) -> list[GoogleDriveFileToDownload]:
        assert (url, skip_download) == (DRIVE_FOLDER, True)
        self.listed += 1
        return [
            GoogleDriveFileToDownload(f"id of {path}", path, f"/nowhere/{path}")
            for path in self.files
        ]

    def send(self, id: str, output: str, **_: Any) -> str:
        path = id.removeprefix("id of ")
        self.sent.append(path)
        content = self.files[path]
        Path(output).write_bytes(HALF if isinstance(content, BaseException) else content)
        if isinstance(content, BaseException):
            raise content
        return output


def pickled(tmp_path: Path) -> bytes:
    return write_release(tmp_path / "made" / "checkpoint.pt").read_bytes()


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOOPSCOPE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_run_comes_alone_and_loads_by_what_its_folders_say(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: dict[str, bytes | BaseException] = {
        "checkpoint_epoch_1259.pt": pickled(tmp_path),
        "notes/log.txt": b"1",
    }
    others: dict[str, bytes | BaseException] = {
        f"checkpoints/{RUN}0/a.pt": b"2",
        "data/vocab.json": b"3",
        "multi_hop/final_models/r7/a.pt": b"4",
    }
    drive = Drive(
        monkeypatch,
        {**{f"checkpoints/{RUN}/{name}": data for name, data in wanted.items()}, **others},
    )
    folder = fetch(RUN)
    assert folder == home / RUN
    assert {name: (folder / name).read_bytes() for name in wanted} == wanted
    assert everything(home / "multi_hop" / "final_models") == [
        "r8",
        "r8/checkpoint_epoch_1259.pt",
        "r8/notes",
        "r8/notes/log.txt",
    ]
    assert sorted(drive.sent) == sorted(f"checkpoints/{RUN}/{name}" for name in wanted)
    model = load(folder, n_heads=5)
    assert (model.cfg.n_loops, str(model.read_at)) == (8, "first_pad")
    assert torch.equal(model.W_E, release_tensors()["token_embedding.weight"])


def test_a_second_call_asks_drive_for_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Drive(monkeypatch, {f"{RUN}/a.pt": b"1"})
    assert fetch(RUN) == fetch(RUN) == home / RUN
    assert (drive.listed, len(drive.sent)) == (1, 1)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"LOOPSCOPE_HOME": "{tmp}/a", "XDG_CACHE_HOME": "{tmp}/b"}, "a"),
        ({"XDG_CACHE_HOME": "{tmp}/b"}, "b/loopscope"),
        ({"LOOPSCOPE_HOME": "", "XDG_CACHE_HOME": ""}, "user/.cache/loopscope"),
        ({"XDG_CACHE_HOME": "relative"}, "user/.cache/loopscope"),
        ({"LOOPSCOPE_HOME": "~/c"}, "user/c"),
    ],
)
def test_runs_are_kept_where_the_environment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("LOOPSCOPE_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value.format(tmp=tmp_path))
    Drive(monkeypatch, {f"{RUN}/a.pt": b"1"})
    assert fetch(RUN) == tmp_path / place / RUN
    assert fetch(RUN, folder=tmp_path / "mine") == tmp_path / "mine" / RUN


def test_a_run_that_drive_lacks_is_refused_with_the_folders_that_are_there(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Drive(
        monkeypatch,
        {f"x/{RUN}0/a.pt": b"1", f"x/{RUN}/readme.txt": b"2", f"x/{RUN}/deeper/a.pt": b"3"},
    )
    with pytest.raises(
        FileNotFoundError,
        match=rf"has no folder '{RUN}' with \.pt files; it has x/{RUN}, x/{RUN}/deeper, x/{RUN}0$",
    ):
        fetch(RUN)
    assert not home.exists()


def test_a_revision_is_refused(home: Path) -> None:
    with pytest.raises(
        ValueError,
        match=(
            rf"'{RUN}' lies on Google Drive, which has no revisions, got revision='main'; leave"
            r" it out"
        ),
    ):
        fetch(RUN, revision="main")


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "sentence"),
    [
        (
            gdown.DownloadError("too many accesses.\nSee the FAQ."),
            ConnectionError,
            rf"^{DRIVE_FOLDER} .*DownloadError: too many accesses\); check",
        ),
        (
            requests.ConnectionError("no route"),
            ConnectionError,
            rf"^{DRIVE_FOLDER} could not be reached.*ConnectionError: no route.* call fetch",
        ),
        (OSError(28, "No space left on device"), OSError, "No space left on device"),
        (KeyboardInterrupt("stop"), KeyboardInterrupt, "stop"),
    ],
    ids=["refused", "no-network", "full-disk", "interrupted"],
)
def test_a_download_that_stops_half_way_leaves_nothing(
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
    before: bool,
    error: BaseException,
    raised: type[BaseException],
    sentence: str,
) -> None:
    if before:
        home.mkdir()
        (home / "mine.txt").write_text("1")
    left = everything(tmp_path)
    drive = Drive(monkeypatch, {f"{RUN}/a.pt": b"1", f"{RUN}/b.pt": error})
    with pytest.raises(raised, match=sentence) as caught:
        fetch(RUN)
    assert "\n" not in str(caught.value)
    assert len(drive.sent) == 2
    assert everything(tmp_path) == left


def test_a_folder_that_cannot_be_listed_is_one_sentence(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = gdown.DownloadError("status code 404")
    monkeypatch.setattr(
        gdown, "download_folder", create_autospec(gdown.download_folder, side_effect=refusal)
    )
    with pytest.raises(
        ConnectionError,
        match=(
            r"status code 404\); check the network, and in a browser whether the folder is still"
            r" public"
        ),
    ):
        fetch(RUN)
    assert not home.exists()


@pytest.mark.parametrize("there", ["r8", "r8/notes.txt"])
def test_what_lies_in_the_place_of_a_run_is_left_alone(
    home: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    path = home / "multi_hop" / "final_models" / there
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    drive = Drive(monkeypatch, {f"{RUN}/a.pt": b"1"})
    with pytest.raises(
        FileExistsError,
        match=(
            r"final_models/r8 exists and holds no \.pt file; remove it, or choose another place"
            r" with folder="
        ),
    ):
        fetch(RUN)
    assert (path.read_text(), drive.listed) == ("mine", 0)


@pytest.mark.slow
def test_a_process_that_is_killed_leaves_nothing_that_is_taken_for_the_run(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = f"""
import os, signal, gdown
from pathlib import Path
from gdown.download import GoogleDriveFileToDownload
from loopscope.checkpoints.download import fetch

def kill_half_way(id, output, **_):
    Path(output).write_bytes({HALF!r})
    os.kill(os.getpid(), signal.SIGKILL)

gdown.download_folder = lambda *_, **__: [GoogleDriveFileToDownload("1", "{RUN}/a.pt", "")]
gdown.download = kill_half_way
fetch("{RUN}")
"""
    killed = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False
    )
    assert killed.returncode == -9, killed.stderr.decode()
    assert [path.name for path in home.rglob("*") if path.is_file()] == [
        "a.pt"
    ]  # in the hidden draft
    assert not (home / RUN).exists()
    Drive(monkeypatch, {f"{RUN}/a.pt": b"whole"})
    assert (fetch(RUN) / "a.pt").read_bytes() == b"whole"


# gdown itself


PAGES = {
    "1AQvp8erdtRRn9_ix7E1ssmyWarwFNLVU": "release",
    "M" * 30: "multi_hop",
    "F" * 30: "final_models",
    "R" * 30: "r8",
}


class DriveTransport(requests.adapters.BaseAdapter):
    """Answers for drive.google.com: nested folders, and one file."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.content = content

    def send(self, request: requests.PreparedRequest, *_: Any, **__: Any) -> requests.Response:
        assert request.url is not None
        asked = parse_qs(urlsplit(request.url).query)["id"][0]
        response = requests.Response()
        response.status_code, response.url, response.request = 200, request.url, request
        if asked in PAGES:
            places = list(PAGES)
            below = places.index(asked) + 1
            link = (
                f"drive/folders/{places[below]}"
                if below < len(places)
                else f"file/d/{'C' * 30}/view"
            )
            name = PAGES[places[below]] if below < len(places) else "checkpoint_epoch_3.pt"
            page = (
                f'<title>{PAGES[asked]}</title><a href="https://drive.google.com/{link}">{name}</a>'
            )
            response.raw = io.BytesIO(page.encode())
            response.headers["Content-Type"] = "text/html; charset=utf-8"
        else:
            assert asked == "C" * 30
            response.raw = io.BytesIO(self.content)
            about = {
                "Content-Type": "application/octet-stream",
                "Content-Disposition": 'attachment; filename="checkpoint_epoch_3.pt"',
            }
            response.headers.update({**about, "Content-Length": str(len(self.content))})
        return response

    def close(self) -> None:
        pass


def test_gdown_itself_brings_a_run(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        sys.modules["gdown.download"], "DEFAULT_COOKIES_FILE", str(tmp_path / "cookies.txt")
    )
    monkeypatch.setattr(
        requests.Session, "get_adapter", lambda *_, **__: DriveTransport(pickled(tmp_path))
    )
    folder = fetch(RUN)
    assert everything(folder) == ["checkpoint_epoch_3.pt"]
    assert (folder / "checkpoint_epoch_3.pt").read_bytes() == pickled(tmp_path)
