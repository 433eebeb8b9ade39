"""The site is built without a warning, and holds what the pages promise."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import loopscope
from paths import DOCS, ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages, by the command of `make docs`."""
    out = tmp_path_factory.mktemp("site")
    command = (sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".")
    done = subprocess.run(
        (*command, str(out)), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_every_page_and_notebook_is_there(site: Path) -> None:
    sources = [*DOCS.rglob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert len(sources) > 50
    for source in sources:
        assert (site / source.relative_to(ROOT)).with_suffix(".html").is_file()


def test_every_public_call_is_an_entry(site: Path) -> None:
    pages = "".join(read(page) for page in (site / "docs" / "reference").glob("*.html"))
    for name in loopscope.__all__:
        assert f'id="loopscope.{name}"' in pages


def test_a_notebook_shows_its_pictures(site: Path) -> None:
    assert "_images/" in read(site / "notebooks" / "01_first_look.html")


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for page in (site / "docs" / "index.html", site / "notebooks" / "01_first_look.html"):
        assert 'src="http' not in read(page)
        assert 'rel="stylesheet" type="text/css" href="http' not in read(page)


def test_the_door_and_the_list_for_language_models(site: Path) -> None:
    assert "url=docs/index.html" in read(site / "index.html")
    listed = read(site / "llms.txt")
    assert listed.startswith("# loopscope\n\n> Mechanistic interpretability of looped")
    for line in listed.splitlines():
        if line.startswith("- ["):
            assert (site / line.partition("](")[2].partition(")")[0]).is_file()
    assert "docs/howto/interventions/patch_one_head.html" in listed


def test_signs_of_a_docstring_are_no_markup_outside_backticks() -> None:
    as_written = runpy.run_path(str(DOCS / "site_pages.py"))["as_written"]
    assert as_written("|h_t| and `|x|`, *args, copy_ and a * b") == (
        r"\|h_t\| and `|x|`, \*args, copy\_ and a * b"
    )
