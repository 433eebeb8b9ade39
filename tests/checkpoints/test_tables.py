"""The tables of the families' releases: found by themselves, and no release is of two of them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from loopscope.checkpoints import tables
from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.remote import remote_releases
from loopscope.checkpoints.table import recognize
from loopscope.checkpoints.tables import TABLES, tables_in
from loopscope.models.core.registry import FAMILIES
from paths import DOCS, GOLDEN

RELEASED = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
# Folders that are not named after their family; the weights of deepseek_v4_mhc are one part of a
# model, which no table reads.
FAMILIES_OF = {
    "training_free_llama": ["training_free"],
    "training_free_qwen3": ["training_free"],
    "nanbeige_mhc": ["nanbeige"],
    "deepseek_v4_mhc": [],
}


def facts_of(folder: Path) -> tuple[dict[str, Any], frozenset[str]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return json.loads((folder / "config.json").read_text()), frozenset(file.keys())


@pytest.mark.parametrize("case", RELEASED)
def test_a_golden_folder_is_recognised_by_the_one_table_of_its_family(case: str) -> None:
    values, keys = facts_of(GOLDEN / case)
    found = [table.family for table in TABLES if table.recognizes(values, keys)]
    assert found == FAMILIES_OF.get(case, [case])


def test_every_table_is_found_once_and_is_of_a_family_that_can_be_built() -> None:
    assert {table.family for table in TABLES} <= set(FAMILIES)
    assert len({id(table) for table in TABLES}) == len(TABLES)


def test_a_release_that_could_be_of_two_families_is_refused_whatever_their_order() -> None:
    values, keys = facts_of(GOLDEN / "spiral")
    both = ({**values, "model_type": "ouro"}, dict.fromkeys(keys))
    for order in (TABLES, TABLES[::-1]):
        with pytest.raises(
            CheckpointError, match=r"could be of the families (ouro and spiral|spiral and ouro)"
        ):
            recognize(both, order, Path("config.json"))


def test_the_known_releases_are_those_of_the_tables() -> None:
    hub = [(each.at, each.family) for each in remote_releases() if not each.on_drive]
    assert hub == [(at, table.family) for table in TABLES for at, _ in table.releases]
    assert ("ByteDance/Ouro-1.4B", "ouro") in hub
    solvers = {each.at for each in remote_releases() if each.family in ("trm", "hrm")}
    told = (DOCS / "releases.md").read_text(encoding="utf-8")
    assert solvers == set(re.findall(r"^\| (\S+/\S+) \| [th]rm \|", told, re.MULTILINE))


NEW_TABLE = """
from loopscope.checkpoints.table import Table

TABLE = Table("brand_new", lambda values, keys: True, lambda *_: None, lambda cfg: {})
MORE = (1, 2)
"""


def test_a_new_table_is_one_file_and_no_line_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_tables"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "brand_new.py").write_text(NEW_TABLE)
    (package / "helpers.py").write_text("NAME = 'no table'")
    monkeypatch.syspath_prepend(tmp_path)
    assert [table.family for table in tables_in([str(package)], "some_tables")] == ["brand_new"]
    assert tables_in(tables.__path__, tables.__name__) == TABLES
