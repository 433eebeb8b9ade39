"""The list of checkpoints: what is shipped loads, and what nobody has published is said to be
unknown.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

from local_hub import use_endpoint
from loopscope.checkpoints import locate as locating
from loopscope.checkpoints.catalog import available
from loopscope.checkpoints.load import load, save
from loopscope.models.core.registry import FAMILIES
from release_files import toy_model

COLUMNS = ["name", "family", "size", "where", "at", "epoch", "sha256"]
KNOWN_EPOCHS = {"r2": "2765", "r6": "1015", "r7": "1050", "r8": "1259", "r_dyn": "5388"}


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return available()


@pytest.fixture(scope="module")
def shipped(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["where"] == "shipped"]


@pytest.fixture(scope="module")
def remote(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["where"] == "remote"].set_index("name")


def test_the_columns_are_these(table: pd.DataFrame) -> None:
    assert list(table.columns) == COLUMNS
    assert table["name"].is_unique
    assert set(table["where"]) == {"shipped", "remote", "unreleased"}
    assert set(table["family"]) <= {*FAMILIES}
    assert set(table[table["where"] == "unreleased"]["name"]) == {"hyperloop", "melt"}


def test_every_cell_says_something(table: pd.DataFrame) -> None:
    assert not table.isna().any(axis=None)
    assert (table.astype(str).map(str.strip) != "").all(axis=None)


def test_the_trained_checkpoint_is_shipped(shipped: pd.DataFrame) -> None:
    assert "ltg_trained" in set(shipped["name"])


def test_every_shipped_checkpoint_loads_by_name_and_runs(shipped: pd.DataFrame) -> None:
    for row in shipped.itertuples():
        model = load(row.name)
        assert model.cfg.family == row.family
        count = model.cfg.n_ctx or 0 if model.fixed_length else 2
        assert bool(model(torch.ones(1, count, dtype=torch.long)).isfinite().all())


def test_a_shipped_checkpoint_is_as_large_as_its_file(shipped: pd.DataFrame) -> None:
    for row in shipped.itertuples():
        sizes = [
            path.stat().st_size
            for path in Path(row.at).iterdir()
            if path.suffix in (".pt", ".safetensors")
        ]
        assert [int(row.size)] == sizes


@pytest.mark.parametrize("run", [*(f"r{r}" for r in range(1, 9)), "r_dyn"])
def test_every_released_run_is_listed_with_its_epoch_or_unknown(
    remote: pd.DataFrame, run: str
) -> None:
    assert remote.loc[f"multi_hop/final_models/{run}", "epoch"] == KNOWN_EPOCHS.get(run, "unknown")


@pytest.mark.parametrize("folder", ["multi_hop/12_hop", "systematicity"])
def test_the_other_released_folders_are_listed_with_unknown_epochs(
    remote: pd.DataFrame, folder: str
) -> None:
    rows = remote[remote.index.str.startswith(folder)]
    assert len(rows) >= 1
    assert set(rows["epoch"]) == {"unknown"}


def test_hashes_and_sizes_of_releases_are_said_to_be_unknown(remote: pd.DataFrame) -> None:
    assert set(remote["sha256"]) == {"unknown"}
    assert set(remote["size"]) == {"unknown"}
    assert remote["at"].str.startswith("https://").all()


def test_a_release_that_is_only_listed_does_not_load(
    remote: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint("http://127.0.0.1:9", tmp_path, monkeypatch)
    monkeypatch.setenv("LOOPSCOPE_HOME", str(tmp_path))
    for name in remote.index:
        pattern = "is neither a shipped" if "<" in name else f"loopscope fetch {name} brings it"
        with pytest.raises(FileNotFoundError, match=pattern):
            load(name)


def test_a_checkpoint_put_among_the_shipped_ones_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locating, "SHIPPED", tmp_path)
    save(toy_model(), tmp_path / "mini" / "multi_hop" / "r_dyn")
    listed = available().set_index("name").loc["mini/multi_hop/r_dyn"]
    assert (listed["where"], listed["family"]) == ("shipped", "recurrent_depth")
    assert torch.equal(load("mini/multi_hop/r_dyn").W_E, toy_model().W_E)


def test_every_call_returns_a_table_of_its_own() -> None:
    first = available()
    first["name"] = "changed"
    assert "ltg_trained" in set(available()["name"])
