"""What the folders of the release tell about the checkpoints in them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.load import load
from loopscope.models.basis.tokens import Readout
from release_files import FACTS, release_tensors, write_release


def test_a_systematicity_folder_tells_iterations_and_injection(tmp_path: Path) -> None:
    path = tmp_path / "systematicity" / "r3_l2" / "checkpoint_epoch_77.pt"
    write_release(path, release_tensors("learned"))
    for source in (path, str(path), path.parent):
        model = load(source, n_heads=5)
        assert (model.cfg.n_loops, model.cfg.n_layers, model.cfg.input_injection) == (3, 2, False)
        assert model.read_at is None, "the layout does not tell where these read their answers"


def test_the_folders_number_of_layers_is_checked(tmp_path: Path) -> None:
    path = write_release(
        tmp_path / "systematicity" / "r3_l4" / "checkpoint_epoch_77.pt", release_tensors("learned")
    )
    with pytest.raises(
        CheckpointError, match="the folder name promises 4 layers, but the file holds 2"
    ):
        load(path, n_heads=5)


@pytest.mark.parametrize("stage", ["final_models", "12_hop"])
@pytest.mark.parametrize(("run", "n_loops"), [("r1", 1), ("r8", 8), ("r_dyn", None)])
def test_a_multi_hop_folder_tells_iterations_injection_and_readout(
    tmp_path: Path, stage: str, run: str, n_loops: int | None
) -> None:
    folder = write_release(tmp_path / "multi_hop" / stage / run / "checkpoint_epoch_5388.pt").parent
    model = load(folder, n_heads=5)
    assert (model.cfg.n_loops, model.cfg.input_injection) == (n_loops, False)
    assert model.read_at == Readout("first_pad")


def test_a_file_inside_the_layout_is_known_from_the_working_directory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_release(
        tmp_path / "multi_hop" / "final_models" / "r6" / "checkpoint_epoch_1015.pt"
    ).parent
    monkeypatch.chdir(folder)
    for source in ("checkpoint_epoch_1015.pt", "."):
        assert load(source, n_heads=5).cfg.n_loops == 6


@pytest.mark.parametrize(
    "folder",
    ["r6", "multi_hop/r6", "final_models/r6b", "final_models/my_r6", "final_models/r6_l2_old"],
)
def test_other_folder_names_tell_nothing(tmp_path: Path, folder: str) -> None:
    model = load(write_release(tmp_path / folder / "checkpoint_epoch_1.pt"), **FACTS)
    assert (model.cfg.n_loops, model.read_at) == (None, None)


def test_arguments_win_over_the_folder(tmp_path: Path) -> None:
    path = write_release(tmp_path / "final_models" / "r6" / "checkpoint_epoch_1.pt")
    model = load(path, n_heads=5, n_loops=9, input_injection=True, readout="column:8")
    assert (model.cfg.n_loops, model.cfg.input_injection, model.read_at) == (
        9,
        True,
        Readout("column", 8),
    )


def test_a_folder_with_several_checkpoints_names_them(tmp_path: Path) -> None:
    for epoch in (3, 50, 700):
        write_release(tmp_path / "r3_l2" / f"checkpoint_epoch_{epoch}.pt")
    names = r"checkpoint_epoch_3\.pt, checkpoint_epoch_50\.pt, checkpoint_epoch_700\.pt"
    with pytest.raises(CheckpointError, match=rf"r3_l2 holds 3 checkpoints; name one of {names}"):
        load(tmp_path / "r3_l2", n_heads=5)
    assert load(tmp_path / "r3_l2" / "checkpoint_epoch_50.pt", n_heads=5).cfg.n_loops == 3


def test_a_folder_of_folders_says_where_the_checkpoints_are(tmp_path: Path) -> None:
    for run in ("r2", "r4"):
        write_release(tmp_path / "final_models" / run / "checkpoint_epoch_1.pt")
    with pytest.raises(
        CheckpointError,
        match=r"holds no checkpoint: .*there are some in final_models/r2, final_models/r4",
    ):
        load(tmp_path)
