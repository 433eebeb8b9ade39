"""Files that are no checkpoint, are cut short or hold code: each is refused in one sentence, and no
code runs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from release_files import FACTS, check_refused, write_bomb, write_release

# Not there, or not a checkpoint


@pytest.mark.parametrize("source", ["nothing_here", "no/such/checkpoint_epoch_1.pt", "ltg_trainde"])
def test_what_is_not_there_is_named_with_the_known_checkpoints(tmp_path: Path, source: str) -> None:
    match = (
        rf"'{source}' is neither a shipped checkpoint \(.*ltg_trained.*\) nor a file or folder;"
        r" .*available\(\)"
    )
    check_refused(source, match, error=FileNotFoundError, within=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"P",
        b"weights for you\n",
        b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
        b"\x80\x04\x95",
        b"{}",
        bytes(4096),
    ],
    ids=["empty", "one-byte", "text", "png", "pickle", "json", "zeros"],
)
def test_a_file_that_is_no_torch_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_epoch_1.pt"
    path.write_bytes(content)
    check_refused(
        path,
        r"checkpoint_epoch_1\.pt is not a checkpoint: .*torch file with a 'model_state_dict'",
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04" + bytes(300), b"PK", b"\x80\x02", b"\x80\x02" + bytes(range(200))]
)
def test_a_file_that_only_begins_like_a_torch_file_is_refused(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    check_refused(path, r"a\.pt (is damaged or cut short|holds code)", within=tmp_path, **FACTS)


@pytest.mark.parametrize("name", ["notes.txt", "model.bin", "model.safetensors"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"something")
    match = (
        rf"{re.escape(name)} is not a checkpoint: expected a \.pt file, a \.gguf file, or a"
        r" \.safetensors file with config\.json beside it"
    )
    check_refused(tmp_path / name, match, within=tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    match = (
        r"holds no checkpoint: expected model\.safetensors with config\.json, or a \.pt or"
        r" \.gguf file"
    )
    check_refused(tmp_path, match, within=tmp_path)


def test_weights_without_config_are_refused(own: Path, tmp_path: Path) -> None:
    (own / "config.json").unlink()
    check_refused(
        own, r"expected .*a \.safetensors file with config\.json beside it", within=tmp_path
    )


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"epoch": 4}, r"\['epoch'\]"),
        ({"model_state_dict": {}}, r"\['model_state_dict'\]"),
        ({"model_state_dict": [1, 2]}, r"\['model_state_dict'\]"),
        ({"model_state_dict": {"token_embedding.weight": 3}}, r"\['model_state_dict'\]"),
        (torch.zeros(3), "Tensor"),
        ([1, 2], "list"),
    ],
)
def test_a_torch_file_without_a_model_is_refused(
    tmp_path: Path, content: object, found: str
) -> None:
    torch.save(content, tmp_path / "a.pt")
    check_refused(
        tmp_path / "a.pt",
        rf"a\.pt holds no model: .*but this file holds {found}",
        within=tmp_path,
        **FACTS,
    )


# Cut short


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
def test_a_release_that_is_cut_short_is_refused(tmp_path: Path, share: float, legacy: bool) -> None:
    path = write_release(tmp_path / "a.pt", legacy=legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share) - 1])
    check_refused(
        path,
        r"a\.pt is damaged or cut short: .* reading it failed with \w+",
        within=tmp_path,
        **FACTS,
    )


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_our_own_weights_cut_short_are_refused(own: Path, tmp_path: Path, share: float) -> None:
    whole = (own / "model.safetensors").read_bytes()
    (own / "model.safetensors").write_bytes(whole[: int(len(whole) * share)])
    check_refused(own, r"model\.safetensors is damaged or cut short", within=tmp_path)


# Code in the file


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle2"])
def test_code_in_a_torch_file_is_refused_and_does_not_run(tmp_path: Path, kind: str) -> None:
    marker = tmp_path / "the_code_ran"
    path = write_bomb(tmp_path / "a.pt", marker, kind)
    check_refused(
        path,
        r"a\.pt holds code \((posix|nt)\.mkdir\), not only tensors; it is refused",
        within=tmp_path,
        **FACTS,
    )
    assert not marker.exists()


def test_code_in_a_newer_pickle_is_refused_and_does_not_run(tmp_path: Path) -> None:
    path = write_bomb(tmp_path / "a.pt", tmp_path / "the_code_ran", "pickle4")
    check_refused(path, r"a\.pt is not a checkpoint", within=tmp_path, **FACTS)
    assert not (tmp_path / "the_code_ran").exists()


def test_the_code_would_have_run_in_an_unsafe_load(tmp_path: Path) -> None:
    marker = tmp_path / "the_code_ran"
    torch.load(write_bomb(tmp_path / "a.pt", marker, "zip"), weights_only=False)
    assert marker.exists(), "otherwise the two tests above show nothing"


def test_a_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3), tmp_path / "a.pt")
    check_refused(
        tmp_path / "a.pt",
        r"a\.pt holds code \(torch\.nn\.modules\.linear\.Linear\)",
        within=tmp_path,
        **FACTS,
    )
