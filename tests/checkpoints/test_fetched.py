"""Releases that have been fetched are loaded by their names, and the command that fetches them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from local_hub import MAIN, Files, Hub, serving
from loopscope.analyses.cli import main
from loopscope.checkpoints.download import fetch
from loopscope.checkpoints.hub.fetched import download_size
from loopscope.checkpoints.load import load, read_card
from paths import GOLDEN
from release_files import FACTS, release_tensors, write_release

TOKENS = torch.tensor([[1, 5, 17, 40, 8]])
FILES = ("config.json", "model.safetensors")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def ouro() -> Files:
    return {name: (GOLDEN / "ouro" / name).read_bytes() for name in FILES}


def test_a_release_that_was_fetched_loads_by_its_name_without_the_network(
    hub: Hub, ouro: Files
) -> None:
    hub.repositories["ByteDance/Ouro-1.4B"] = {MAIN: ouro}
    with pytest.raises(
        FileNotFoundError,
        match=(
            r"'Ouro-1\.4B' is a public release that is not on this machine; loopscope\.fetch\("
            r"'Ouro-1\.4B'\) or, on the command line, loopscope fetch Ouro-1\.4B brings it"
        ),
    ):
        load("ouro-1.4b")
    assert hub.asked == []
    fetch("Ouro-1.4B")
    hub.asked.clear()
    for name in ("Ouro-1.4B", "ouro-1.4b", "ByteDance/Ouro-1.4B"):
        assert torch.equal(load(name)(TOKENS), load(GOLDEN / "ouro")(TOKENS))
    assert read_card("Ouro-1.4B") == {}
    assert hub.asked == []


def test_any_repository_that_was_fetched_loads_by_its_id(hub: Hub, ouro: Files) -> None:
    hub.repositories["someone/fine-tune"] = {MAIN: ouro}
    with pytest.raises(FileNotFoundError, match="is neither a shipped checkpoint"):
        load("someone/fine-tune")
    fetch("someone/fine-tune")
    assert load("someone/fine-tune").cfg == load(GOLDEN / "ouro").cfg


def test_half_a_release_is_not_taken_for_one_that_was_fetched(hub: Hub, ouro: Files) -> None:
    index = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}).encode()
    files = {"config.json": ouro["config.json"], "model.safetensors.index.json": index}
    hub.repositories["ByteDance/Ouro-1.4B"] = {MAIN: {**files, "m-1.safetensors": b"1"}}
    with pytest.raises(FileNotFoundError, match="is not whole"):
        fetch("Ouro-1.4B")
    with pytest.raises(FileNotFoundError, match="is not on this machine"):
        load("Ouro-1.4B")


def test_a_run_from_drive_loads_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOOPSCOPE_HOME", str(tmp_path / "home"))
    name = "multi_hop/final_models/r3"
    with pytest.raises(FileNotFoundError, match=f"loopscope fetch {name} brings it"):
        load(name)
    write_release(tmp_path / "home" / name / "checkpoint_epoch_7.pt", release_tensors())
    assert load(name, n_heads=FACTS["n_heads"]).cfg.n_loops == 3


# The size, and the command


def test_the_size_is_that_of_the_files_that_would_come(hub: Hub, ouro: Files) -> None:
    whole = sum(map(len, ouro.values()))
    unwanted = {"pytorch_model.bin": b"1" * 999, "README.md": b"2", "checkpoint-1/a.bin": b"3"}
    hub.repositories["someone/tiny"] = {MAIN: {**ouro, **unwanted}}
    hub.repositories["someone/pickled"] = {
        MAIN: {"config.json": b"{}", "pytorch_model.bin": b"1" * 999}
    }
    assert download_size("someone/tiny") == whole
    assert download_size("someone/pickled") == 999 + 2
    fetch("someone/tiny")
    assert download_size("someone/tiny") == 0
    assert download_size("multi_hop/12_hop/r_dyn") is None


def test_the_command_says_the_size_first(
    hub: Hub, ouro: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.repositories["someone/tiny"] = {MAIN: ouro}
    main(["fetch", "someone/tiny"])
    lines = capsys.readouterr().out.splitlines()
    whole = sum(map(len, ouro.values()))
    assert lines[0] == f"someone/tiny: {whole / 1e9:.3g} GB to download ({whole} bytes)"
    assert lines[1] == f"It is in {fetch('someone/tiny')}"
    main(["fetch", "someone/tiny", "--folder", str(tmp_path / "mine")])
    assert str(tmp_path / "mine") in capsys.readouterr().out


def test_the_command_refuses_an_unknown_name_in_one_sentence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fetch", "Ouro-1.5B"])
    assert stop.value.code == 2
    assert "no known release (nearest: Ouro-1.4B" in capsys.readouterr().err
