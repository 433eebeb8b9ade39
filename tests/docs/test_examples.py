"""The examples of the site's pages run, and every public call has one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import loopscope
from page_blocks import blocks, lay_out, run_page
from paths import DOCS

REFERENCE = sorted((DOCS / "reference").glob("*.md"))
HOWTO = sorted((DOCS / "howto").glob("*/*.md"))
SLOW = {"training", "use_the_command_line", "compare_checkpoints"}


def pages() -> list[object]:
    marks = {True: [pytest.mark.slow], False: []}
    return [
        pytest.param(page, id=str(page.relative_to(DOCS)), marks=marks[page.stem in SLOW])
        for page in [*REFERENCE, *HOWTO]
    ]


@pytest.mark.parametrize("page", pages())
def test_the_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out(tmp_path, monkeypatch)
    run_page(page)


def sections() -> dict[str, str]:
    """The section of each public call in the reference."""
    found: dict[str, str] = {}
    for page in REFERENCE:
        parts = re.split(r"^## (\w+)\n", page.read_text(encoding="utf-8"), flags=re.M)[1:]
        new = dict(zip(parts[::2], parts[1::2], strict=True))
        new.pop("Records", None)
        assert not new.keys() & found.keys()
        found |= new
    return found


def test_every_public_call_has_an_entry_and_an_example_that_uses_it() -> None:
    found, index = sections(), (DOCS / "reference" / "index.md").read_text(encoding="utf-8")
    assert sorted(found) == sorted(re.findall(r"\[`(\w+)`\]", index)) == loopscope.__all__
    for name, section in found.items():
        assert re.search(rf"^\.\. auto(function|class):: loopscope\.{name}$", section, flags=re.M)
        (example,) = re.findall(r"^```python\n(.*?)^```", section, flags=re.S | re.M)
        used = re.sub(r"^from .*$", "", example, flags=re.M)
        assert re.search(rf"\b{name}\b", used), name


@pytest.mark.parametrize("page", HOWTO, ids=lambda page: page.stem)
def test_a_how_to_is_short_and_shows_how(page: Path) -> None:
    assert len(page.read_text(encoding="utf-8").splitlines()) < 60
    assert blocks(page) or blocks(page, "sh")


def test_an_output_that_the_block_does_not_print_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nprint(2 + 3)\n```\n\n```output\n5\n```\n", encoding="utf-8")
    run_page(page)
    page.write_text("```python\nprint(2 + 3)\n```\n\n```output\n7\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError):
        run_page(page)
