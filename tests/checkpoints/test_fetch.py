"""The known releases, and downloads from a hub on this machine."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import torch

from local_hub import MAIN, OTHER, Files, Hub, serving, use_endpoint
from loopscope.checkpoints.catalog import available
from loopscope.checkpoints.download import fetch
from loopscope.checkpoints.load import load, save
from loopscope.checkpoints.remote import DRIVE_FOLDER, RemoteRelease, find_release, remote_releases
from paths import ROOT
from release_files import toy_model

RUN = "multi_hop/final_models/r_dyn"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A folder in our own format, as the files of a repository."""
    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    save(toy_model("learned", read_at="last_real"), folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def half_files(folder: Path) -> list[str]:
    """What an interrupted download could leave: files of the transport, and hidden drafts."""
    return [
        str(path)
        for path in folder.rglob("*")
        if "incomplete" in path.name or path.name.startswith((".r", ".m", "tmp"))
    ]


# The table


def test_the_table_is_frozen_and_names_each_release_once() -> None:
    releases = remote_releases()
    assert len({release.name.casefold() for release in releases}) == len(releases)
    assert all(
        release.on_drive or re.fullmatch(r"[\w.-]+/[\w.-]+", release.at) for release in releases
    )
    assert {r.family for r in releases} == {
        "ouro",
        "dory",
        "inkling2_loop",
        "huginn",
        "hrm_text",
        "hrm",
        "trm",
        "nanbeige",
        "parcae",
        "albert",
        "smollm",
        "recurrent_depth",
        "retrofit_llama",
        "retrofit_olmo",
    }
    with pytest.raises(AttributeError):
        releases[0].name = "another"  # type: ignore[misc]


def test_the_runs_on_drive_are_those_of_the_catalog() -> None:
    listed = available().query("where == 'remote' and at.str.contains('drive.google.com')")
    assert set(listed["at"]) == {DRIVE_FOLDER}
    assert {release.name for release in remote_releases() if release.on_drive} == set(
        listed["name"]
    )


@pytest.mark.parametrize(
    "name", ["Ouro-1.4B", "ouro-1.4b", "ByteDance/Ouro-1.4B", "bytedance/ouro-1.4b"]
)
def test_a_release_is_found_by_its_name_and_by_its_repository_in_any_case(name: str) -> None:
    assert find_release(name) == RemoteRelease(
        "Ouro-1.4B", "ouro", "ByteDance/Ouro-1.4B", "24 layers, 4 iterations, exit gate"
    )


@pytest.mark.parametrize(
    "name",
    [
        RUN,
        "multi_hop/final_models/r8",
        "multi_hop/12_hop/r7",
        "multi_hop/12_hop/r_dyn",
        "systematicity/r4_l2",
    ],
)
def test_a_run_lies_on_drive_under_the_name_that_was_asked(name: str) -> None:
    found = find_release(name)
    assert (found.name, found.at, found.family) == (name, DRIVE_FOLDER, "recurrent_depth")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("Ouro-1.5B", "Ouro-1.4B"),
        ("parcae", "parcae-140m"),
        ("multi_hop/final_models/r9", "multi_hop/final_models/r"),
        ("systematicity/r4", "systematicity/r<X>_l<Y>"),
        ("BytDance/Ouro/2.6B", "Ouro-2.6B"),
        ("../../etc/passwd", ""),
        ("multi_hop/12_hop/../r1", "multi_hop/12_hop"),
        ("", "none"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_ones(name: str, nearest: str) -> None:
    sentence = (
        rf"{re.escape(repr(name))} is no known release \(nearest: .*{re.escape(nearest)}.*\); .* as"
        r" 'owner/name'"
    )
    with pytest.raises(ValueError, match=sentence):
        fetch(name)


@pytest.mark.parametrize("name", ["ltg_trained", "mini/shortcut"])
def test_a_shipped_name_needs_no_download(name: str) -> None:
    with pytest.raises(
        ValueError,
        match=rf"'{name}' is shipped with loopscope, so there is nothing to fetch; loopscope\.load",
    ):
        fetch(name)


# Hugging Face: what comes


def test_a_whole_download_loads_as_the_model_that_was_saved(
    hub: Hub, tiny: Files, tmp_path: Path
) -> None:
    hub.repositories["someone/tiny"] = {
        MAIN: {**tiny, "README.md": b"#", "model.onnx": b"0", "sub/model.safetensors": b"1"}
    }
    folder = fetch("someone/tiny")
    assert names_in(folder) == sorted(tiny)
    assert folder.is_relative_to(tmp_path / "hub")
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(
        load(folder)(tokens, n_loops=3),
        toy_model("learned", read_at="last_real")(tokens, n_loops=3),
    )


def test_a_known_name_goes_to_its_repository(hub: Hub, tiny: Files) -> None:
    hub.repositories["SandyResearch/parcae-140m"] = {MAIN: tiny}
    assert names_in(fetch("Parcae-140M")) == sorted(tiny)


def test_the_folder_argument_takes_the_place_of_the_usual_cache(
    hub: Hub, tiny: Files, tmp_path: Path
) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny}
    assert fetch("someone/tiny", folder=tmp_path / "mine").is_relative_to(tmp_path / "mine")
    assert not (tmp_path / "hub").exists()


def test_a_revision_is_the_one_that_comes(hub: Hub, tiny: Files) -> None:
    hub.repositories["someone/tiny"] = {
        MAIN: tiny,
        OTHER: {**tiny, "card.json": b'{"readout": "first_pad"}'},
    }
    main, other = fetch("someone/tiny"), fetch("someone/tiny", revision="other")
    assert [str(load(folder).read_at) for folder in (main, other)] == ["last_real", "first_pad"]
    assert fetch("someone/tiny", revision=OTHER) == other


def test_a_second_call_gets_no_file_again_and_a_new_commit_only_what_changed(
    hub: Hub, tiny: Files
) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny, OTHER: {**tiny, "card.json": b"{}"}}
    first = fetch("someone/tiny")
    assert len(hub.got("model.safetensors")) == 1
    hub.asked.clear()
    assert fetch("someone/tiny") == first
    assert [line for line in hub.asked if "/resolve/" in line and line.startswith("GET")] == []
    hub.branches["main"] = OTHER
    assert fetch("someone/tiny") != first
    assert hub.got("model.safetensors") == []
    assert len(hub.got("card.json")) == 1


SHARDS: Files = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer.model": b"1",
    "merges.txt": b"2",
    "chat_template.jinja": b"3",
    "model.safetensors.index.json": (
        b'{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c":'
        b' "model-1.safetensors"}}'
    ),
    "model-1.safetensors": b"11",
    "model-2.safetensors": b"222",
}


@pytest.mark.parametrize(
    ("files", "left_out"),
    [
        (
            SHARDS,
            (
                "pytorch_model.bin",
                "model.pt",
                "optimizer.safetensors",
                "checkpoint-3/model.safetensors",
                "checkpoint-3/config.json",
            ),
        ),
        (
            {"config.json": b"{}", "a/model.safetensors": b"1", "b/config.json": b"2"},
            ("model.pt", "README.md"),
        ),
        (
            {"config.json": b"{}", "model.pt": b"1", "seed_0/model.bin": b"2"},
            ("optimizer.pt", "training_args.bin", "rng_state.bin", "x.h5"),
        ),
        (
            {"all_config.yaml": b"arch: {}", "checkpoint": b"1", "a/step_12": b"2"},
            ("losses.py", "optimizer_checkpoint", "README.md"),
        ),
    ],
    ids=["sharded", "safetensors-below", "pickles", "puzzle-solvers"],
)
def test_pickles_come_only_where_there_are_no_safetensors(
    hub: Hub, files: Files, left_out: tuple[str, ...]
) -> None:
    hub.repositories["someone/much"] = {MAIN: {**files, **dict.fromkeys(left_out, b"unwanted")}}
    folder = fetch("someone/much")
    assert {name: (folder / name).read_bytes() for name in names_in(folder)} == files


def test_a_repository_that_lacks_a_shard_is_not_whole(hub: Hub) -> None:
    hub.repositories["someone/much"] = {
        MAIN: {name: data for name, data in SHARDS.items() if name != "model-2.safetensors"}
    }
    with pytest.raises(
        FileNotFoundError,
        match=(
            r"much is not whole: .*index\.json names 2 files, of which 1 did not come, first"
            r" 'model-2"
        ),
    ):
        fetch("someone/much")


def test_a_repository_without_weights_is_refused(hub: Hub) -> None:
    hub.repositories["someone/data"] = {MAIN: {"config.json": b"{}", "train.csv": b"1"}}
    with pytest.raises(
        FileNotFoundError,
        match=r"/someone/data holds no weights: neither \.safetensors nor \.pt nor \.bin",
    ):
        fetch("someone/data")


@pytest.mark.slow
def test_the_environment_decides_where_from_and_where_to(
    hub: Hub, tiny: Files, tmp_path: Path
) -> None:
    hub.repositories["albert/albert-base-v2"] = {MAIN: tiny}
    slow = ("huggingface_hub", "gdown", "torch")
    script = f"""
import sys
from loopscope.checkpoints.download import fetch
print([name for name in {slow} if name in sys.modules])
print(fetch("albert-base-v2"))
"""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {
        **kept,
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(ROOT),
    }
    called = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    early, folder = called.stdout.splitlines()
    assert early == "[]"
    assert Path(folder).is_relative_to(tmp_path / "home")
    assert names_in(Path(folder)) == sorted(tiny)


# Hugging Face: what goes wrong


def test_a_cut_connection_is_taken_up_where_it_broke(hub: Hub, tiny: Files) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny}
    hub.cut["model.safetensors"] = [1000]
    folder = fetch("someone/tiny")
    assert (folder / "model.safetensors").read_bytes() == tiny["model.safetensors"]
    assert [line.rpartition(" ")[2] for line in hub.got("model.safetensors")][1:] == ["bytes=1000-"]


def test_a_connection_that_stays_cut_leaves_no_half_file_and_the_next_call_ends_it(
    hub: Hub, tiny: Files, tmp_path: Path
) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny}
    hub.cut["model.safetensors"] = [1000, *[0] * 50]
    with pytest.raises(
        ConnectionError,
        match=(
            rf"{hub.address}/someone/tiny could not be reached, or .* broke off .*then call fetch"
            r" again"
        ),
    ):
        fetch("someone/tiny")
    assert len(hub.got("model.safetensors")) > 1
    assert half_files(tmp_path) == []
    assert not [path for path in (tmp_path / "hub").rglob("*.safetensors")]
    hub.cut.clear()
    assert names_in(fetch("someone/tiny")) == sorted(tiny)


def test_one_of_several_folders_that_came_is_not_taken_for_all(hub: Hub) -> None:
    files = {"config.json": b"{}", "a/model.safetensors": b"1", "b/model.safetensors": b"2"}
    hub.repositories["someone/much"] = {MAIN: files}
    hub.cut["b/model.safetensors"] = [0] * 50
    with pytest.raises(
        ConnectionError, match="someone/much could not be reached, or the connection broke off"
    ):
        fetch("someone/much")
    hub.cut.clear()
    assert names_in(fetch("someone/much")) == sorted(files)


@pytest.mark.parametrize(
    ("status", "code", "kind", "sentence"),
    [
        (
            404,
            "RepoNotFound",
            FileNotFoundError,
            (
                r"was not found \(404\): check the spelling of owner/name, or, if it is private,"
                r" log in"
            ),
        ),
        (
            401,
            "RepoNotFound",
            FileNotFoundError,
            (
                r"was not found \(401\): check the spelling of owner/name, or, if it is private,"
                r" log in"
            ),
        ),
        (
            403,
            "GatedRepo",
            PermissionError,
            (
                r"is not open to everyone \(403\): accept its terms on its page, and log in with"
                r" `hf auth login`"
            ),
        ),
        (401, "GatedRepo", PermissionError, r"is not open to everyone \(401\): accept its terms"),
        (403, "", PermissionError, r"is not open to everyone \(403\): accept its terms"),
        (
            418,
            "",
            ConnectionError,
            r"could not be read: the hub answered 418; call fetch again later",
        ),
    ],
)
def test_a_refusal_is_one_sentence(
    hub: Hub, tmp_path: Path, status: int, code: str, kind: type[OSError], sentence: str
) -> None:
    hub.refused["someone/closed"] = (status, code)
    with pytest.raises(
        kind, match=rf"^{hub.address}/someone/closed at revision 'v1' {sentence}"
    ) as caught:
        fetch("someone/closed", revision="v1")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_a_revision_that_is_not_there_is_named(hub: Hub, tiny: Files) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny}
    with pytest.raises(
        FileNotFoundError,
        match=(
            r"/someone/tiny at revision 'v9' was not found: the repository has no such branch, tag"
            r" or commit"
        ),
    ):
        fetch("someone/tiny", revision="v9")


def test_an_id_that_the_hub_forbids_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"/some--one/tiny cannot be a repository: .*; write it as 'owner/name'"
    ):
        fetch("some--one/tiny")


@pytest.fixture
def closed_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    use_endpoint(address, tmp_path, monkeypatch)
    return address


def test_without_a_network_the_endpoint_is_named(closed_port: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConnectionError,
        match=(
            rf"^{closed_port}/someone/tiny could not be reached.*ConnectError.*check the network,"
            r" the proxy"
        ),
    ) as caught:
        fetch("someone/tiny")
    assert "\n" not in str(caught.value)
    assert names_in(tmp_path) == []


def test_without_a_network_what_is_there_whole_is_returned_and_what_is_not_refused(
    hub: Hub, tiny: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny}
    folder = fetch("someone/tiny")
    use_endpoint("http://127.0.0.1:9", tmp_path, monkeypatch)
    assert fetch("someone/tiny") == folder
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ConnectionError, match=r"http://127\.0\.0\.1:9/someone/tiny could not be reached"
    ):
        fetch("someone/tiny")


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        ConnectionError,
        match=r"someone/tiny is not whole in the cache, and HF_HUB_OFFLINE is set; unset it",
    ):
        fetch("someone/tiny")


def test_an_error_of_this_machine_goes_on_as_it_is(hub: Hub, tiny: Files, tmp_path: Path) -> None:
    hub.repositories["someone/tiny"] = {MAIN: tiny}
    (tmp_path / "taken").write_text("a file")
    with pytest.raises((FileExistsError, NotADirectoryError)) as caught:
        fetch("someone/tiny", folder=tmp_path / "taken")
    assert caught.value.errno is not None
