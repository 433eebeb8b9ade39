"""The explorer's page of boards, in a real browser."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from browser import Tab
from explored import plot, served, text_of
from looks.pages import check_looks
from loopscope.analyses.common.configs import ExploreConfig
from loopscope.analyses.explorer.boards.model import judged
from loopscope.tasks.puzzles.sudoku import Sudoku

SMALL = Sudoku.of_side(4)
SOLVED, CHANGED = "2413132442313142", "1......4.23.3..2"

pytestmark = [pytest.mark.slow, pytest.mark.browser]


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    config = ExploreConfig(checkpoint="mini/sudoku/trm", port=0)
    with served(config, text_of("boards-took")) as page:
        page.resize(1400, 900)
        yield page


def place_of(cell: tuple[int, int]) -> str:
    """The middle of a cell of the first board, in the window."""
    return (
        f"(() => {{ const g = {plot('boards')}, l = g._fullLayout, r = g.getBoundingClientRect();"
        f" return [r.x + l.xaxis._offset + l.xaxis.c2p({cell[1]}), r.y + l.yaxis._offset +"
        f" l.yaxis.c2p({cell[0]})]; }})()"
    )


def test_a_clue_is_changed_and_a_cell_patched_in_the_browser(tab: Tab) -> None:
    digits = f"{plot('boards')}.data.map(t => t.text.flat().join(''))"
    assert tab.value(digits)[-1] == SOLVED
    assert tab.value(text_of("finding")).startswith("One solution")
    tab.type_into("#cell-0", "1")
    tab.wait(f"{plot('boards')}.data[7].text[0][0] === '1'")
    changed = tab.value(digits)
    answer = judged(SMALL, CHANGED).answer
    assert changed[-1] == answer != SOLVED
    tab.value(f"{plot('boards')}.scrollIntoView({{block: 'center'}})")
    tab.click(*tab.value(place_of((0, 0))))
    tab.wait(f"{text_of('patched')}?.includes('After loop 0 the states of row 0, column 0')")
    tab.wait(f"{plot('effects')}.data.length === 8")
    assert tab.value(f"{plot('effects')}.data[0].hovertext[0][1]").startswith(
        "row 0, column 1<br>same box"
    )
    tab.type_into("#cell-1", "1")
    tab.wait(f"{text_of('finding')}.includes('1 stands twice in a box')")
    tab.type_into("#cell-1", "9")
    tab.wait(f"{text_of('wrong')}.includes(\"and '9'\")")
    assert tab.value("document.getElementById('of-boards').className") == "stale"
    tab.click_on("#reset")
    tab.wait(f"{text_of('wrong')} === '' && {digits}[7] === '{SOLVED}'")


@pytest.mark.parametrize("width", [1400, 700])
def test_nothing_is_wider_than_the_window(tab: Tab, width: int) -> None:
    tab.resize(width, 900)
    tab.wait(f"window.innerWidth === {width} && {plot('boards')}._fullLayout.width < {width}")
    tab.wait(f"document.documentElement.scrollWidth <= {width}")
    unnamed = "[...document.querySelectorAll('.board input')].filter(e => !e.labels?.length).length"
    assert tab.value(unnamed) == 0
    assert tab.page.errors == []


def test_the_boards_are_read_in_a_narrow_window_in_light_and_in_dark(tab: Tab) -> None:
    check_looks(tab, [plot("boards")])
