"""The tables of the families' releases: found by themselves, and no release is of two of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from loopscope.checkpoints.errors import CheckpointError
from loopscope.checkpoints.remote import remote_releases
from loopscope.checkpoints.table import recognize
from loopscope.checkpoints.tables import TABLES
from loopscope.models.core.registry import FAMILIES
from paths import GOLDEN, ROOT

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
    for tables in (TABLES, TABLES[::-1]):
        with pytest.raises(
            CheckpointError, match=r"could be of the families (ouro and spiral|spiral and ouro)"
        ):
            recognize(both, tables, Path("config.json"))


def test_the_known_releases_are_those_of_the_tables() -> None:
    hub = [(each.at, each.family) for each in remote_releases() if not each.on_drive]
    assert hub == [(at, table.family) for table in TABLES for at, _ in table.releases]
    assert ("ByteDance/Ouro-1.4B", "ouro") in hub


NEW_TABLE = """
from loopscope.checkpoints.table import Table

TABLE = Table(
    "smollm",
    lambda values, keys: values.get("model_type") == "brand_new",
    lambda fields, tensors, options: None,
    lambda cfg: {},
    releases=(("someone/brand-new", "not there yet"),),
)
"""
ASK = """
from loopscope.checkpoints.remote import find_release
from loopscope.checkpoints.tables import TABLES
values = {"model_type": "brand_new"}
found = [table.family for table in TABLES if table.recognizes(values, frozenset())]
print(found, find_release("brand-new").at)
"""


def test_a_new_table_is_one_file_and_no_line_elsewhere(tmp_path: Path) -> None:
    for folder in ("loopscope", "models", "checkpoints", "tasks"):
        shutil.copytree(
            ROOT / folder,
            tmp_path / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("shipped", "__pycache__"),
        )
    (tmp_path / "checkpoints" / "tables" / "brand_new.py").write_text(NEW_TABLE)
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["['smollm']", "someone/brand-new"], done.stderr
