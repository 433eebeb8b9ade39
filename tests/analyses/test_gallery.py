"""The gallery shows every figure, and what it says is what the commands say."""

from __future__ import annotations

import shlex
import subprocess
from pathlib import Path

import pytest
import tyro

from loopscope.analyses import cli
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.records import markdown_table
from loopscope.analyses.pages import gallery
from loopscope.analyses.pages.gallery import Entry, Pictured
from paths import DOCS
from shipped_pages import assert_same_page

QUICK = ("hop-updates", "grokking", "patch", "lens")
PNG = b"\x89PNG\r\n\x1a\n"


def sections() -> dict[str, str]:
    text = (DOCS / "gallery.md").read_text()
    return {part.partition("\n")[0]: part for part in text.split("\n## ")[1:]}


def shipped_table(section: str) -> str:
    return "\n".join(line for line in section.splitlines() if line.startswith("|"))


def test_every_command_has_its_section_and_its_picture() -> None:
    assert list(sections()) == list(FIGURES)
    for name, section in sections().items():
        assert f"![{name}](gallery/{name}.png)" in section
        assert f"`loopscope {name}" in section
        assert (DOCS / "gallery" / f"{name}.png").read_bytes().startswith(PNG)
    assert {path.stem for path in (DOCS / "gallery").iterdir()} == set(FIGURES)


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_the_numbers_are_what_the_command_prints(name: str) -> None:
    record = FIGURES[name].module().run(FIGURES[name].config()())
    table = markdown_table(record.summary().head(gallery._ROWS))
    assert_same_page(table, shipped_table(sections()[name]))


@pytest.mark.browser
def test_a_figure_without_shipped_input_says_so_and_uses_the_toy(tmp_path: Path) -> None:
    found = {entry.name: entry for entry in gallery.entries(tmp_path / "toy")}
    assert list(found) == list(FIGURES)
    assert [name for name, entry in found.items() if entry.note] == ["exit-gate"]
    gallery.make_toy(tmp_path / "toy")
    drawn = gallery.draw_one(found["exit-gate"])
    assert drawn.image.startswith(PNG)
    assert found["exit-gate"].note in sections()["exit-gate"]
    table = markdown_table(drawn.record.summary().head(gallery._ROWS))
    assert_same_page(table, shipped_table(sections()["exit-gate"]))


def test_the_page_and_its_pictures_are_written_together(tmp_path: Path) -> None:
    record = FIGURES["hop-updates"].module().run(FIGURES["hop-updates"].config()())
    path = gallery.write(
        tmp_path / "all.md", lambda: [Pictured(Entry("hop-updates", {}), record, PNG)]
    )
    assert (tmp_path / "all" / "hop-updates.png").read_bytes() == PNG
    assert "![hop-updates](all/hop-updates.png)" in path.read_text()


def test_nothing_is_written_when_a_figure_fails(tmp_path: Path) -> None:
    def fail() -> list[Pictured]:
        raise ValueError("a picture needs kaleido")

    with pytest.raises(ValueError, match="kaleido"):
        gallery.write(tmp_path / "all.md", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_command_of_the_page_is_parsed_by_a_shell(tmp_path: Path) -> None:
    for entry in gallery.entries(tmp_path / "a toy (it's small)"):
        program, name, *arguments = shlex.split(entry.command)
        assert (program, name) == ("loopscope", entry.name)
        parsed = tyro.cli(cli._command(FIGURES[name]), args=arguments)
        assert parsed.config == FIGURES[name].config()(**entry.settings)
        done = subprocess.run(["bash", "-n", "-c", entry.command], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
