"""The report page, in a real browser."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from browser import Page, Tab, opened, visit
from language_toys import CAT, DOG, ouro_folder
from looks.colours import rgb
from looks.colours import shown as shown_color
from looks.pages import crowded, dress, faint, wide
from loopscope.analyses.common.configs import ReportConfig
from loopscope.analyses.common.figures import FIGURES
from loopscope.analyses.common.sections import Opened
from loopscope.analyses.figures.answers.halting_compare import HaltingCompareConfig
from loopscope.analyses.figures.answers.margins import MarginsConfig
from loopscope.analyses.figures.answers.recurrence_grids import RecurrenceGridsConfig
from loopscope.analyses.report import page as report
from loopscope.interp.drawing.look import ACCURACY_SCALE, CELL_INK, DARK, INK
from paths import SHIPPED

TABS = {
    "Answers": ("overthinking", "recurrence", "halting", "flips"),
    "Circuit": ("lens", "patch", "ranks", "circuit"),
    "Dynamics": (
        "orbits",
        "steps",
        "attention-settling",
        "lyapunov",
        "attractors",
        "schedule-edit",
    ),
    "Comparison": ("recurrence-grids", "margins", "halting-compare"),
}
DRAWN = tuple(key for keys in TABS.values() for key in keys)
OF_ONE = (
    "overthinking",
    "recurrence",
    "lens",
    "patch",
    "halting",
)  # figures with many marks and a long table


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ReportConfig(per_hop=4, n_loops=10, compare=("mini/multi_hop/r4",))
    return report.write_report(config, tmp_path_factory.mktemp("page") / "report.html")


@pytest.fixture(scope="module")
def page(page_file: Path) -> Page:
    drawn = "document.querySelectorAll('.js-plotly-plot .main-svg').length"
    shown = (
        "[...document.querySelectorAll('[role=tab]')].map(tab => { tab.click(); return"
        " [tab.textContent, "
    )
    shown += (
        "[...document.querySelectorAll('[role=tabpanel]:not([hidden]) .js-plotly-plot')].map(d =>"
        " [d.id, d.clientWidth, d.clientHeight])]})"
    )
    overflow = "document.documentElement.scrollWidth - window.innerWidth"
    rows = (
        "[...document.querySelectorAll('section')].map(s => s.querySelectorAll('table tr').length)"
    )
    marks = (
        "[...document.querySelectorAll('.js-plotly-plot')].map(d => "
        "d.querySelectorAll('path.js-line, .heatmaplayer image, .heatmap-label').length)"
    )
    return visit(
        page_file, [drawn, shown, overflow, rows, marks], ready=f"{drawn} >= {3 * len(DRAWN)}"
    )


@pytest.mark.browser
def test_every_figure_is_drawn_inside_the_window(page: Page) -> None:
    _, tabs, overflow, _, marks = page.values
    assert {
        name: tuple(box[0].removeprefix("figure-") for box in boxes) for name, boxes in tabs
    } == TABS
    assert all(
        width > 800 and height > (300 if figure.removeprefix("figure-") in OF_ONE else 250)
        for _, boxes in tabs
        for figure, width, height in boxes
    )
    assert overflow <= 0
    assert all(count > (5 if key in OF_ONE else 2) for key, count in zip(DRAWN, marks, strict=True))


@pytest.mark.browser
def test_the_page_logs_no_error_and_asks_the_network_for_nothing(page: Page) -> None:
    assert page.errors == []
    assert page.requests == []


@pytest.mark.browser
def test_every_section_has_its_table(page: Page) -> None:
    assert all(
        rows > (4 if key in OF_ONE else 2) for key, rows in zip(DRAWN, page.values[3], strict=True)
    )


@pytest.mark.slow
def test_the_page_stays_below_10_megabytes(page_file: Path) -> None:
    assert page_file.stat().st_size < 10_000_000


# How the page looks


@pytest.fixture(scope="module")
def looked_at(page_file: Path) -> Iterator[Tab]:
    with opened(page_file.as_uri()) as tab:
        tab.wait(
            f"document.querySelectorAll('.js-plotly-plot .main-svg').length >= {3 * len(DRAWN)}"
        )
        yield tab


def choose(tab: Tab, name: str) -> None:
    tab.click_on(f"#tab-{name}")
    inside = f"[...document.querySelectorAll('#panel-{name} .js-plotly-plot')]"
    tab.wait(f"{inside}.every(plot => Math.abs(plot.clientWidth - plot._fullLayout.width) < 1)")


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [1400, 700])
def test_nothing_is_cut_and_no_titles_collide(looked_at: Tab, width: int) -> None:
    looked_at.resize(width, 900)
    for name in TABS:
        choose(looked_at, name)
        assert crowded(looked_at) == [], name
        assert wide(looked_at) == [], name


@pytest.mark.browser
@pytest.mark.slow
def test_a_link_to_a_figure_opens_its_tab(looked_at: Tab) -> None:
    looked_at.value("location.hash = '#orbits'")
    shown = "document.querySelector('[role=tabpanel]:not([hidden])').id"
    looked_at.wait(f"{shown} === 'panel-Dynamics'")
    looked_at.wait("Math.abs(document.getElementById('orbits').getBoundingClientRect().top) < 5")
    looked_at.value("location.hash = '#nowhere'")
    looked_at.value("history.replaceState(null, '', '#lens'); location.reload()")
    looked_at.wait(
        f"window.tabs !== 0 && document.readyState === 'complete' && {shown} === 'panel-Circuit'"
    )


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_follows_the_system_and_paper_shows_all_in_light(looked_at: Tab) -> None:
    ground = "document.querySelector('#figure-lens')._fullLayout.paper_bgcolor"
    dress(looked_at, "light")
    assert faint(looked_at) == {}
    looked_at.wait(f"{ground} === 'white'")
    dress(looked_at, "dark")
    looked_at.wait(f"{ground} !== 'white'")
    assert faint(looked_at) == {}
    assert _color(looked_at, ground) == shown_color("#ffffff", "dark")
    axis = "document.querySelector('#figure-lens')._fullLayout"
    assert _color(looked_at, f"{axis}.font.color") == shown_color(INK, "dark")
    first = "document.querySelector('#figure-lens').data[0]"
    assert looked_at.value(f"{first}.colorscale.at(-1)[1]") == DARK[ACCURACY_SCALE[-1][1]]
    assert looked_at.value(f"{first}.textfont.color") == DARK[CELL_INK]
    dress(looked_at, "dark", "print")
    looked_at.wait(f"{ground} === 'white'")
    panels = "[...document.querySelectorAll('[role=tabpanel]')]"
    displays = looked_at.value(f"{panels}.map(each => getComputedStyle(each).display)")
    assert displays == ["block"] * len(TABS)
    heights = looked_at.value("[...document.querySelectorAll('section')].map(e => e.offsetHeight)")
    assert len(heights) == len(DRAWN)
    assert min(heights) > 250
    dress(looked_at, "light")


def _color(tab: Tab, expression: str) -> object:
    return pytest.approx(rgb(tab.value(expression)), abs=0.003)


def test_plotly_is_inlined_once_and_nothing_is_linked(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert len(re.findall(r"plotly\.js v\d", text)) == 1
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=[\"']?(https?:)?//", text)


def test_hover_text_has_the_tokens(page_file: Path) -> None:
    text = page_file.read_text(encoding="utf-8")
    assert re.search(r"clean .{0,12}e_\d+.{0,6}, corrupted .{0,12}e_\d+", text)
    assert re.search(r"rank of .{0,12}e_\d+", text)


def test_a_failing_run_leaves_no_page(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 to 16 hops, got hops=99"):
        report.write_report(ReportConfig(per_hop=1, n_loops=2, hops=99), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_figure_that_cannot_be_drawn_says_why_in_its_place(tmp_path: Path) -> None:
    source, release = SHIPPED / "ltg_trained", tmp_path / "release"
    release.mkdir()
    for path in (*source.glob("*.pt"), source / "vocab.json", source / "test.json"):
        (release / path.name).symlink_to(path)
    config = ReportConfig(
        checkpoint=str(release),
        n_heads=3,
        input_injection=False,
        readout="last_real",
        per_hop=2,
        n_loops=3,
    )
    opened, made = report.run(config)
    why = {each.name: each.why for inside in made.values() for each in inside if each.why}
    assert why.keys() == {"patch", "circuit"}
    assert "no other head entity with a known, different answer was found" in why["patch"]
    text = report.page(opened, made, 1.0)
    place = text.partition('<section id="patch">')[2].partition("</section>")[0]
    assert html.escape(why["patch"]) in place
    assert "What one activation carries" in place


def test_a_report_without_any_figure_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, opened: Opened) -> report.Drawn:
        return report.Drawn(name, FIGURES[name].module().SECTION, None, None, "it is odd")

    monkeypatch.setattr(report, "_drawn", refuse)
    with pytest.raises(ValueError, match="no figure of the report can be drawn: it is odd"):
        report.run(ReportConfig(per_hop=1))


def test_the_comparison_keeps_every_setting_of_the_report(tmp_path: Path) -> None:
    config = ReportConfig(
        checkpoint="a",
        compare=("b",),
        window=(1, 2),
        vocab=tmp_path / "v",
        data=tmp_path / "d",
        threads=3,
        n_heads=5,
        input_injection=True,
        readout="column:3",
        per_hop=7,
        device="cpu",
        n_loops=9,
    )
    for kind in (RecurrenceGridsConfig, MarginsConfig, HaltingCompareConfig):
        found = Opened(config, None).compared(kind)  # type: ignore[arg-type]
        assert found.checkpoints == ("a", "b")
        shared = {each.name for each in fields(kind)} & {each.name for each in fields(config)}
        assert {"window", "vocab", "data", "threads", "n_heads", "device", "n_loops"} <= shared
        for name in shared:
            assert getattr(found, name) == getattr(config, name)
        for source in found.sources():
            assert (source.window, source.data, source.threads) == ((1, 2), tmp_path / "d", 3)


# Reports of language models


@pytest.fixture(scope="module")
def of_a_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ReportConfig(checkpoint=ouro_folder(), clean=CAT, corrupted=DOG, n_loops=9)
    return report.write_report(config, tmp_path_factory.mktemp("text") / "report.html")


OF_A_TEXT = {
    "Answers": ["readouts", "exit-gate", "overthinking"],
    "Circuit": ["lens", "patch", "ranks", "circuit"],
    "Dynamics": [
        *("orbits", "steps", "attention-settling", "layers"),
        *("lyapunov", "attractors", "schedule-edit"),
    ],
}


@pytest.mark.browser
def test_the_report_of_a_language_model_shows_what_serves_a_text(of_a_text: Path) -> None:
    shown = (
        "[...document.querySelectorAll('[role=tab]')].map(tab => { tab.click(); return"
        " [tab.textContent, [...document.querySelectorAll('[role=tabpanel]:not([hidden])"
        " .js-plotly-plot')].filter(d => d.clientWidth > 800 && d.clientHeight > 250).map(d =>"
        " d.id)]})"
    )
    drawn = "document.querySelectorAll('.js-plotly-plot .main-svg').length"
    page = visit(of_a_text, [shown], ready=f"{drawn} >= {3 * 14}")
    found = {tab: [key.removeprefix("figure-") for key in keys] for tab, keys in page.values[0]}
    assert found == OF_A_TEXT
    assert page.errors == []
    assert page.requests == []


@pytest.mark.slow
def test_the_report_of_a_text_says_its_answer_and_no_questions(of_a_text: Path) -> None:
    text = of_a_text.read_text(encoding="utf-8")
    assert "class=refused" not in text
    assert f"The text is {CAT}" in text
    assert html.escape(f"The pair is {CAT} against {DOG}") in text
    facts = text.partition("<div class=facts>")[2].partition("<div role=tablist")[0]
    assert "questions" not in facts
    assert "last_real" in facts


def test_the_report_of_a_language_model_without_a_text_says_which_text_it_shows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(report, "TABS", {"Answers": ("readouts",), report.COMPARISON: ()})
    opened, made = report.run(ReportConfig(checkpoint=ouro_folder()))
    (drawn,) = made["Answers"]
    assert drawn.record.text == report.DEFAULT_TEXT
    said = f"so the text is the default one: {report.DEFAULT_TEXT!r}."
    assert html.escape(said) in report.page(opened, made, 1.0)
    given, made = report.run(ReportConfig(checkpoint=ouro_folder(), text=report.DEFAULT_TEXT))
    assert "default one" not in report.page(given, made, 1.0)


def test_a_report_leaves_out_what_the_input_has_not() -> None:
    _, made = report.run(ReportConfig(checkpoint="mini/smiles", text="CC(=O)N", n_loops=9))
    names = {tab: [each.name for each in inside] for tab, inside in made.items()}
    assert names == {
        "Answers": ["readouts", "overthinking"],
        "Circuit": ["lens", "ranks"],
        "Dynamics": OF_A_TEXT["Dynamics"],
    }
    assert all(each.figure is not None for inside in made.values() for each in inside)


def test_a_report_without_questions_and_text_or_with_unequal_texts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"has no test\.json beside its weights; pass --data"):
        report.run(ReportConfig(checkpoint="mini/smiles"))
    with pytest.raises(ValueError, match="has 6 tokens in the clean text and 2 in the corrupted"):
        report.run(ReportConfig(checkpoint=ouro_folder(), clean=CAT, corrupted="a dog"))
    with pytest.raises(ValueError, match="a corrupted text needs its clean one; pass --clean"):
        report.run(ReportConfig(checkpoint=ouro_folder(), text=CAT, corrupted=DOG))
